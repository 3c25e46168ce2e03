"""`sd explain` as a user meets it."""

import base64
import hashlib
import io
import json
from pathlib import Path

import pytest
from browser import data_of
from PIL import Image

SMALL = ["-W", "64", "-H", "64", "--steps", "2", "--seed", "7"]


@pytest.fixture
def explain(run, tiny_ckpt):
    return lambda *arguments: run("explain", *arguments, "-m", tiny_ckpt, *SMALL)


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


def test_a_page_is_overwritten_if_asked(explain):
    Path("page.html").touch()
    assert explain("b", "-o", "page.html", "--no-attention", "-q", "--force")[::2] == (0, "")
    assert data_of(Path("page.html").read_text(encoding="utf-8"))["settings"]["prompt"] == "b"
