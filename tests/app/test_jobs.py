"""Runs of pictures without a command line: what a page, a server or a worker does."""

import ast
import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import settings_of
from PIL import Image

import sd
from sd.app.errors import UsageError
from sd.app.jobs.model import run_options
from sd.app.jobs.plan import plan, with_seeds
from sd.app.jobs.request import Events, JobRequest, Line, ModelRequest
from sd.app.jobs.run import make_pictures
from sd.pipeline.image.input_settings import Expansion, InputSettings
from sd.pipeline.settings import SettingError

JOBS = sorted((Path(__file__).parents[2] / "sd" / "app" / "jobs").glob("*.py"))
SETTINGS = {"width": 64, "height": 64, "steps": 2, "seed": 7}


def request_for(model, out, *prompts, settings=SETTINGS, **options):
    lines = tuple(Line({"prompt": prompt}) for prompt in prompts)
    model = ModelRequest(file=model, precision="fp32")
    return JobRequest(task="text to picture", model=model, lines=lines, settings=settings, out=str(out), **options)


class Noted(Events):
    """Keeps what a run reports."""

    def __init__(self):
        self.notes, self.files = [], []

    def note(self, text):
        self.notes.append(text)

    def written(self, event, path, **facts):
        self.files.append((event, path.name, facts.get("seed")))


@pytest.mark.slow
def test_a_request_from_another_process_makes_the_pictures_of_the_command(run, tiny_ckpt, tmp_path, capsys):
    request = request_for(tiny_ckpt, tmp_path / "a", "a horse", "a cat", batch_size=2, grid=True)
    events = Noted()
    make_pictures(pickle.loads(pickle.dumps(request)), events)
    assert capsys.readouterr() == ("", "")
    pictures = [("picture", "00001-7.png", 7), ("picture", "00002-8.png", 8)]
    assert events.files == [*pictures, ("grid", "grid-00001-7.png", None)]
    assert events.notes == ["tiny.ckpt: sd-v1, model weights (--weights ema takes the others), fp32 on cpu"]
    small = ["-W", 64, "-H", 64, "--steps", 2, "--precision", "fp32", "-m", tiny_ckpt]
    _, (path,), _ = run("txt2img", "a horse", *small, "-s", 7)
    assert settings_of(path) == settings_of(tmp_path / "a" / "00001-7.png")
    alone, batched = (Image.open(each).tobytes() for each in (path, tmp_path / "a" / "00001-7.png"))
    assert max(abs(a - b) for a, b in zip(alone, batched, strict=True)) <= 1


def test_a_request_is_plain_values_and_paths(tmp_path):
    inputs = InputSettings(expand=Expansion(left=8))
    request = request_for("x.ckpt", "out/", "a", init=tmp_path / "i.png", inputs=inputs, save_steps="vae")
    data = json.loads(json.dumps(asdict(request), default=str))
    assert data["inputs"]["expand"]["left"] == 8
    assert data["lines"] == [{"settings": {"prompt": "a"}, "where": ""}]


def test_a_run_is_silent_unless_a_face_shows_its_events(tiny_ckpt, tmp_path, capsys):
    make_pictures(request_for(tiny_ckpt, tmp_path / "x.png", "a", save_steps="fast"), Events())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-step001.png", "x-step002.png", "x.png"]
    assert Image.open(tmp_path / "x.png").size == (64, 64)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 0}, SettingError, "count 0 is out of range"),
        ({"grid_columns": 0}, SettingError, "grid_columns 0 is out of range"),
        ({"count": 99_999_999}, UsageError, "99999999 pictures are asked for"),
        ({"save_steps_as": "webp"}, UsageError, "does nothing without"),
        ({"settings": {**SETTINGS, "vary_seed": 1}}, UsageError, "does nothing without --vary"),
        ({"settings": {**SETTINGS, "strength": 0.5}}, UsageError, "without a picture to begin with"),
        ({"settings": {**SETTINGS, "steps": 0}}, SettingError, "steps 0 is out of range"),
    ],
)
def test_a_wrong_request_is_refused_before_weights_are_read(tiny_ckpt, tmp_path, monkeypatch, options, error, message):
    monkeypatch.setattr("sd.runtime.loading.from_checkpoint", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(error, match=message):
        make_pictures(request_for(tiny_ckpt, tmp_path / "x.png", "a", **options), Events())
    assert not list(tmp_path.iterdir())


def test_seeds_count_on_and_are_drawn_once():
    lines = (Line({"prompt": "a"}), Line({"prompt": "b", "seed": 40}), Line({"prompt": "c", "vary": 0.1}))
    request = JobRequest(task="text to picture", model=ModelRequest(file=Path("x")), lines=lines, count=2, out="x/")
    seeded = with_seeds(request)
    assert with_seeds(seeded) == seeded
    seed, vary_seed = seeded.settings["seed"], seeded.settings["vary_seed"]
    jobs = plan(seeded, native=64)
    assert [job.seed for job in jobs] == [seed, seed + 1, 40, 41, seed + 4, seed + 4]
    assert [job.vary_seed for job in jobs] == [None] * 4 + [vary_seed + 4, vary_seed + 5]


def test_a_second_pass_begins_near_the_native_size_whether_a_flag_or_a_line_asks():
    """Not near 512 pixels: 192x192 in two passes would then be refused for the embedded model."""
    for common, own in (({"hires": "192x192"}, {}), ({}, {"hires": "192x192"})):
        request = request_for("x", "x/", settings={"seed": 1, **common})
        (job,) = plan(replace(request, lines=(Line({"prompt": "a", **own}),)), native=128)
        assert (job.size, [each.size for each in job.passes()]) == ((192, 192), [(128, 128), (192, 192)])


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_jobs_know_no_command_line(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in modules if name in ("argparse", "sys", "tqdm") or name.startswith("sd.app.cli")]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in ("print", "input")]


@pytest.mark.parametrize(("like", "told"), [("a.png", ["--low-memory, as a.png was made"]), ("", [])])
def test_options_of_an_earlier_picture_are_told_once_and_not_again_of_its_refiner(like, told):
    events = Noted()
    request = ModelRequest(file=Path("x.ckpt"), like=like, made_with={"run": {"low_memory": True}})
    assert run_options(request, torch.device("cpu"), events).low_memory
    assert events.notes == told


def test_a_model_may_say_its_guidance_scale_for_pictures_that_ask_for_none(run, tiny_state, tmp_path):
    torch.save({"state_dict": tiny_state, "guidance_scale": 3.0}, tmp_path / "m.ckpt")
    common = ["txt2img", "a cat", "-m", "m.ckpt", "--seed", 5, "--steps", 1, "-W", 64, "-H", 64]
    _, (own,), _ = run(*common, "-o", "own.png")
    _, (asked,), _ = run(*common, "-g", 7.5, "-o", "asked.png")
    assert [settings_of(path)["guidance_scale"] for path in (own, asked)] == [3.0, 7.5]
    model = sd.load(tmp_path / "m.ckpt")
    (picture,) = model.txt2img("a cat", seed=5, steps=1, width=64, height=64)
    assert picture.tobytes() == Image.open(own).tobytes() != Image.open(asked).tobytes()
    first, other = (model.settings_for("a cat", seed=5, **given) for given in ({}, {"width": 64, "guidance_scale": 2}))
    assert (first.width, first.height, first.guidance_scale) == (512, 512, 3)
    assert (other.width, other.height, other.guidance_scale) == (64, 512, 2)
    assert "  guidance     3, where no other is asked for" in run("inspect", "m.ckpt")[1]
