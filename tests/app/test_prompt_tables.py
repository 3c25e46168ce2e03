"""Tables of prompts: .csv, .tsv and .parquet."""

import json

import pytest
from conftest import refused, settings_of

from sd.app.cli.batch_files import read_batch_file, stream_batch_file
from sd.app.cli.txt2img import parser

ROWS = [
    {"prompt": "a cat, on a mat", "seed": 7, "guidance_scale": 3.5, "lora": None, "tile": "x"},
    {"prompt": 'a "dog"\non two lines', "seed": None, "guidance_scale": 4.0, "lora": "style:0.5", "tile": None},
]
SETTINGS = [
    {"prompt": "a cat, on a mat", "seed": 7, "guidance_scale": 3.5, "tile": "x"},
    {"prompt": 'a "dog"\non two lines', "guidance_scale": 4.0, "lora": ["style:0.5"]},
]


def table_of(path, rows):
    """A table written by somebody else's code."""
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
        from pyarrow import Table, parquet

        columns = {name: [row[name] for row in rows] for name in rows[0]}
        parquet.write_table(Table.from_pydict(columns), path)
        return
    separator, lines = "\t" if path.suffix == ".tsv" else ",", [",".join(rows[0])]
    lines[0] = lines[0].replace(",", separator)
    for row in rows:
        texts = ("" if value is None else str(value).replace('"', '""') for value in row.values())
        lines.append(separator.join(f'"{text}"' for text in texts))
    path.write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".CSV"])
@pytest.mark.parametrize("read", [read_batch_file, stream_batch_file])
def test_a_row_is_a_line_with_settings_of_its_own(tmp_path, suffix, read):
    table_of(path := tmp_path / f"prompts{suffix}", ROWS)
    lines = list(read(str(path), parser()))
    assert [line.settings for line in lines] == SETTINGS
    assert lines[0].where.startswith(f"{path}, {'row 1' if suffix == '.parquet' else 'line 2'}: ")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("names", "found"),
    [(["Prompt", "Category"], "prompt"), (["caption", "Seed"], "caption"), (["text", "cfg scale"], "text")],
)
def test_columns_are_found_by_any_spelling_and_others_are_named(tmp_path, capsys, suffix, names, found):
    table_of(tmp_path / f"a{suffix}", [dict(zip(names, ["a cat", "3"], strict=True))])
    (line,) = read_batch_file(str(tmp_path / f"a{suffix}"), parser())
    own = {"Seed": {"seed": 3}, "cfg scale": {"guidance_scale": 3}}.get(names[1], {})
    assert line.settings == {"prompt": "a cat", **own}
    said = capsys.readouterr().err
    assert ("not used: Category\n" in said) if not own else not said


def test_whole_numbers_that_pandas_writes_with_a_point_are_whole(tmp_path):
    table_of(
        tmp_path / "a.parquet",
        [{"prompt": "a", "seed": 7.0, "strength": 1.0}, {"prompt": "b", "seed": None, "strength": None}],
    )
    assert json.dumps([line.settings for line in read_batch_file(str(tmp_path / "a.parquet"), parser())]) == (
        '[{"prompt": "a", "seed": 7}, {"prompt": "b"}]'
    )


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "seed,mood\n3,x", "--from-file a.csv has no column prompt. It has: seed, mood."),
        ("a.csv", "", "--from-file a.csv has no prompts."),
        ("a.csv", "prompt\n\n", "--from-file a.csv has no prompts."),
        ("a.csv", "prompt,steps\na cat,many", "a.csv, line 2: --steps 'many' is not a whole number."),
        ("a.csv", "prompt,steps\na cat\n,7", "a.csv, line 3: no prompt given."),
        ("a.csv", "prompt\na cat, on a mat", "a.csv, line 2: 2 cells, but 1 columns. Put texts into double quotes."),
        ("a.csv", 'prompt\n"a cat', "a.csv, line 2: unexpected end of data."),
        ("a.csv", "prompt,model\na,b", "a.csv: the column model is the same for all lines. Give -m to the command."),
        ("a.csv", b"prompt\n\xff", "a.csv: not UTF-8 text. Save the file as UTF-8."),
        ("a.csv", "prompt,width\na,100", "a.csv, line 2: width 100 is not a multiple of 8."),
        ("a.parquet", "prompt\na", "a.parquet is no Parquet file, or a damaged one"),
    ],
)  # fmt: skip
def test_a_table_that_makes_no_sense_is_refused(run, tmp_path, name, text, said):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(run("txt2img", "--from-file", name), said)


