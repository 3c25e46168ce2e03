"""`sd edit`: the weights that it uses, what it notes, reads again and refuses."""

import make_checkpoint
import pytest
from conftest import pixels, refused, settings_of
from PIL import Image

from convert.checkpoint import read_checkpoint
from convert.files.reader import open_checkpoint
from sd.config import SD_V1_EDIT

TINY = make_checkpoint.tiny(SD_V1_EDIT)


@pytest.fixture(scope="module")
def edit_state():
    return make_checkpoint.made_up_state_dict(TINY, ema=True)


@pytest.fixture(scope="module")
def edit_ckpt(tmp_path_factory, edit_state):
    path = tmp_path_factory.mktemp("checkpoints") / "edit.ckpt"
    make_checkpoint.save_original(path, edit_state)
    return path


@pytest.fixture
def files(tmp_path):
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / "in.png")
    return tmp_path


COMMON = ["--init", "in.png", "--steps", 1, "-W", 64, "-H", 64]


@pytest.mark.slow
def test_the_averaged_weights_are_used_unless_asked_otherwise(edit_ckpt, tmp_path, edit_state):
    for asked, used, other in (("auto", "ema", "model"), ("model", "model", "ema"), ("ema", "ema", "model")):
        with open_checkpoint(edit_ckpt) as file:
            checkpoint = read_checkpoint(file, weights=asked)
        assert (checkpoint.weights, checkpoint.other_weights) == (used, other), asked
    incomplete = {name: value for name, value in edit_state.items() if name != "model_ema.diffusion_modelout2bias"}
    assert len(incomplete) == len(edit_state) - 1
    make_checkpoint.save_original(tmp_path / "incomplete.ckpt", incomplete)
    with open_checkpoint(tmp_path / "incomplete.ckpt") as file:
        assert read_checkpoint(file).weights == "model"


@pytest.mark.slow
def test_the_command_edits_a_picture_and_notes_how(run, edit_ckpt, files):
    code, (path,), err = run("edit", "make it snow", *COMMON, "-m", edit_ckpt, "--seed", 3)
    assert code == 0, err
    assert "sd-v1-edit, ema weights (--weights model takes the others)" in err
    stored = settings_of(path)
    assert (stored["image_guidance"], stored["strength"], stored["model"]["weights"]) == (1.5, 1.0, "ema")
    assert (stored["init"]["name"], len(stored["init"]["sha256"])) == ("in.png", 64)
    text = Image.open(path).text["parameters"]
    assert "Image CFG scale: 1.5" in text
    assert "Denoising strength" not in text
    code, (again,), err = run("edit", "--like", path, "--init", "in.png", "-m", edit_ckpt, "-o", "again.png")
    assert (code, pixels(Image.open(again)).tolist()) == (0, pixels(Image.open(path)).tolist()), err
    code, out, _ = run("show", path)
    assert "image guidance:      1.5" in out


@pytest.mark.slow
def test_like_takes_the_weights_and_the_scale_of_the_picture(run, edit_ckpt, files):
    flags = [*COMMON, "-m", edit_ckpt, "--seed", 3, "--weights", "model", "--image-guidance", 1.2]
    _, (path,), _ = run("edit", "make it snow", *flags)
    _, (again,), _ = run("edit", "--like", path, "--init", "in.png", "-m", edit_ckpt, "-o", "again.png")
    assert pixels(Image.open(again)).tolist() == pixels(Image.open(path)).tolist()
    stored = settings_of(again)
    assert (stored["image_guidance"], stored["model"]["weights"]) == (1.2, "model")


@pytest.mark.slow
def test_like_a_picture_of_another_kind_keeps_the_defaults_and_says_what_it_cannot_use(
    run, edit_ckpt, tiny_ckpt, files
):
    small = ["--steps", 2, "-W", 64, "-H", 64, "--seed", 3]
    _, (plain,), _ = run("txt2img", "a cat", *small, "-m", tiny_ckpt, "-o", "plain.png")
    code, (path,), err = run("edit", "--like", plain, "--init", "in.png", "-m", edit_ckpt)
    assert (code, settings_of(path)["image_guidance"]) == (0, 1.5), err
    code, _, err = run("txt2img", "--like", path, "-m", tiny_ckpt, "-o", "other.png", "-W", 64, "-H", 64)
    assert code == 0
    assert "could not use image guidance 1.5; resize mode crop; init in.png" in err


