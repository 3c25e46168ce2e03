"""Pictures of Stable Diffusion XL from the command line: every command, its own flags, and the refiner."""

import json
from pathlib import Path

import make_checkpoint
import numpy as np
import pytest
from adapters import lora, lora_shapes
from conftest import refused, rest_slow, settings_of
from embeddings import made_up
from PIL import Image
from safetensors.torch import load_file, save_file

from convert.actions.convert import convert
from convert.layouts.adapter_names import adapted_family
from sd.app.cli.like import read
from sd.config import SDXL, SDXL_INPAINTING, SDXL_REFINER
from sd.pipeline.image.stored_settings.web_ui import settings_in

SMALL = ("--steps", 3, "-s", 1, "--force", "--precision", "fp32")
SIZE = ("-W", 64, "-H", 64)
PARTS = ("unet", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("xl"), {}
    for family in (SDXL, SDXL_INPAINTING, SDXL_REFINER):
        found[family.family] = folder / f"{family.family}.safetensors"
        state = make_checkpoint.made_up_state_dict(make_checkpoint.tiny(family))
        save_file({name: value.contiguous() for name, value in state.items()}, found[family.family])
    picture, mask = Image.linear_gradient("L").resize((64, 64)).convert("RGB"), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    for name, image in (("init", picture), ("mask", mask)):
        found[name] = folder / f"{name}.png"
        image.save(found[name])
    yield found
    for path in found.values():
        path.unlink()


COMMANDS = {  # words of a command -> its size, and how many pictures it makes
    "txt2img --hires 2 --hires-steps 1": ((128, 128), 1),
    "img2img --init {init} --strength 0.7": ((64, 64), 1),
    "inpaint --init {init} --mask {mask}": ((64, 64), 1),
    "txt2img --count 3 -b 2 --clip-skip 3 --save-steps": ((64, 64), 3),
    "txt2img": ((64, 64), 1),
    "txt2img --tile --low-memory": ((64, 64), 1),
    "txt2img --vary 0.2 --vary-seed 5 --count 2 --grid": ((64, 64), 2),
    "inpaint --init {init} --expand right=64 --width 128": ((128, 64), 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", rest_slow(["both", "sdxl", "sdxl-refiner", "sdxl-inpainting"]))
@pytest.mark.parametrize("command", rest_slow(list(COMMANDS), quick=4))
def test_every_picture_command_draws(run, files, command, family):
    words = command.format(**files).split()
    size, count = COMMANDS[command]
    model = ["-m", files["sdxl" if family == "both" else family]]
    model += ["--refiner", files["sdxl-refiner"], "--switch-at", 0.5] if family == "both" else []
    result = run(words[0], "a cat", *SIZE, *words[1:], *model, *SMALL)
    if family == "sdxl-inpainting" and words[0] != "inpaint":
        refused(result, "this is an sdxl-inpainting checkpoint", "Use it with sd inpaint")
        return
    code, lines, err = result
    assert code == 0, err
    pictures = [line for line in lines if "grid" not in line]
    assert len(pictures) == count
    with Image.open(pictures[0]) as picture:
        assert picture.size == size
        assert np.asarray(picture).std() > 1


BOTH = ("-m", "sdxl", "--refiner", "sdxl-refiner")
OWN = {  # a flag and its value -> the field, and what a picture stores
    ("--prompt-2", "an oil painting, dark"): ("prompt_2", "an oil painting, dark"),
    ("--negative-prompt-2", "fog"): ("negative_prompt_2", "fog"),
    ("--original-size", "32x48"): ("original_size", [32, 48]),
    ("--crop", "3,4"): ("crop", [3, 4]),
    ("--aesthetic-score", "3"): ("aesthetic_score", 3.0),
    ("--negative-aesthetic-score", "5"): ("negative_aesthetic_score", 5.0),
    ("--switch-at", "0.4"): ("switch_at", 0.4),
    ("--switch-by", "steps", "--switch-at", "0.4"): ("switch_by", "steps"),
}


@pytest.fixture(scope="module")
def named(files):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SD_MODELS", str(files["sdxl"].parent))
        yield files


@pytest.fixture
def draw(run, named, monkeypatch):
    monkeypatch.setenv("SD_MODELS", str(named["sdxl"].parent))

    def draw(*words):
        code, lines, err = run("txt2img", *words, *SMALL)
        assert code == 0, err
        with Image.open(lines[0] if "--json" not in words else json.loads(lines[0])["path"]) as picture:
            return lines[0], np.asarray(picture).copy(), err

    return draw


@pytest.mark.slow
@pytest.mark.parametrize("flag", rest_slow([(flag,) for flag in OWN]), ids=lambda flag: flag[0])
def test_each_flag_changes_the_picture_is_stored_and_is_used_again(draw, flag):
    name, value = OWN[flag]
    path, picture, _ = draw("a cat", *BOTH, *SIZE, *flag, "-o", "a.png")
    _, other, _ = draw("a cat", *BOTH, *SIZE, "-o", "b.png")
    assert (picture != other).any()
    stored = settings_of(path)
    assert stored[name] == value
    assert stored["refiner"]["name"] == "sdxl-refiner"
    _, again, err = draw("--like", path, "-o", "c.png")
    assert (again == picture).all()
    assert settings_of("c.png") == stored
    assert "sdxl-refiner" in err
    in_line = settings_in(read(Path("a.png"))[1]["parameters"])
    assert in_line.unused == []
    found = in_line.settings[name]
    assert (found if isinstance(found, type(value)) else [int(n) for n in found.replace("x", ",").split(",")]) == value


@pytest.mark.slow
def test_lines_of_a_file_have_settings_of_their_own(draw, tmp_path):
    own = ({"prompt_2": "b"}, {"original_size": "32x32"}, {"crop": [8, 0]}, {"switch_at": None})
    text = "\n".join(json.dumps({"prompt": "a", **each}) for each in own) + "\n--prompt a --prompt-2 b --crop 8,0"
    (tmp_path / "jobs.txt").write_text(text)
    draw("--from-file", "jobs.txt", *BOTH, *SIZE, "-o", "out/{index}.png")
    stored = [settings_of(path) for path in sorted((tmp_path / "out").glob("*.png"))]
    assert [each["prompt_2"] for each in stored] == ["b", "", "", "", "b"]
    assert [each["crop"] for each in stored] == [[], [], [8, 0], [], [8, 0]]
    assert [each["switch_at"] for each in stored] == [0.8, 0.8, 0.8, None, 0.8]
    assert ["refiner" in each for each in stored] == [True, True, True, False, True]


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_refiner_only(draw, run, named, tmp_path):
    (tmp_path / "jobs.txt").write_text("a\nb")
    words = ("txt2img", "--from-file", "jobs.txt", *SIZE, "--steps", 3, "-s", 1, "-o", "out/{index}-{seed}.png")
    for models, expected in ((BOTH, 2), (BOTH, 0), (("-m", "sdxl", "-o", "out2/{index}.png"), 2)):
        code, lines, err = run(*words, *models)
        assert (code, len(lines)) == (0, expected), err


REFUSED = {
    "--original-size 12": "--original-size 12 is not WIDTHxHEIGHT, such as 1024x768, each 1 to 99999.",
    "--original-size 0x64": "--original-size 0x64 is not WIDTHxHEIGHT",
    "--crop 1x2": "--crop 1x2 is not LEFT,TOP, such as 0,64, each 0 to 99999.",
    "--switch-at 0.5": "--switch-at does nothing without a refiner. Give one with --refiner FILE.",
    "--switch-by steps": "--switch-by does nothing without a refiner.",
    "--aesthetic-score 7": "--aesthetic-score does nothing here: it is for the refiner of Stable Diffusion XL.",
    "--refiner sdxl": "--refiner must be the refiner of Stable Diffusion XL; this is sdxl.",
    "--refiner sdxl-refiner --switch-at 1": "--switch-at 1 leaves no step to the refiner: there are 3.",
    "--refiner sdxl-refiner --switch-at 1.5": "--switch-at 1.5 is out of range",
    "--refiner sdxl-refiner -m sdxl-refiner": "--refiner goes with a base model of Stable Diffusion XL",
    "--refiner nowhere.safetensors": "nowhere.safetensors",
    "--refiner sdxl-refiner -m {v1}": "--refiner goes with a base model of Stable Diffusion XL; this one is sd-v1.",
    "-m {v1} --prompt-2 x": "--prompt-2 does nothing here: it is for a model with two text encoders",
    "-m {v1} --crop 8,0": "--crop does nothing here: it is for a model of Stable Diffusion XL",
    "-m sdxl-refiner --prompt-2 x": "This is sdxl-refiner.",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_nothing_is_refused_in_a_sentence(run, named, monkeypatch, tiny_ckpt, words):
    monkeypatch.setenv("SD_MODELS", str(named["sdxl"].parent))
    given = words.format(v1=tiny_ckpt).split()
    model = () if "-m" in given else ("-m", "sdxl")
    refused(run("txt2img", "a cat", *given, *model, *SMALL, *SIZE), REFUSED[words])


@pytest.mark.slow
def test_a_picture_whose_refiner_is_gone_is_made_without_it_and_that_is_said(draw, run, named, monkeypatch, tmp_path):
    draw("a cat", *BOTH, *SIZE, "--aesthetic-score", 3, "-o", "a.png")
    monkeypatch.setenv("SD_MODELS", str(tmp_path))
    code, _, err = run("txt2img", "--like", "a.png", "-m", named["sdxl"].rename(tmp_path / "sdxl.safetensors"), *SMALL)
    (tmp_path / "sdxl.safetensors").rename(named["sdxl"])
    assert code == 0
    assert "a.png was made with the refiner sdxl-refiner: give it with --refiner FILE" in err


def test_the_refiner_and_the_sizes_are_shown(draw, run):
    told = ("--original-size", "32x48", "--negative-prompt-2", "fog")
    line, *_ = draw("a cat", *BOTH, *SIZE, *told, "-o", "a.png", "--json")
    assert (json.loads(line)["negative_prompt_2"], "prompt_2" in json.loads(line)) == ("fog", False)
    path = json.loads(line)["path"]
    _, lines, _ = run("show", path)
    shown = dict(line.split(": ", 1) for line in map(str, lines))
    assert {name: value.strip() for name, value in shown.items() if name in ("refiner", "original size")} == {
        "refiner": "sdxl-refiner",
        "original size": "32x48",
    }
    _, (line,), _ = run("show", path, "--json")
    assert json.loads(line)["refiner"] == {name: settings_of(path)["refiner"][name] for name in ("name", "sha256")}


@pytest.mark.slow
def test_adapters_and_words_do_not_reach_the_refiner_and_that_is_said(draw, tmp_path):
    config = make_checkpoint.tiny(SDXL)
    lora(tmp_path / "detail.safetensors", lora_shapes(adapted_family(config), rank=1))
    save_file({"clip_l": made_up(1, 64), "clip_g": made_up(1, 64)}, tmp_path / "easy.safetensors")
    added = ("--lora", "detail.safetensors", "--embeddings", "easy.safetensors", "-o", "a.png")
    said = "the refiner works without detail, easy: adapters and learned words change the base model only"
    assert said in draw("easy cat", *BOTH, *SIZE, *added)[2]
    assert "the refiner works" not in draw("easy cat", "-m", "sdxl", *SIZE, *added)[2]
    assert "the refiner works" not in draw("a cat", *BOTH, *SIZE, "--embeddings", "easy.safetensors", "-o", "a.png")[2]


def test_a_picture_of_xl_is_not_made_with_the_embedded_model(draw, run, monkeypatch, tmp_path):
    draw("a cat", "-m", "sdxl", *SIZE, "-o", "a.png")
    monkeypatch.setenv("SD_MODELS", str(tmp_path))
    sentence = "a.png was made with sdxl, a Stable Diffusion XL base checkpoint that is not in your models folder"
    refused(run("txt2img", "--like", "a.png", *SMALL), sentence, "-m FILE")


@pytest.mark.slow
def test_a_page_says_what_only_xl_is_told(run, named, tmp_path):
    told = ("--prompt-2", "<b>oil", "--negative-prompt-2", "fog", "--original-size", "32x48", "--crop", "3,4")
    words = ("explain", "a cat", *SIZE, "--no-attention", "-o", "e.html", *SMALL)
    code, _, err = run(*words, "-m", named["sdxl"], *told)
    assert code == 0, err
    page = (tmp_path / "e.html").read_text()
    for value in ("&lt;b&gt;oil", "32x48", "3, 4"):
        assert f"<dd>{value}</dd>" in page
    assert "for the empty prompt (the second text encoder reads “fog”)" in page
    code, _, err = run(*words, "-m", named["sdxl-refiner"], "--aesthetic-score", "4")
    assert code == 0, err
    assert "<dd>4 and 2.5</dd>" in (tmp_path / "e.html").read_text()
    refused(run(*words, "-m", named["sdxl"], "--refiner", "x"), "A page shows one model: leave it out.")


@pytest.mark.slow
def test_a_vae_for_other_latents_is_said(run, named, tmp_path):
    convert(named["sdxl"], tmp_path / "xl", layout="diffusers", hash_source=False)
    settings = tmp_path / "xl/vae/config.json"
    settings.write_text(settings.read_text().replace("0.13025", "0.18215"))
    code, _, err = run("txt2img", "a cat", "-m", "xl", *SIZE, *SMALL)
    assert code == 0
    assert "xl: its latents have the scale 0.18215, those of Stable Diffusion XL 0.13025: colours may be off." in err


@pytest.mark.slow
def test_a_vae_that_overflows_in_half_precision_decodes_in_fp32(run, named, tmp_path):
    """As that of XL 1.0 does: the picture is the one of a VAE in fp32."""
    state = load_file(named["sdxl"])
    weight = state["first_stage_model.decoder.conv_in.weight"]
    weight *= 6e4 / weight.abs().max()  # which fp16 can hold, but not what they make of latents
    save_file(state, tmp_path / "xl.safetensors")
    code, lines, err = run("txt2img", "a cat", "-m", "xl.safetensors", *SIZE, *SMALL, "--precision", "fp16")
    assert code == 0, err
    assert "retrying in fp32; the network stays in fp32" in err
    assert settings_of(lines[0])["precision"] == {**dict.fromkeys(PARTS, "fp16"), "vae": "fp32"}
    with Image.open(lines[0]) as picture:
        assert np.asarray(picture).std() > 1


def test_the_web_uis_switch_is_a_share_of_the_steps():
    line = "Steps: 30, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64, Refiner: xl_refiner [7440042bbd], "
    found = settings_in(f"a cat\n{line}Refiner switch at: 0.8, Version: v1.9.4")
    assert (found.settings["switch_at"], found.settings["switch_by"]) == (0.8, "steps")
    assert found.made_with["refiner"] == {"name": "xl_refiner", "sha256": "7440042bbd"}