def test_parquet_without_its_reader_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    refused(run("txt2img", "--from-file", "a.parquet"), "pip install pyarrow", ".csv and .jsonl")


@pytest.mark.slow
def test_choices_become_pictures_of_their_own(run, tmp_path, tiny_ckpt):
    """Braces are text unless choices are asked for; a seed counts on from picture to picture."""
    (tmp_path / "animal.txt").write_text("cat\ndog\n")
    small = ("-m", tiny_ckpt, "-W", 64, "-H", 64, "--steps", 1, "-s", 3, "-q")
    for flags, prompts in [
        ((), ["a {red|blue} __animal__"]),
        (("--choices", "all"), ["a red __animal__", "a blue __animal__"]),
        (("--choices", "all", "--wildcards", "."), ["a red cat", "a red dog", "a blue cat", "a blue dog"]),
    ]:
        code, out, _ = run("txt2img", "a {red|blue} __animal__", *small, "-o", f"{len(prompts)}/", *flags)
        made = [settings_of(path) for path in out]
        assert (code, [each["prompt"] for each in made]) == (0, prompts)
        assert [each["seed"] for each in made] == list(range(3, 3 + len(prompts)))


@pytest.mark.slow
def test_drawn_choices_are_drawn_again_by_the_same_seed(run, tmp_path, tiny_ckpt):
    (tmp_path / "jobs.csv").write_text("prompt\n{a|b|c|d|e|f|g|h}\n")
    small = ("-m", tiny_ckpt, "-W", 64, "-H", 64, "--steps", 1, "--count", 4, "--choices", "random")
    prompts = {}
    for folder, flags in [("a", ("-s", 3)), ("b", ("-s", 3)), ("c", ()), ("d", ())]:
        code, out, _ = run("txt2img", "--from-file", "jobs.csv", *small, "-o", f"{folder}/", *flags)
        assert (code, len(out)) == (0, 4)
        prompts[folder] = [settings_of(path)["prompt"] for path in out]
    assert prompts["a"] == prompts["b"]
    assert prompts["c"] == prompts["d"]  # without a seed, they follow from the file, so that a stopped run goes on
    assert len({*map(tuple, prompts.values())}) == 2
    code, out, said = run("txt2img", "{a|b|c|d|e|f|g|h}", *small, "-o", "e/")
    seed = settings_of(out[0])["seed"]
    assert f"sd: seed {seed}\n" in said
    again = run("txt2img", "{a|b|c|d|e|f|g|h}", *small, "-o", "f/", "-s", seed)[1]
    assert [settings_of(path)["prompt"] for path in out] == [settings_of(path)["prompt"] for path in again]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("a {b",), "a { is opened and not closed."),
        (("a", "-n", "b}"), r"a } closes nothing. Write \} for the character itself."),
        (("{a|b}" * 20,), "--choices makes 1048576 pictures of these prompts; a run makes at most 100000."),
        (("a", "--wildcards", "nothere"), "--wildcards nothere is not a folder."),
    ],
)
def test_choices_that_make_no_sense_are_refused(run, flags, said):
    refused(run("txt2img", *flags, "--choices", "all"), said)


def test_wildcards_alone_do_nothing(run):
    refused(run("txt2img", "a", "--wildcards", "."), "--wildcards does nothing without --choices.")