@pytest.mark.slow
def test_lines_of_a_file_have_scales_of_their_own_and_a_stopped_run_goes_on(run, edit_ckpt, files):
    lines = ["make it snow", '{"prompt": "make it night", "image_guidance": 2}', '--prompt "add a cat" --cfg-image 1']
    (files / "jobs.txt").write_text("\n".join(lines))
    job = ["edit", "--from-file", "jobs.txt", *COMMON, "-m", edit_ckpt, "--seed", 3, "-b", 2, "-o", "out"]
    code, paths, err = run(*job)
    assert (code, [settings_of(path)["image_guidance"] for path in paths]) == (0, [1.5, 2, 1]), err
    before = (files / paths[1]).read_bytes()
    (files / paths[1]).unlink()
    code, again, err = run(*job)
    assert (code, len(again)) == (0, 1), err
    assert "2 of 3 pictures exist already" in err
    assert (again, (files / paths[1]).read_bytes()) == ([paths[1]], before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "flags", "parts"),
    [
        ("edit", ["a", *COMMON, "-m", "TINY"], ["an sd-v1 checkpoint: its UNet takes 4 channels (latents). Use it with",
         "sd txt2img, sd img2img or sd inpaint. Editing needs a checkpoint whose UNet takes 8."]),
        ("txt2img", ["a", "-m", "EDIT"], ["an sd-v1-edit checkpoint: its UNet takes 8 channels (latents, and the "
         "latents of a picture to edit). Use it with sd edit. Text to picture needs a checkpoint whose UNet takes 4."]),
        ("img2img", ["a", *COMMON, "-m", "EDIT"], ["Use it with sd edit. Image to image needs"]),
        ("inpaint", ["a", *COMMON, "-m", "EDIT", "--expand", "left=8"], ["Inpainting needs", "takes 4 or 9."]),
        ("explain", ["a", "-m", "EDIT"], ["UNet takes 8 channels", "Give it a picture with --init IMAGE."]),
        ("edit", ["a", *COMMON], ["Editing needs a checkpoint whose UNet takes 8. Give one with -m FILE."]),
        ("depth2img", ["a", *COMMON], ["Depth to image needs a checkpoint whose UNet takes 5. Give one with -m FILE."]),
        ("edit", ["a", "-m", "EDIT"], ["--init must be given. See sd edit --help."]),
        ("edit", ["a", *COMMON, "-m", "EDIT", "--image-guidance", "-1"], ["-guidance -1.0 is out of range: 0 to"]),
        ("edit", ["a", *COMMON, "--strength", "0.5"], ["not a flag of sd edit. It is a flag of sd img2img, sd inp"]),
        ("edit", ["a", *COMMON, "--cfg-text", "7"], ["--cfg-text is not a flag of sd edit. Use --guidance-scale."]),
        ("edit", ["a", *COMMON, "--img-cfg-scale", "2"], ["Use --image-guidance."]),
        ("txt2img", ["a", "--image-guidance", "2"], ["It is a flag of sd edit."]),
        ("edit", ["--from-file", "strong.txt", *COMMON, "-m", "EDIT"], ["strong.txt, line 1: strength 0.5 does"]),
        ("edit", ["--from-file", "null.txt", *COMMON, "-m", "EDIT"], ["null.txt, line 1: image guidance must be a nu"]),
        ("txt2img", ["--from-file", "guided.txt", "-m", "TINY"], ["line 1: image guidance is for editing by instr"]),
        ("depth2img", ["--from-file", "guided.txt", *COMMON], ["line 1: image guidance is for editing by instr"]),
        ("edit", ["a", *COMMON, "-m", "EDIT", "-H", 65], ["--height 65 is not a multiple of 8. Nearest: 64 or 72."]),
        ("edit", ["a", *COMMON, "-m", "EDIT", "-W", 40], ["--width 40 is out of range: 64 to 4096."]),
        ("ip2p", ["a"], ["Did you mean edit?"]),
    ],
)  # fmt: skip
def test_the_commands_refuse_what_does_not_go_together(run, edit_ckpt, tiny_ckpt, files, command, flags, parts):
    (files / "strong.txt").write_text('{"prompt": "a", "strength": 0.5}')
    (files / "null.txt").write_text('{"prompt": "a", "image_guidance": null}')
    (files / "guided.txt").write_text('{"prompt": "a", "image_guidance": 1.5}')
    refused(run(command, *[{"TINY": tiny_ckpt, "EDIT": edit_ckpt}.get(flag, flag) for flag in flags]), *parts)


def test_a_conversion_that_keeps_both_kinds_of_weights_is_read_back(run, edit_ckpt, files):
    code, _, err = run("convert", edit_ckpt, "out.ckpt", "--keep-all", "--verify")
    assert code == 0, err
    with open_checkpoint(files / "out.ckpt") as file:
        assert read_checkpoint(file).weights == "ema"
