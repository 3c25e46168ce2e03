"""`sd explain` as a user meets it."""

import base64
import hashlib
import io
import json
from pathlib import Path

import make_checkpoint
import numpy as np
import pytest
from browser import data_of
from conftest import refused
from PIL import Image

from sd.app.jobs.course import ROOT, course_beside
from sd.config import SD_V1_DEPTH, SD_V1_EDIT, SD_V1_INPAINTING, SD_V2_DEPTH

SMALL = ["-W", "64", "-H", "64", "--steps", "2", "--seed", "7"]


@pytest.fixture
def explain(run, tiny_ckpt):
    return lambda *arguments: run("explain", *arguments, "-m", tiny_ckpt, *SMALL)


@pytest.mark.slow
def test_the_picture_in_the_page_is_the_one_of_txt2img(explain, run, tiny_ckpt):
    code, (path,), err = explain("a horse", "-n", "blurry")
    assert (code, path) == (0, "outputs/explain-7.html")
    assert "tiny.ckpt: sd-v1" in err
    data = data_of(Path(path).read_text(encoding="utf-8"))
    _, (made,), _ = run("txt2img", "a horse", "-n", "blurry", "-m", tiny_ckpt, *SMALL)
    inside = Image.open(io.BytesIO(base64.b64decode(data["picture"]["uri"].partition(",")[2])))
    assert inside.tobytes() == Image.open(made).tobytes()
    assert inside.text == Image.open(made).text


@pytest.mark.slow
def test_comparisons_differ_in_what_was_asked_for(explain):
    code, (line,), _ = explain(
        "a horse", "--compare", "guidance=1,7.5", "--compare", "sampler=ddim,Euler a", "--compare", "prompt=a cat, red",
        "--compare", "seed=8", "--no-attention", "--json", "-o", "page.html",
    )  # fmt: skip
    event = json.loads(line)
    text = Path("page.html").read_bytes()
    assert (code, event["event"], event["path"], event["seed"]) == (0, "explanation", "page.html", 7)
    assert (event["bytes"], event["sha256"]) == (len(text), hashlib.sha256(text).hexdigest())
    data = data_of(text.decode())
    assert data["resolutions"] == []
    found = {one["name"]: [run["label"] for run in one["runs"]] for one in data["comparisons"]}
    prompts = ["a horse", "a cat, red"]
    assert found == {"guidance": ["1", "7.5"], "sampler": ["ddim", "euler_a"], "prompt": prompts, "seed": ["7", "8"]}
    samplers = [run["settings"] for run in data["comparisons"][1]["runs"]]
    expected = [("ddim", "leading", 0.0), ("euler_a", "linspace", 1.0)]
    assert [(one["sampler"], one["schedule"], one["eta"]) for one in samplers] == expected


@pytest.mark.slow
def test_a_page_is_overwritten_if_asked(explain):
    Path("page.html").touch()
    assert explain("b", "-o", "page.html", "--no-attention", "-q", "--force")[::2] == (0, "")
    assert data_of(Path("page.html").read_text(encoding="utf-8"))["settings"]["prompt"] == "b"


@pytest.mark.parametrize(
    ("page", "course"),
    [
        ("outputs/page.html", "../docs/course"),
        ("a/b/page.html", "../../docs/course"),
        ("page.html", "docs/course"),
        ("../page.html", None),
    ],
)
def test_chapters_are_linked_from_pages_in_the_checkout(page, course):
    assert course_beside(ROOT / page) == course


BEGUN = {  # the command that makes the same picture, the model's family, its own flags, and how many pictures are given
    "image to image": ("img2img", None, ["--strength", "0.7"], 1),
    "depth, estimated": ("depth2img", SD_V2_DEPTH, [], 2),
    "depth, given": ("depth2img", SD_V1_DEPTH, ["--depth", "map.png", "--invert-depth"], 2),
    "edit": ("edit", SD_V1_EDIT, [], 1),
    "edit, two predictions": ("edit", SD_V1_EDIT, ["--image-guidance", "1"], 1),
}


@pytest.fixture
def pictures(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(levels).crop((0, 0, 64, 60)).save(tmp_path / "in.png")
    Image.fromarray(levels[:60, :, 0]).save(tmp_path / "map.png")


def saved(family, path):
    make_checkpoint.save_original(path, make_checkpoint.made_up_state_dict(make_checkpoint.tiny(family)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("command", "family", "flags", "given"), BEGUN.values(), ids=BEGUN)
def test_a_picture_to_begin_with_is_on_the_page(run, tiny_ckpt, tmp_path, pictures, command, family, flags, given):
    checkpoint = saved(family, tmp_path / "x.ckpt") if family else tiny_ckpt
    common = ["a horse", "--init", "in.png", "-m", checkpoint, *flags, *SMALL[:-3], "3", "--seed", "7"]
    code, (path,), err = run("explain", *common, "--no-attention")
    assert code == 0, err
    _, (made,), _ = run(command, *common)
    data = data_of(Path(path).read_text(encoding="utf-8"))
    inside = Image.open(io.BytesIO(base64.b64decode(data["picture"]["uri"].partition(",")[2])))
    assert (inside.tobytes(), inside.text) == (Image.open(made).tobytes(), Image.open(made).text)
    assert len(data["given"]) == given
    assert all(name in Path(path).read_text(encoding="utf-8") for name in [each["name"] for each in data["given"]])
    assert [step["number"] for step in data["steps"]] == [1, 2, 3][: 3 if command == "edit" else 2]
    three = command == "edit" and not flags
    assert all(("without_picture" in step["pictures"]) == three for step in data["steps"])


REFUSED = {
    "no picture for depth": (SD_V1_DEPTH, [], "takes 5 channels (latents and a depth map). Give it a picture with"),
    "no picture to edit": (SD_V1_EDIT, [], "takes 8 channels"),
    "no depth network": (SD_V1_DEPTH, ["--init", "in.png"], "Give a depth map with --depth IMAGE."),
    "inpainting": (SD_V1_INPAINTING, ["--init", "in.png"], "sd explain shows no inpainting"),
    "strength while editing": (SD_V1_EDIT, ["--init", "in.png", "--strength", "0.5"], "editing begins at pure noise"),
    "image guidance": (
        None,
        ["--init", "in.png", "--image-guidance", "2"],
        "--image-guidance goes with --init and",
    ),
    "strength alone": (None, ["--strength", "0.5"], "strength does nothing without a picture to begin with"),
    "depth for another model": (None, ["--init", "in.png", "--depth", "map.png"], "--depth goes with --init and a"),
    "nothing to invert": (None, ["--init", "in.png", "--invert-depth"], "--invert-depth is for a depth map"),
    "no step": (None, ["--init", "in.png", "--strength", "0"], "--strength 0 runs no step"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "flags", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_with_the_model_is_refused(run, tiny_ckpt, tmp_path, pictures, family, flags, problem):
    checkpoint = saved(family, tmp_path / "x.ckpt") if family else tiny_ckpt
    refused(run("explain", "a horse", "-m", checkpoint, *flags, *SMALL), problem)
