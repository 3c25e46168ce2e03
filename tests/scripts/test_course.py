"""The course in docs/course: its code runs as shown, what it prints is what the text says, and its figures are ours."""

import contextlib
import io
import re
import shlex
import sys
import tokenize
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import course_adapters
import course_pictures
import course_plots
import draw_course
import draw_denoising
import numpy as np
import pytest
import torch
from adapters import lora, lora_shapes
from conftest import TINY
from PIL import Image
from safetensors.torch import save_file

import sd
from sd.app.cli import main

ROOT = Path(__file__).parents[2]
COURSE = ROOT / "docs" / "course"
CHAPTERS = sorted(COURSE.glob("[0-9]*-*.md"), key=lambda page: int(page.name.partition("-")[0]))
PAGES = [COURSE / "README.md", *CHAPTERS]
INDEXES = [COURSE / "glossary.md", COURSE / "equations.md"]
BY_TIME = [pytest.param(page, marks=[pytest.mark.slow] * ("training" in page.stem)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SHOWN = "# -> "  # in front of a line that the code above it prints; "..." in it stands for anything
LARGEST_FIGURE, LARGEST_TOGETHER = 150_000, 2_000_000  # bytes


class Block(NamedTuple):
    language: str
    line: int  # of its first line in the page, from 1
    code: str


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    return [Block(match[1], text[: match.start(2)].count("\n") + 1, match[2]) for match in FENCE.finditer(text)]


def prose_of(page):
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def figures_in(page):
    return [Path(link).name for link in LINK.findall(prose_of(page)) if link.startswith("figures/")]


def shown_in_python(code):
    comments = (
        token.string for token in tokenize.generate_tokens(io.StringIO(code).readline) if token.type == tokenize.COMMENT
    )
    return [comment.removeprefix(SHOWN) for comment in comments if comment.startswith(SHOWN)]


def fits(shown, printed):
    """Whether printed lines are the shown ones."""
    return len(shown) == len(printed) and all(
        re.fullmatch(".+".join(map(re.escape, line.split("..."))), real.rstrip())
        for line, real in zip(shown, printed, strict=True)
    )


def run_python(block, page, namespace):
    output = io.StringIO()
    numbered = "\n" * (block.line - 1) + block.code  # so that a traceback shows lines of the page
    with contextlib.redirect_stdout(output), torch.enable_grad():
        exec(compile(numbered, str(page), "exec"), namespace)
    shown, printed = shown_in_python(block.code), output.getvalue().splitlines()
    assert fits(shown, printed), f"{page.name}, line {block.line}: shown {shown}, printed {printed}"


def commands_in(code):
    """The commands of a block, each with the lines of output that are shown below it."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        if line.startswith(SHOWN):
            found[-1][1].append(line.removeprefix(SHOWN))
        elif words := shlex.split(line, comments=True):
            found.append((words, []))
    return found


def run_shell(block, page):
    for words, shown in commands_in(block.code):
        where = f"{page.name}, line {block.line}: {shlex.join(words)}"
        assert words[0] == "sd", where
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            code = main(words[1:])
        printed = output.getvalue().splitlines()
        assert code == 0, where
        assert not shown or fits(shown, printed), f"{where}: shown {shown}, printed {printed}"


@pytest.mark.slow
@pytest.mark.parametrize("page", BY_TIME, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_and_prints_as_shown(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    blocks = [block for block in blocks_of(page) if block.language in ("python", "sh")]
    assert sum(block.language == "python" for block in blocks) >= (2 if page in CHAPTERS else 1)
    for block in blocks:
        if block.language == "python":
            run_python(block, page, namespace)
        else:
            run_shell(block, page)


def test_shown_output_must_be_printed():
    page = Path("page.md")
    run_python(Block("python", 1, 'print("a b")  # -> a b\nprint(1)\n# -> 1\n'), page, {})
    run_python(Block("python", 1, "print(1.25)  # -> 1...\n"), page, {})
    for code in ("print(1)  # -> 2\n", "print(1)\n", "x = 1  # -> 1\n", "print(25)  # -> 1...\n"):
        with pytest.raises(AssertionError, match="shown"):
            run_python(Block("python", 1, code), page, {})


def test_there_are_twelve_chapters_in_the_order_of_the_first_page():
    numbers = [page.name.partition("-")[0] for page in CHAPTERS]
    assert numbers == [str(number) for number in range(1, 13)]
    numbered = re.findall(r"^(\d+)\. \[.*?\]\((.*?)\)", prose_of(COURSE / "README.md"), re.MULTILINE)
    assert numbered == list(zip(numbers, (page.name for page in CHAPTERS), strict=True))
    for page, following in pairwise(CHAPTERS):
        assert LINK.findall(prose_of(page))[-1] == following.name
    for page in PAGES:
        assert {block.language for block in blocks_of(page)} <= {"python", "sh", "text", "console"}, page


def anchors_of(page):
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_figures_shown_are_those_that_the_script_draws_and_they_are_small():
    sizes = {path.name: path.stat().st_size for path in (COURSE / "figures").iterdir()}
    shown = sorted(name for page in CHAPTERS for name in figures_in(page))
    assert shown == sorted(sizes) == sorted(draw_course.FIGURES)
    assert max(sizes.values()) < LARGEST_FIGURE, sizes
    assert sum(sizes.values()) < LARGEST_TOGETHER, sizes


@pytest.mark.slow
def test_figures_without_a_model_are_the_same_bytes_each_time():
    cheap = [name for name, figure in draw_course.FIGURES.items() if figure.needs == "nothing"]
    assert len(cheap) >= 5
    for name in cheap:
        draw = draw_course.FIGURES[name].draw
        assert draw() == draw(), name


def numbers_in(svg):
    return [float(number) for number in re.findall(rb"-?\d+\.\d+", svg)]


def pixels_of(data):
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"), dtype=float)


def test_a_stale_picture_or_plot_is_noticed():
    figures = COURSE / "figures"
    for name, other in (("strengths.png", "lora-strengths.png"), ("noise-levels.svg", "sampler-errors.svg")):
        drawn = (figures / name).read_bytes()
        assert is_up_to_date(drawn, drawn)
        assert not is_up_to_date(drawn, (figures / other).read_bytes())


def is_up_to_date(committed, drawn):
    """Whether two figures are the same up to the rounding of another processor."""
    if drawn.startswith(b"<?xml"):
        old, new = numbers_in(committed), numbers_in(drawn)
        return len(old) == len(new) and np.abs(np.subtract(old, new)).max() < 2  # points of 1/72 inch
    old, new = pixels_of(committed), pixels_of(drawn)
    return old.shape == new.shape and np.abs(old - new).mean() < 3


@pytest.fixture(scope="module")
def redrawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    assert draw_course.main(["--out", str(folder)]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, figure in draw_course.FIGURES.items() if figure.needs != "tuned"])
def test_a_committed_figure_is_what_the_script_draws_from_the_embedded_model(name, redrawn):
    """If not: `make docs`."""
    assert is_up_to_date((COURSE / "figures" / name).read_bytes(), (redrawn / name).read_bytes())


@pytest.mark.slow
def test_the_first_picture_of_the_readme_is_what_the_script_draws():
    with torch.no_grad():
        drawn = draw_denoising.denoising(sd.load(device="cpu", precision="fp32"))
    assert is_up_to_date((ROOT / "docs/denoising.png").read_bytes(), drawn)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, figure in draw_course.FIGURES.items() if figure.needs == "model"])
def test_figures_of_a_model_can_be_drawn_from_any_model(name, model, monkeypatch):
    monkeypatch.setattr(course_pictures, "STEPS", 2)
    small = replace(model, config=replace(model.config, native_size=64))
    data = draw_course.FIGURES[name].draw(small)
    if name.endswith(".svg"):
        assert ElementTree.fromstring(data).tag == "{http://www.w3.org/2000/svg}svg"
    else:
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.width > 4 * course_pictures.CELL


@pytest.mark.slow
def test_the_figures_of_adapters_are_drawn_from_a_lora_and_a_fine_tune(model, tiny_ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(course_pictures, "STEPS", 2)
    monkeypatch.setattr(course_adapters, "PROMPTS", course_adapters.PROMPTS[:1])
    path = lora(tmp_path / "crescent.safetensors", lora_shapes(rank=4))
    loaded = sd.load(tiny_ckpt, device="cpu", precision="fp32")
    small = replace(loaded, config=replace(loaded.config, native_size=64))
    save_file({"emb_params": torch.ones(1, TINY.text_encoder.width)}, tmp_path / "pinstripe.safetensors")
    for draw in (course_adapters.lora_strengths, course_adapters.word_and_lora):
        with Image.open(io.BytesIO(draw(small, tmp_path))) as picture:
            assert picture.width > 4 * course_pictures.CELL
        assert not small.adapters
        assert not small.words
    small.apply([path])
    values = course_adapters.spectra(model, small)
    assert len(values["fine-tune's difference"]) == 192
    assert all((s[:4] > 1e-4).all() and (s[4:] < 1e-4 * s[0]).all() for s in values["fine-tune's difference"])
    assert ElementTree.fromstring(course_adapters.singular_values(model, small)).tag.endswith("svg")


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("training-loss.svg", "loss.csv"),
        ("lora-strengths.png", "crescent.safetensors"),
        ("singular-values.svg", "--tuned"),
    ],
)
def test_what_a_figure_lacks_is_reported_in_one_line(name, missing, tiny_ckpt, tmp_path, capsys):
    folders = ["--training", str(tmp_path / "none"), "--adapters", str(tmp_path / "none")]
    assert draw_course.main(["--out", str(tmp_path), "--model", str(tiny_ckpt), *folders, name]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert missing in line
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_is_reported_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_course.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == ["Plots need matplotlib. Install it: pip install '.[plots]'"]
    assert not list(tmp_path.iterdir())


def test_the_training_figures_are_drawn_from_the_logs_and_the_sheets(tmp_path):
    training = tmp_path / "training"
    for stage, colour in zip(course_plots.UNET_STAGES, ("red", "lime", "green", "blue"), strict=True):
        (training / stage).mkdir(parents=True)
        rows = [f"{step},{1 / step},0.001,0.5,0.1" for step in range(1, 200)]
        (training / stage / "loss.csv").write_text(
            "\n".join(["step,loss,learning_rate,gradient_norm,seconds", *rows]) + "\n"
        )
        (training / stage / "prompts.txt").write_text("a red circle\n" * 4)
        Image.new("RGB", (512, 512), colour).save(training / stage / "samples-000199.png")
    out = tmp_path / "figures"
    names = ["training-loss.svg", "training-samples.png"]
    assert draw_course.main(["--out", str(out), "--training", str(training), *names]) == 0
    assert sorted(path.name for path in out.iterdir()) == names
    with Image.open(out / "training-samples.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 16)}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255)} <= colours
