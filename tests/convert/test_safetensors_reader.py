"""Safetensors: the library's own files and odd but legal ones are read, every malformed header is refused."""

import json
import struct
import time
import tracemalloc
from dataclasses import replace

import pytest
from hostile import assert_showable, read_all, refused

import convert.files.limits
import convert.files.safetensors_reader
from convert.errors import CheckpointError, CorruptFileError, UnsafeFileError, UnsupportedFileError
from convert.files.reader import open_checkpoint
from convert.files.safetensors_reader import DTYPES, read_safetensors


def build(header: dict | str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = (
        header
        if isinstance(header, bytes)
        else header.encode()
        if isinstance(header, str)
        else json.dumps(header).encode()
    )
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def read(content: bytes):
    return read_safetensors(memoryview(content))


def fails(content: bytes, kind: type[CheckpointError], *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(content)
    assert type(caught.value) is kind, caught.value
    assert_showable(str(caught.value))
    for part in parts:
        assert part in str(caught.value)


# Genuine files


def test_files_of_the_library_are_read_exactly(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    names = [name for name in DTYPES.values() if hasattr(torch, name)]
    tensors = {name: torch.randint(0, 2, (3, 5)).to(getattr(torch, name)) for name in names if "e8m0" not in name}
    tensors |= {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "empty inside": torch.empty(2, 0, 3),
        "v_pred": torch.empty(0),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "modelspec.title": "h\u00e9llo\nworld"})
    with open_checkpoint(path) as file:
        assert file.container == "safetensors"
        assert file.metadata == {"format": "pt", "modelspec.title": "h\u00e9llo\nworld"}
        assert file.foreign == ()
        assert file.root.keys() == tensors.keys()
        for name, tensor in tensors.items():
            record = file.root[name]
            assert (record.dtype, record.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            assert record.stride == tuple(tensor.stride())
            assert record.is_contiguous
            assert record.nbytes == tensor.nbytes
            assert bytes(file.storage_bytes(record)) == bytes(tensor.reshape(-1).view(torch.uint8).numpy())
            file.verify(record)


def test_order_padding_and_alignment_do_not_matter():
    header = json.dumps(
        {"b": entry("U8", (3,), (9, 12)), "a": entry("U8", (1,), (0, 1)), "c": entry("F64", (), (1, 9))}
    )
    for padding in ("", " ", " " * 13):
        root = read(build(header + padding, bytes(12))).root
        assert list(root) == ["b", "a", "c"]
        start = 8 + len(header + padding)
        assert [record.storage.offset - start for record in root.values()] == [9, 0, 1]


@pytest.mark.parametrize("nothing", ["null", "{}"])
def test_metadata_that_say_nothing_are_none(nothing):
    contents = read(build('{"__metadata__":' + nothing + "}"))
    assert (contents.root, contents.metadata) == ({}, {})


def test_a_file_without_tensors_or_metadata_is_read():
    contents = read(build("{}"))
    assert (contents.root, contents.metadata) == ({}, {})


def test_empty_tensors_keep_their_shape():
    root = read(
        build(
            {"a": entry(shape=(0, 4), offsets=(0, 0)), "b": entry(), "c": entry(shape=(0,), offsets=(8, 8))}, bytes(8)
        )
    )
    assert [record.shape for record in root.root.values()] == [(0, 4), (2,), (0,)]


def test_names_with_brackets_quotes_and_spaces_are_read():
    name = 'a [b] {c} "d" \\ \u00e9'
    assert list(read(build({name: entry()}, bytes(8))).root) == [name]
    assert list(read(build(json.dumps({name: entry()}, ensure_ascii=False), bytes(8))).root) == [name]


def test_metadata_may_hold_any_character_that_is_one():
    text = "\u00e9 \U0001f40e \ud7ff \ue000 \x1b"
    for ensure_ascii in (True, False):
        header = json.dumps({"__metadata__": {text: text}}, ensure_ascii=ensure_ascii)
        assert read(build(header)).metadata == {text: text}


# Malformed headers

MALFORMED = {
    "not JSON": (b"{nothing}", CorruptFileError, "not JSON"),
    "JSON that goes on": (b'{"a":1}}', CorruptFileError, "not JSON"),
    "not UTF-8": (b'{"\xff":{}}', CorruptFileError, "not JSON"),
    "a hole": ({"a": entry(offsets=(8, 16))}, CorruptFileError, "leave a hole"),
    "a hole between": ({"a": entry(), "b": entry("U8", (1,), (9, 10))}, CorruptFileError, "leave a hole"),
    "an overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, CorruptFileError, "overlap"),
    "the same span twice": ({"a": entry(), "b": entry()}, CorruptFileError, "overlap"),
    "an empty one inside another": (
        {"a": entry(), "b": entry(shape=(0,), offsets=(4, 4))}, CorruptFileError, "overlap"),
    "a span backwards": ({"a": entry(offsets=(8, 0))}, CorruptFileError, "weight 'a'"),
    "a shape too large": ({"a": entry(shape=(3,))}, CorruptFileError, "span of 8 bytes"),
    "a shape whose product overflows": ({"a": entry(shape=(2**62, 4))}, CorruptFileError, "span of 8 bytes"),
    "a shape of 2**64": ({"a": entry(shape=(2**64,))}, CorruptFileError, "out of range"),
    "an endless stride": ({"a": entry(shape=(0, 2**62, 4), offsets=(0, 0))}, CorruptFileError, "range"),
    "a negative size": ({"a": entry(shape=(-2,))}, CorruptFileError, "out of range"),
    "two negative sizes": ({"a": entry(shape=(-2, -1))}, CorruptFileError, "out of range"),
    "a size that is a fraction": (b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', CorruptFileError, "2.0"),
    "a size that is NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', CorruptFileError, "NaN"),
    "a size that is infinite": (b'{"a":{"shape":[-Infinity]}}', CorruptFileError, "-Infinity"),
    "a size that is true": ({"a": entry(shape=(True, 2))}, CorruptFileError, "out of range"),
    "a size that is text": ({"a": entry(shape=("2",))}, CorruptFileError, "out of range"),
    "an endless number": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 100_000 + b"]}}", CorruptFileError, "out of range"),
    "a shape that is a number": ({"a": entry() | {"shape": 2}}, CorruptFileError, "malformed shape"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, CorruptFileError, "malformed shape or span"),
    "a missing field": ({"a": {"dtype": "F32", "shape": [2]}}, CorruptFileError, "other fields"),
    "a field too many": ({"a": entry(strides=[1])}, CorruptFileError, "other fields"),
    "an entry that is a list": ({"a": [1]}, CorruptFileError, "other fields"),
    "an unknown dtype": ({"a": entry("F4")}, UnsupportedFileError, "unknown dtype 'F4'"),
    "a dtype in small letters": ({"a": entry("f32")}, UnsupportedFileError, "unknown dtype"),
    "a dtype that is a number": ({"a": entry(32)}, UnsupportedFileError, "unknown dtype"),
    "a name twice": (b'{"a":{},"a":{}}', UnsafeFileError, "same name twice"),
    "a field twice": (b'{"a":{"dtype":"F32","dtype":"F32"}}', UnsafeFileError, "same name twice"),
    "metadata that is a list": ({"__metadata__": ["x"]}, CorruptFileError, "metadata"),
    "metadata that is an empty list": ({"__metadata__": []}, CorruptFileError, "metadata"),
    "metadata that is zero": ({"__metadata__": 0}, CorruptFileError, "metadata"),
    "metadata that is a number": ({"__metadata__": {"a": 1}}, CorruptFileError, "metadata"),
    "metadata that is nested": ({"__metadata__": {"a": {}}}, CorruptFileError, "metadata"),
    "metadata with half a surrogate pair": (b'{"__metadata__":{"a":"\\ud800"}}', CorruptFileError, "metadata"),
    "metadata by the name of half a pair": (b'{"__metadata__":{"\\udfff":"a"}}', CorruptFileError, "metadata"),
    "a name with a control code": ({"a\x1b[31m": entry()}, UnsafeFileError, r"a\x1b[31m"),
    "a name with a newline": ({"a\nb": entry()}, UnsafeFileError, r"a\nb"),
    "a name that turns the direction": ({"a\u202eb": entry()}, UnsafeFileError, r"a\u202eb"),
    "a name with a lone surrogate": (b'{"a\\ud800":{}}', UnsafeFileError, "not printable"),
    "no name": ({"": entry()}, UnsafeFileError, "not printable"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_headers_are_refused(fault):
    header, kind, part = MALFORMED[fault]
    fails(build(header, bytes(8)), kind, part)


def test_a_cut_file_says_how_much_is_there_and_how_much_was_announced(tmp_path):
    content = build({"a": entry("U8", (50_000,), (0, 50_000))}, bytes(20_000))
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path, CorruptFileError, "ends after 20.1 kB of the 50.1 kB", "download it again")
    whole = len(content) + 30_000
    path.write_bytes(content + bytes(29_999))
    refused(path, CorruptFileError, f"ends after {whole - 1:,} of the {whole:,} bytes that its header")


def test_bytes_behind_the_data_are_refused():
    fails(build({"a": entry()}, bytes(9)), CorruptFileError, "1 byte more")


def test_a_header_longer_than_the_file_is_refused():
    fails(build({"a": entry()}, bytes(8), length=1000), CorruptFileError, "inside its header")


def test_a_file_cut_or_grown_anywhere_is_refused(tmp_path):
    whole = build({"a": entry(), "b": entry("BF16", (3, 1), (8, 14))}, bytes(range(14)))
    path = tmp_path / "model.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    path.write_bytes(whole)
    assert len(read_all(path).root) == 2


@pytest.mark.slow
def test_a_flipped_bit_in_the_header_is_damage_or_changes_no_more_than_a_name(tmp_path):
    header = {"alpha": entry(), "beta": entry("BF16", (3, 1), (8, 14)), "gamma": entry("I64", (), (14, 22))}
    whole = build(header, bytes(range(22)))
    expected = [(r.dtype, r.shape, r.storage.offset, r.storage.nbytes) for r in read(whole).root.values()]
    path = tmp_path / "model.safetensors"
    accepted = 0
    for bit in range(8 * (len(whole) - 22)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            root = open_checkpoint(path).root
        except (CorruptFileError, UnsupportedFileError):
            continue
        accepted += 1
        assert [(r.dtype, r.shape, r.storage.offset, r.storage.nbytes) for r in root.values()] == expected
        assert sum(name not in header for name in root) == 1
    assert 0 < accepted < 150  # 14 letters of names, 8 bits each


# Limits


def test_the_limit_of_the_header():
    fails(build(b"{" + b" " * 2**24 + b"}"), UnsupportedFileError, "header: found 16777218, allowed 16777216")
    assert read(build(b"{" + b" " * (2**24 - 2) + b"}")).root == {}


def test_an_announced_header_of_gigabytes_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(build({"a": entry()}, bytes(8), length=2**32 - 1))
    refused(path, CorruptFileError, "inside its header of 4.29 GB")


@pytest.mark.parametrize(
    ("start", "end"), [(b'{"a":' * 4, b"}" * 4), *((b'{"a":' + b"[" * n, b"]" * n + b"}") for n in (3, 300_000))]
)
def test_the_limit_of_nesting_holds_before_anything_is_parsed(start, end):
    nested = start + b"1" + end
    fails(build(nested), CorruptFileError, "more than 3 brackets inside each other")


def test_the_limit_of_strings_and_brackets():
    content = build(b'{"a":[' + b",".join([b'""', b"[]"] * 700_000) + b"]}")
    start = time.process_time()
    fails(content, UnsupportedFileError, "in the safetensors header: found 2000001, allowed")
    assert time.process_time() - start < 10


def test_brackets_and_quotes_inside_of_strings_are_no_nesting():
    metadata = {"json": json.dumps({"a": [[[[1]]]], "b": '"[[[['}), "slashes": "\\" * 5 + '"{{{{', "end": "\\"}
    assert read(build({"__metadata__": metadata})).metadata == metadata


def test_the_limit_of_tensors(monkeypatch):
    content = build({str(index): entry("U8", (0,), (0, 0)) for index in range(4)})
    assert len(read(content).root) == 4
    monkeypatch.setattr(convert.files.safetensors_reader, "LIMITS", replace(convert.files.limits.LIMITS, tensors=3))
    fails(content, UnsupportedFileError, "tensors: found 4, allowed 3")


def test_the_limit_of_dimensions():
    assert read(build({"a": entry("U8", (1,) * 8, (0, 1))}, b"x")).root["a"].shape == (1,) * 8
    fails(build({"a": entry("U8", (1,) * 9, (0, 1))}, b"x"), UnsupportedFileError, "found 9, allowed 8")


@pytest.mark.parametrize("filling", [b"1,", b"11111,", b'"abcdefghi",', b'"\xc3\xa9bcdefghi",'])
def test_the_worst_headers_stay_within_the_memory_allowance(filling):
    count = 2**20 // len(filling)
    content = build(b'{"a":[' + filling * count + b"0]}")
    tracemalloc.start()
    start = time.process_time()
    fails(content, CorruptFileError, "other fields")
    spent = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak * 16 < 512 << 20  # for a header of 1 MiB; 16 MiB are allowed
    assert spent < 2
