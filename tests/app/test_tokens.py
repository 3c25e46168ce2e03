"""`sd tokens`: what it prints."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sd.app.cli.tokens import step_ranges, width
from sd.text.tokenizer import Tokenizer


@pytest.fixture
def tokens(run):
    return lambda *arguments: run("tokens", *arguments)


def test_the_strip_has_tokens_ids_and_weights_below_one_another(tokens):
    # corgi is one token; lighthouses are two
    assert tokens("a (red:1.25) corgi, [Hokusai]") == (
        0,
        [
            "chunk 1 of 1: 7 tokens of 75",
            "  a    red    corgi  ,    ho+      ku+      sai",
            "  320  736    31320  267  606      1836     10886",
            "       x1.25              x0.9091  x0.9091  x0.9091",
        ],
        "",
    )


def test_the_example_in_the_documentation_is_what_is_printed(tokens):
    page = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text(encoding="utf-8")
    command, *printed = page.split("```console\n")[1].split("```")[0].splitlines()
    name, verb, prompt = shlex.split(command.removeprefix("$ "))
    assert (name, verb) == ("sd", "tokens")
    assert tokens(prompt)[1] == printed


def test_weights_have_no_row_where_there_are_none(tokens):
    assert tokens("(a)", "--plain-prompts")[1] == ["chunk 1 of 1: 3 tokens of 75", "  (    a    )", "  263  320  264"]
    assert tokens("")[1] == ["chunk 1 of 1: 0 tokens of 75"]


@pytest.mark.parametrize("prompt", ["a " * 200, "灯台 " * 40, "x" * 3000, "🏯é" * 40, "\x1b[2J evil\u202e"])
def test_lines_fit_80_columns_and_cannot_write_to_the_terminal(tokens, prompt):
    _, out, _ = tokens(prompt)
    assert len(out) >= 3
    assert max(map(width, out)) <= 80
    assert not any(character in line for line in out for character in "\x1b\u202e")


def test_every_form_of_a_changing_prompt_is_shown_with_its_steps(tokens):
    first = ["steps 1-2 of 4: a c", "chunk 1 of 1: 2 tokens of 75", "  a    c", "  320  322"]
    second = ["steps 3-4 of 4: b c", "chunk 1 of 1: 2 tokens of 75", "  b    c", "  321  322"]
    assert tokens("[a:b:0.5] c", "--steps", 4)[1] == [*first, "", *second]


def test_steps_are_told_as_ranges():
    assert step_ranges([1]) == "step 1"
    assert step_ranges([1, 2, 3, 7, 9, 10]) == "steps 1-3, 7, 9-10"
    assert step_ranges(range(1, 31, 2)) == "steps 1, 3, 5, 7, 9, 11, 13, 15 ..."


def test_json_has_everything(tokens):
    code, (line,), _ = tokens("a [(red:1.5)|b] 🏯", "--steps", 3, "--json")
    told = json.loads(line)
    assert code == 0
    assert (told["event"], told["prompt"], told["steps"]) == ("tokens", "a [(red:1.5)|b] 🏯", 3)
    first, second = told["texts"]
    assert (first["text"], first["steps"]) == ("a (red:1.5) 🏯", [1, 3])
    assert (second["text"], second["steps"]) == ("a b 🏯", [2])
    (chunk,) = first["chunks"]
    expected = [(320, "a ", 1.0), (736, "red ", 1.5), (1109, "", 1.0), (363, "🏯 ", 1.0)]
    assert [(token["id"], token["text"], token["weight"]) for token in chunk["tokens"]] == expected
    assert chunk["ids"] == list(Tokenizer().tokenize("a red 🏯").ids)


def test_a_letter_may_be_cut_by_the_end_of_a_chunk(tokens):
    _, (line,), _ = tokens("a " * 74 + "🏯", "--json")
    first, second = json.loads(line)["texts"][0]["chunks"]
    assert [first["tokens"][-1]["text"], second["tokens"][0]["text"]] == ["", "🏯 "]


def test_the_prompt_may_be_in_a_file(tokens, tmp_path):
    (tmp_path / "prompt.txt").write_text(" a \n")
    assert tokens("--prompt-file", tmp_path / "prompt.txt") == tokens("a")


def test_torch_is_not_needed():
    code = "import sys; from sd.app.cli import main; main(['tokens', 'a (b:1.2)']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
