"""Adapters, embeddings and image cards for fuzzing: sound ones to start from, changes to them, and what must hold.

`test_adapter_fuzzing.py` reads some hundred, `scripts/checks/fuzz_readers.py --kind adapter` and `card` millions.
Needs no torch.
"""

import base64
import io
import json
import math
import os
import random
import struct
import zlib
from contextlib import closing, suppress
from math import prod

import numpy as np
import picture_fuzzing
from examination import assert_inside, open_in_memory, watched
from hostile import assert_showable, call, checkpoint_records, dict_of, list_of, name, pickled, tensor, text, write_zip
from mutation import changed_json, safetensors
from mutation import mutated as mutated_file
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import convert.adapters.facts
import convert.families.additions
import convert.families.recognition
import convert.files.arrays  # these are imported when they are needed, which is no event of the file's
from convert.adapters.adapter import read_adapter
from convert.adapters.embedding import bundled, contents_of, vectors_of
from convert.adapters.image_card import CHUNK, combined, read_card
from convert.adapters.spellings import SUFFIXES
from convert.errors import CheckpointError, named
from convert.families.few_step_names import advice
from convert.layouts.adapter_names import V1, kohya_names, modules
from sd.config import SD_V1

SHAPES, NAMES = modules(V1), kohya_names(V1)
LINEAR = "unet.input_blocks.1.attention.proj_in"
NARROW = "unet.input_blocks.0.conv"
FIRST = "unet.input_blocks.1.attention.norm"
OUT, IN = SHAPES[LINEAR][:2]
MODULE = NAMES[LINEAR]
MODULES = (MODULE, NAMES[NARROW], NAMES[FIRST], "unet." + MODULE, "lora_unet_nowhere", "", "bundle_emb.word")
KINDS = {  # kind -> the parts of a module of OUT outputs and IN inputs
    "lora": {"lora_down.weight": (1, IN), "lora_up.weight": (OUT, 1), "alpha": ()},
    "lora, core": {"lora_down.weight": (1, IN), "lora_mid.weight": (1, 1), "lora_up.weight": (OUT, 1)},
    "dora": {"lora_down.weight": (1, IN), "lora_up.weight": (OUT, 1), "dora_scale": (OUT, 1), "diff_b": (OUT,)},
    "loha": {"hada_w1_a": (OUT, 1), "hada_w1_b": (1, IN), "hada_w2_a": (OUT, 1), "hada_w2_b": (1, IN)},
    "lokr": {"lokr_w1": (OUT // 20, IN // 20), "lokr_w2_a": (20, 1), "lokr_w2_b": (1, 20), "scale": ()},
    "glora": {"a1.weight": (IN, 1), "a2.weight": (1, IN), "b1.weight": (OUT, 1), "b2.weight": (1, IN)},
    "oft": {"oft_blocks": (OUT // 2, 2, 2), "rescale": (OUT,), "alpha": ()},
    "boft": {"oft_blocks": (2, OUT // 2, 2, 2)},
    "ia3": {"weight": (OUT,), "on_input": ()},
    "ia3 of PEFT": {"ia3_l": (1, IN)},
    "magnitude": {"lora_A.weight": (1, IN), "lora_B.weight": (OUT, 1), "lora_magnitude_vector": (OUT,)},
}
METADATA = {
    "ss_tag_frequency": '{"1_a": {"cat": 3}}',
    "lora_adapter_metadata": '{"unet.lora_alpha": 2, "alpha_pattern": {"proj_in": 3}, "use_rslora": true}',
    "ss_network_alpha": "1",
    "ss_output_name": "sdxl_lightning_4step_lora",
    "modelspec.trigger_phrase": "a cat",
}
PARAMETERS = name("torch.nn.modules.container", "ParameterDict") + b")\x81"
PICKLES = (  # of adapters and embeddings, over the one storage of four numbers
    dict_of(**{f"{MODULE}.lora_down.weight": tensor(size=(1, IN), stride=(0, 0)),
               f"{MODULE}.lora_up.weight": tensor(size=(OUT, 1), stride=(0, 1)),
               f"{MODULE}.alpha": tensor(size=(), stride=())}),
    dict_of(string_to_token=dict_of(**{"*": b"M\x09\x01"}), string_to_param=dict_of(**{"*": tensor()}), name=text("a")),
    dict_of(string_to_param=PARAMETERS + dict_of(_parameters=dict_of(**{"*": tensor()})) + b"b", step=b"K\5"),
    dict_of(**{"<cat>": tensor()}),
    list_of(dict_of(a=tensor()), dict_of(b=tensor())),
    dict_of(clip_l=tensor(), clip_g=tensor()),
    call("collections", "OrderedDict", list_of(list_of(text("emb_params"), tensor()))),
)  # fmt: skip
PICK_SHAPES = (0, 1, 2, 3, 4, 8, 20, OUT, 768, 2**31, 2**62)


def adapters() -> list[bytes]:
    """Small genuine files of every kind."""
    found = []
    for parts in KINDS.values():
        entries = {f"{MODULE}.{part}": ("float16", shape) for part, shape in parts.items()}
        found.append(safetensors(entries, METADATA))
    words = {"bundle_emb.a.string_to_param.*": (2, 8), "bundle_emb.b.clip_l": (1, 8), "bundle_emb.b.clip_g": (1, 8)}
    whole = {f"{MODULE}.{part}": ("bfloat16", shape) for part, shape in KINDS["lora"].items()}
    found.append(safetensors(whole | {key: ("float32", shape) for key, shape in words.items()}, {}))
    conv = {"diff": SHAPES[FIRST], "w_norm": SHAPES[FIRST], "b_norm": SHAPES[FIRST]}
    found += [safetensors({f"{NAMES[FIRST]}.{part}": ("float32", shape)}, {}) for part, shape in conv.items()]
    embeddings = ({"emb_params": (3, 8)}, {"clip_l": (2, 8), "clip_g": (2, 12)}, {"<a>": (8,)}, {"<a>": (2, 8)})
    found += [safetensors({key: ("float16", shape) for key, shape in each.items()}, {}) for each in embeddings]
    return found + [write_zip(checkpoint_records(pickled(value))) for value in PICKLES]


def examine(data: bytes) -> str:
    """Read a file as an adapter and as an embedding. Returns what it is: "adapter", "embedding" or "refused".

    Raises AssertionError for a fault of the reader, or whatever error it let through.
    """
    with watched():
        try:
            file = open_in_memory(data)
        except CheckpointError as error:
            assert_refusal(error)
            return "refused"
        with closing(file):
            return examine_adapter(file, len(data)) or examine_embedding(file) or "refused"


def examine_adapter(file, size: int) -> str | None:
    read = None
    for config in (SD_V1, None):
        try:
            adapter = read_adapter(file, config)
        except CheckpointError as error:
            assert_refusal(error)
            continue
        read = "adapter"
        for change in adapter.changes:
            assert change.target in SHAPES or config is None
            assert math.isfinite(change.scale)
            assert change.rank is None or change.rank > 0
            assert change.constraint is None or 0 < change.constraint < math.inf
            for part, record in change.tensors.items():
                assert_inside(record, size)
                assert 0 not in record.shape
                assert adapter.stored_names[change.target, part] in file.root or not isinstance(file.root, dict)
        for sentence in (*adapter.problems, *adapter.notes):
            assert_showable(sentence)
        with suppress_refusals():
            bundled(file, adapter.words)
        assert convert.adapters.facts.captions(adapter.metadata) is not None
        found = advice(adapter.name, adapter.metadata)
        assert found is None or found.sentence.isprintable()
    return read


def examine_embedding(file) -> str | None:
    with suppress_refusals():
        _, tensors, _ = contents_of(file.root)
        assert_vectors(vectors_of(tensors, file))
        return "embedding"
    return None


def examine_card(data: bytes) -> str:
    """Read a picture as an image card. Returns "card", "picture" for one without an embedding, or "refused"."""
    path = picture_fuzzing.folder() / f"card-{os.getpid()}"
    path.write_bytes(data)
    try:
        with suppress_refusals():
            card = read_card(path)
            if card is None:
                return "picture"
            _, tensors, _ = contents_of(card)
            assert_vectors(vectors_of(tensors))
            return "card"
        return "refused"
    finally:
        path.unlink()


def assert_vectors(encoders: tuple) -> None:
    assert 1 <= len(encoders) <= 2
    for vectors in encoders:
        assert vectors.dtype == np.float32
        assert vectors.ndim == 2
        assert 1 <= len(vectors) == len(encoders[0]) <= 75
        assert np.isfinite(vectors).all()


class suppress_refusals(suppress):
    """Refusals are expected, in one sentence."""

    def __init__(self):
        super().__init__(CheckpointError)

    def __exit__(self, kind, error, trace):
        if isinstance(error, CheckpointError):
            assert_refusal(error)
        return super().__exit__(kind, error, trace)


def assert_refusal(error: CheckpointError) -> None:
    assert_showable(str(error if error.named else named(error, "x.safetensors")))


def mutated(data: bytes, pick: random.Random) -> bytes:
    """The file with a few changes: of names and shapes, which fit the data again, or as for any file."""
    if data[8:9] != b"{" or pick.random() < 0.35:
        return mutated_file(data, pick)
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        widths = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "F8_E4M3": 1, "BOOL": 1, "C64": 8}
        entries = {key: [entry["dtype"], [int(size) for size in entry["shape"]]] for key, entry in header.items()}
        for _ in range(pick.choice((1, 1, 2, 3))):
            entries = changed_entries(entries, pick, sorted(widths))
        if pick.random() < 0.3:
            metadata = changed_metadata(metadata, pick)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return mutated_file(data, pick)
    place, out = 0, {"__metadata__": metadata} if metadata else {}
    for key, (dtype, shape) in entries.items():
        size = prod(shape) * widths.get(dtype, 2)
        out[key] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    raw = json.dumps(out).encode("utf-8", "surrogatepass")
    values = np.resize(
        np.frombuffer(pick.choice((b"\0", b"\0<", b"\x7f", b"\xff", b"\0\0\x80?")), np.uint8),
        min(max(place, 0), 60_000),
    )
    return struct.pack("<Q", len(raw)) + raw + values.tobytes()


def changed_entries(entries: dict, pick: random.Random, dtypes: list[str]) -> dict:
    """One tensor with another name, type or shape, missing, or there again."""
    entries = dict(entries)
    if not entries:
        return {f"{MODULE}.alpha": ["F32", []]}
    key = pick.choice(sorted(entries))
    dtype, shape = entries[key]
    what = pick.randrange(6)
    if what == 0:
        del entries[key]
    elif what == 1:
        entries[key] = [pick.choice(dtypes), shape]
    elif what == 2:
        entries[pick.choice(MODULES) + pick.choice(sorted(SUFFIXES))] = [dtype, shape]
    elif what == 3:
        del entries[key]
        entries[pick.choice(MODULES) + pick.choice(sorted(SUFFIXES))] = [dtype, shape]
    else:
        at = pick.randrange(len(shape) + 1)
        longer, other = [*shape[:at], 1, *shape[at:]], [*shape[:at], pick.choice(PICK_SHAPES), *shape[at + 1 :]]
        entries[key] = [dtype, pick.choice((shape[::-1], shape[:at], longer, other))]
    return entries


def changed_metadata(metadata: dict, pick: random.Random) -> dict:
    """A text of the metadata changed; where it is JSON, a node of it."""
    if not metadata:
        return dict(METADATA)
    key = pick.choice(sorted(metadata))
    try:
        return {**metadata, key: json.dumps(changed_json(json.loads(metadata[key]), pick))}
    except (ValueError, TypeError, RecursionError):
        return {**metadata, key: str(metadata[key])[: pick.randrange(4)] * pick.choice((1, 2, 500))}


def cards() -> list[bytes]:
    """Small pictures with an embedding in a text or in the colours, and without one."""
    return [
        text_card(as_json()),
        text_card(as_json((8,))),
        hidden_card(as_json()),
        hidden_card(as_json(), "WEBP"),
        picture_bytes(),
    ]


def as_json(shape: tuple[int, ...] = (2, 8)) -> dict:
    values = np.arange(prod(shape)).reshape(shape).tolist()
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": {"TORCHTENSOR": values}}, "name": "a", "step": 3}


def picture_bytes() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).save(out, "PNG")
    return out.getvalue()


def text_card(content: object) -> bytes:
    info, out = PngInfo(), io.BytesIO()
    info.add_text(CHUNK, base64.b64encode(json.dumps(content).encode()).decode())
    Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def hidden_card(content: object, kind: str = "PNG", packed: bytes | None = None) -> bytes:
    """The JSON, packed, in the low bits beside a picture."""
    height, out = 8, io.BytesIO()
    stored = np.frombuffer(packed or zlib.compress(json.dumps(content).encode()), np.uint8)
    stored = np.resize(stored, -(-len(stored) // (3 * height)) * 3 * height).reshape(height, -1, 3)
    left, right = (combined(half) | 0x30 for half in (stored & 0x0F, stored >> 4))  # its own inverse
    black = np.full((height, 1, 3), 0x20, np.uint8)
    middle = np.full((height, 8, 3), 0x55, np.uint8)
    whole = Image.fromarray(np.hstack([left, black, middle, black, right]).astype(np.uint8))
    whole.save(out, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


def mutated_card(data: bytes, pick: random.Random) -> bytes:
    """A card with other JSON in it, or a picture changed."""
    what = pick.randrange(4)
    if what == 0:
        return text_card(changed_json(as_json(), pick))
    if what == 1:
        return hidden_card(changed_json(as_json(), pick))
    if what == 2:
        packed = bytearray(zlib.compress(json.dumps(as_json()).encode()))
        packed[pick.randrange(len(packed))] ^= 1 << pick.randrange(8)
        return hidden_card(None, packed=bytes(packed) + pick.randbytes(pick.choice((0, 3, 40))))
    return picture_fuzzing.mutated(data, pick)
