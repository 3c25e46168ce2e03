"""Lines of --from-file: which are prompts, which JSON, which flags as in the web UI; and files without an end."""

import os
import threading
import time

import pytest
from conftest import refused

from sd.app.cli import prompt_files
from sd.app.cli.batch_files import read_batch_file
from sd.app.cli.img2img import parser as img2img_parser
from sd.app.cli.txt2img import parser


@pytest.fixture
def lines(tmp_path):
    """What a file with this text means: the settings of each line."""

    def read(text, flags=parser):
        (tmp_path / "jobs.txt").write_text(text)
        return [line.settings for line in read_batch_file(str(tmp_path / "jobs.txt"), flags())]

    return read


@pytest.mark.parametrize(
    "line",
    ["{red|blue} cat", "{ a | b }", "{2$$a|b}", "{x: y} cat", "[a:b:0.5]", "[1, 2]", "(a:1.2)", '"quoted"',
     "-5 degrees", "a cat --ar 16:9", "a -- b", "{cat}"],
)  # fmt: skip
def test_a_line_that_is_neither_json_nor_flags_is_a_prompt(lines, line):
    assert lines(line) == [{"prompt": line}]


@pytest.mark.parametrize("line", ['{"prompt": "a"}', ' { "prompt": "a" } ', "--prompt a", '--prompt="a"'])
def test_json_and_flags_are_settings(lines, line):
    assert lines(line) == [{"prompt": "a"}]


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ('--prompt "a cat" --steps 20', {"prompt": "a cat", "steps": 20}),
        ("--prompt a cat on a mat --seed -1", {"prompt": "a cat on a mat"}),
        ('--negative_prompt "b, c" --prompt "a"', {"prompt": "a", "negative_prompt": "b, c"}),
        ('--prompt "a" --cfg_scale 7.5 --sampler_name "Euler a" --width 512 --height 768',
         {"prompt": "a", "guidance_scale": 7.5, "sampler": "Euler a", "width": 512, "height": 768}),
        ('--prompt "a" --tiling true', {"prompt": "a", "tile": "xy"}),
        ('--prompt "a" --tiling false', {"prompt": "a", "tile": ""}),
        ('--prompt "a" --tile x', {"prompt": "a", "tile": "x"}),
        ('--prompt "a" --tile --seed 5', {"prompt": "a", "tile": "xy", "seed": 5}),
        ('--prompt "a" --subseed 5 --subseed_strength 0.1', {"prompt": "a", "vary_seed": 5, "vary": 0.1}),
        ('--prompt "a" -n "b" -W 64 --steps=3', {"prompt": "a", "negative_prompt": "b", "width": 64, "steps": 3}),
        ('--prompt "a" --plain-prompts', {"prompt": "a", "plain_prompts": True}),
        (r'--prompt "a \(b\)"', {"prompt": r"a \(b\)"}),
    ],
)  # fmt: skip
def test_a_line_of_the_web_ui_has_settings_of_its_own(lines, line, settings):
    assert lines(line) == [settings]


def test_strength_is_a_setting_of_a_line_where_there_is_a_picture(lines):
    line = '--prompt "a" --denoising_strength 0.5'
    assert lines(line, img2img_parser) == [{"prompt": "a", "strength": 0.5}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('--prompt "a" --restore_faces true', "line 1: --restore_faces is not a setting of a picture here.\n"),
        ('--prompt "a" --stepps 3', "line 1: --stepps is not a setting of a picture here. Did you mean --steps?"),
        ('--prompt "a" --steps many', "line 1: --steps 'many' is not a whole number."),
        ('--prompt "a" --steps', "line 1: --steps needs a value."),
        ('--prompt "a" --n_iter 3', "line 1: --n_iter is the same for all lines. Give --count to the command."),
        ('--prompt "a" --sd_model x', "line 1: --sd_model is the same for all lines. Give -m to the command."),
        ('--prompt "a" --init-img b.png', "line 1: --init-img is the same for all lines. Give --init to the command."),
        ('{"prompt": "a", "depth": "b.png"}', "line 1: depth is the same for all lines. Give --depth to the command."),
        ('--prompt "a" --tile diagonal', "line 1: --tile diagonal does not exist. There are: x, xy, y."),
        ('--prompt "a" --steps 3 --steps 4', "'--steps' sets steps for the second time."),
        ('--prompt "a', "line 1: a quote is opened and not closed."),
        ("--steps 3", 'line 1: no "prompt" given.'),
        ("{prompt: a}", 'line 1: JSON has its keys in double quotes: {"prompt": ...}.'),
        ("{'prompt': 'a', 'seed': 3}", "line 1: JSON has its keys in double quotes"),
        ('{"prompt": "a"', "line 1: not a JSON object"),
        ("{}", 'line 1: no "prompt" given.'),
        ("a\n" + "b" * 100_001, "line 2: 100001 characters; a line has at most 100000."),
    ],
)  # fmt: skip
def test_a_line_that_makes_no_sense_is_refused(run, tmp_path, line, said):
    (tmp_path / "jobs.txt").write_text(line)
    refused(run("txt2img", "--from-file", "jobs.txt"), said)


@pytest.mark.parametrize("flag", ["--from-file", "--prompt-file"])
def test_a_file_without_an_end_is_refused(run, flag, monkeypatch):
    monkeypatch.setattr(prompt_files, "LARGEST_FILE", 1 << 20)
    refused(run("txt2img", flag, "/dev/zero"), f"{flag} /dev/zero is longer than 1 MB.")
    with open("/dev/zero") as zeros:
        monkeypatch.setattr("sys.stdin", zeros)
        refused(run("txt2img", flag, "-"), f"{flag} - is longer than 1 MB.")


def test_a_prompt_file_may_not_be_a_book(run, tmp_path):
    (tmp_path / "book.txt").write_text("a " * 60_000)
    refused(run("txt2img", "--prompt-file", "book.txt"), "has 119999 characters; a prompt has at most 100000.")
    refused(run("tokens", "--prompt-file", "book.txt"), "has 119999 characters; a prompt has at most 100000.")


def test_a_pipe_is_read_if_somebody_writes_to_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_files, "PATIENCE", 0.3)
    os.mkfifo(tmp_path / "pipe")
    refused(
        run("txt2img", "--from-file", "pipe"), "--from-file pipe is a pipe that nobody has written to for 0.3 seconds."
    )
    monkeypatch.setattr(prompt_files, "PATIENCE", 20)

    def write():
        with open(tmp_path / "pipe", "w") as pipe:
            pipe.write("a\n")
            pipe.flush()
            time.sleep(0.3)
            pipe.write("b\n")

    writer = threading.Thread(target=write)
    writer.start()
    assert [line.settings["prompt"] for line in read_batch_file(str(tmp_path / "pipe"), parser())] == ["a", "b"]
    writer.join()
