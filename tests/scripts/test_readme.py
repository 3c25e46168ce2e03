"""README and docs: links lead somewhere, commands and flags exist, what is shown runs (for the course: test_course)."""

import importlib
import os
import re
import shlex
from pathlib import Path

import make_checkpoint
import pytest
from adapters import lora, lora_shapes
from PIL import Image
from safetensors.torch import save_file
from test_course import FENCE, INDEXES, LINK, ROOT, anchors_of, blocks_of, commands_in, prose_of, run_python
from test_course import PAGES as COURSE_PAGES

from sd.app.cli import COMMANDS, main
from sd.config import SD_V1_EDIT, SDXL, SDXL_REFINER

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "weights/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
RUN = ("README.md", "docs/commands.md")  # the commands of these run on narrow stand-ins for the reader's files
SPAN = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?:sd|convert|scripts|tests|docs|weights)/[\w./-]*\w")
EDITS = make_checkpoint.tiny(SD_V1_EDIT)
SIZE, STEPS = ["-W", "64", "-H", "64"], ["--steps", "2"]
MAKES = {"txt2img", "img2img", "inpaint", "edit", "explain", "noise"}
# Parsed, but not run: they take long, use the network, or need files that have the names of real ones
ONLY_PARSED = ("sd bench", "sd models", "sd serve", "sd play", "sd export", "v1-5-", "512-depth-", "--expand")
OTHER_TOOLS = (
    "pip",
    "python3",
    "python3.11",
    "source",
    "fuzz/bin/pip",
    "fuzz/bin/python",
    "fuzz/bin/coverage",
    "cat",
    "curl",
)
FLAGS = {
    folder: {flag for path in (ROOT / folder).rglob("*.py") for flag in re.findall(r'"(--[\w-]+)"', path.read_text())}
    for folder in ("sd/app", "scripts")
}


def shell_commands(page):
    """The words of every command in a page's blocks."""
    for block in blocks_of(page):
        if block.language == "sh":
            yield from (words for words, _ in commands_in(block.code))
        elif block.language == "console":
            yield from (shlex.split(line[2:], comments=True) for line in block.code.splitlines() if line[:2] == "$ ")


def check_script(words):
    """A script's file exists, and its flags stand in some script; parsing them would mean to run it."""
    place = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
    assert (ROOT / words[place]).is_file(), words[place]
    own = {word.split("=")[0] for word in words[place:] if word.startswith("--")}
    assert own <= FLAGS["scripts"], own - FLAGS["scripts"]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_parse_and_scripts_exist(page):
    for words in shell_commands(page):
        if words[0] == "sd":
            importlib.import_module(f"sd.app.cli.{words[1]}").parser().parse_args(words[2:])
        elif words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in targets), words
        elif any(word.startswith("scripts/") for word in words):
            check_script(words)
        else:
            assert words[0] in OTHER_TOOLS or "=" in words[0], words


@pytest.mark.parametrize("page", [*PAGES, *COURSE_PAGES, *INDEXES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose_of(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" not in link:
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target), link


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_flags_and_commands_in_the_text_exist(page):
    for span in SPAN.findall(prose_of(page)):
        words = span.split()
        if PATH.fullmatch(span):
            assert (ROOT / span).exists(), span
        if re.match(r"sd [a-z]", span):
            assert words[1] in (*COMMANDS, "help"), span
        if "scripts/" in span and span.startswith("python "):
            check_script(words)
        elif not span.startswith("pip "):
            flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", span))
            assert flags <= FLAGS["sd/app"] | FLAGS["scripts"], span


def test_every_page_is_linked_from_another():
    links = [(page, link.partition("#")[0]) for page in PAGES for link in LINK.findall(prose_of(page))]
    assert set(PAGES[1:]) <= {(page.parent / path).resolve() for page, path in links if path}


def test_pages_that_the_code_names_exist():
    for folder in ("sd", "convert", "scripts", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"docs/[\w/-]+\.md", path.read_text()):
                assert (ROOT / name).is_file(), f"{path}: {name}"


def test_the_readme_can_be_read_in_one_sitting():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 140
    pictures = [ROOT / link for link in re.findall(r"!\[.*?\]\((.*?)\)", FENCE.sub("", text))]
    assert len(pictures) == 2
    assert all(picture.stat().st_size < 400_000 for picture in pictures)


def test_python_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in blocks_of(ROOT / "README.md") if block.language == "python"]
    found = {}
    run_python(block, ROOT / "README.md", found)
    with Image.open("circle.png") as picture:
        assert picture.size == (128, 128)
        assert "parameters" in picture.text
    assert (found["context"].shape, found["prediction"].shape) == ((1, 77, 64), (1, 4, 16, 16))
    assert found["image"].shape == (1, 3, 128, 128)


@pytest.mark.slow
def test_commands_run_on_stand_ins(tmp_path, tiny_ckpt, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.link(tiny_ckpt, "model.ckpt")
    os.link(tiny_ckpt, "a.ckpt")
    os.link(tiny_ckpt, "base.ckpt")
    for name in ("instruct-pix2pix", "ip2p"):
        make_checkpoint.save_original(Path(f"{name}.ckpt"), make_checkpoint.made_up_state_dict(EDITS))
    for name, family in (("xl", SDXL), ("xl-refiner", SDXL_REFINER)):
        state = make_checkpoint.made_up_state_dict(make_checkpoint.tiny(family))
        save_file({key: value.contiguous() for key, value in state.items()}, f"{name}.safetensors")
    for name in ("lora", "detail"):
        lora(Path(f"{name}.safetensors"), lora_shapes())
    Path("weights").mkdir()
    os.link(tiny_ckpt, "weights/a.ckpt")
    Image.new("RGB", (64, 64), "red").save("photo.jpg")
    Image.new("L", (64, 64), "white").save("mask.png")
    Path("prompts.txt").write_text("a lighthouse\na hat\n")
    Path("prompts.jsonl").write_text('{"prompt": "a lighthouse"}\n{"prompt": "a hat"}\n')
    for words in (
        ["txt2img", "a hat", "-m", "model.ckpt", "-o", "picture.png", *SIZE, *STEPS],
        ["convert", "model.ckpt", "b.safetensors"],
        ["convert", "model.ckpt", "tuned.ckpt", "--lora", "lora.safetensors"],
        ["convert", "model.ckpt", "other.vae.pt", "--only", "vae", "--to", "original"],
    ):
        assert main(words) == 0, words
    commands = {shlex.join(words): words for page in RUN for words in shell_commands(ROOT / page) if words[0] == "sd"}
    chosen = [words for text, words in commands.items() if not any(mark in text for mark in ONLY_PARSED)]
    assert len(chosen) >= 20
    for words in chosen:
        small = [*SIZE, *([] if words[1] == "noise" else STEPS)] if words[1] in MAKES else []
        overwrites = words[1] not in ("tokens", "inspect", "diff", "show", "shards") and "--shard-size" not in words
        force = ["--force"] if overwrites else []
        assert main([*words[1:], *small, *force]) == 0, words
    capsys.readouterr()


def test_what_tokens_prints_is_as_shown(capsys):
    (block,) = [block for block in blocks_of(ROOT / "docs" / "prompts.md") if block.language == "console"]
    command, *shown = block.code.splitlines()
    assert main(shlex.split(command)[2:]) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown
