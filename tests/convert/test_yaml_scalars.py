"""The few scalars that are read of a YAML file: in every style, and nothing of a damaged one."""

import os
import time
from contextlib import suppress

import pytest

from convert.files.yaml_scalars import LARGEST, YamlError, read_scalars

PREDICTION, TARGET = "model.params.parameterization", "model.target"
STYLES = {
    "block": 'model:\n  params:\n    linear_start: 0.1\n    parameterization: "v"  # velocity\n',
    "flow": 'model: {params: {parameterization: "v"}}\n',
    "mixed": "model:\n  target: x.y\n  params: {a: [1, {b: c}], parameterization: 'v', d: http://x/y}\n",
    "flow over lines": "model: {params: {a: 1, # one\n  parameterization:\n    v,\n  }}\nb: 1\n",
    "json": '{"model":{"params":{"parameterization":"v"}}}',
    "dos": '\ufeffmodel:\r\n  params:\r\n    parameterization: "v"\r\n',
    "documents": "%YAML 1.2\n---\nmodel: {params: {parameterization: v}}\n---\nmodel: {params: {parameterization: x}}",
    "quoted keys": '"model":\n  "params" :\n    "parameterization" : v\n',
    "anchors": "model: &m\n  params: !!map\n    parameterization: !!str v\n",
    "own line": "model:\n  params:\n    parameterization:\n      v\n",
    "others": "# parameterization: eps\nmodel:\n  first:\n    params:\n      parameterization: eps\n  note: |\n"
    '    params:\n      parameterization: eps\n  more: "a: {\n    b"\n  params:\n    list:\n    - params: eps\n'
    "    - x\n    parameterization: v\nparameterization: eps\n",
}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "m.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.mark.parametrize("text", STYLES.values(), ids=list(STYLES))
def test_a_scalar_is_found_in_every_style(write, text):
    assert read_scalars(write(text), [PREDICTION]) == {PREDICTION: "v"}


@pytest.mark.parametrize(
    "text",
    [
        "model:\n- params:\n    parameterization: v\n",
        "model.params.parameterization: v\n",
        "parameterization: v\n",
        "model: {params: {parameterization: ~}}",
        "model:\n  params:\n    # parameterization: v\n    a: parameterization\n",
    ],
)
def test_what_is_elsewhere_does_not_count(write, text):
    assert read_scalars(write(text), [PREDICTION, TARGET]) == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("<!DOCTYPE html>\n", "line 1 is not YAML"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "line 1 is not YAML"),
        ("model:\n\tparams: 1\n", "line 2 is indented with a tab"),
        ("a: 1\nmodel: {params: {", "line 2 has a bracket that is not closed"),
        ("model: {params: ]}", "brackets that do not go together"),
        ('model: "x\n', "line 1 has a quote that is not closed"),
        ("model:\n  params: *other\n", "only an alias for model.params"),
        ("model:\n  params:\n    <<: *other\n", "only an alias"),
        ("model: {params: {parameterization: v, parameterization: eps}}", "twice, and differently"),
        (b"\x80\x02}q\x00.", "is not text"),
        (b"a: 1\0", "is not text"),
        ("[" * 1000, "more than 64 levels"),
        ("- " * 1000, "more than 64 levels"),
        ("a: b\n" * LARGEST, "is larger than 256 kB"),
    ],
)
def test_nothing_is_read_of_a_damaged_file(write, content, words):
    with pytest.raises(YamlError, match=words):
        read_scalars(write(content), [PREDICTION])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_file_is_not_opened(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "link.yaml").symlink_to(tmp_path / "gone.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, words in (
        ("folder", "is not a file"),
        ("link", "link to a file that does not exist"),
        ("pipe", "is not"),
    ):
        with pytest.raises(YamlError, match=words):
            read_scalars(tmp_path / f"{name}.yaml", [PREDICTION])


@pytest.mark.parametrize(
    "piece", ["a:\n", "- a\n", "{a: b},\n", "a b ", "a: [", '"', "'", "\\", "a#", " ", '"a": {b: c}\n']
)
def test_the_time_is_linear(write, piece):
    path, began = write('k: "' * (piece == "\\") + piece * (LARGEST // len(piece) - 4)), time.process_time()
    with suppress(YamlError):
        read_scalars(path, [PREDICTION])
    assert time.process_time() - began < 5
