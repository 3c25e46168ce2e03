"""Files of Stable Diffusion XL: every name of the published ones, both ways."""

from math import prod

import make_checkpoint
import pytest
from test_names import read_manifest

from convert.files.records import StorageRecord, TensorRecord
from convert.layouts.joined import is_transposed, joined_names
from convert.layouts.names import original_names, parameter_shapes
from convert.layouts.open_clip import as_clip
from sd.config import SDXL, SDXL_INPAINTING, SDXL_REFINER

FAMILIES = [SDXL, SDXL_INPAINTING, SDXL_REFINER]
NARROW = {config.family: make_checkpoint.tiny(config) for config in FAMILIES}
SIGMAS, FIRST_CONV = "denoiser.sigmas", "model.diffusion_model.input_blocks.0.0.weight"
BESIDE = {  # in the published files, and no weights
    "sdxl": {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids", SIGMAS}
    | {"conditioner.embedders.1.model.logit_scale"},
    "sdxl-refiner": {"conditioner.embedders.0.model.logit_scale", SIGMAS},
}
BESIDE["sdxl-inpainting"] = BESIDE["sdxl"]


def manifest(config):
    if config.unet.in_channels == 4:
        return read_manifest({"sdxl": "sdxl-base.txt"}.get(config.family, f"{config.family}.txt"))
    return read_manifest("sdxl-base.txt") | {FIRST_CONV: (320, 9, 3, 3)}  # as no original file exists


def by_family(function):
    return pytest.mark.parametrize("family", FAMILIES, ids=lambda config: config.family)(function)


@by_family
def test_every_tensor_of_the_published_file_has_its_place(family):
    shapes = parameter_shapes(family)
    found = {name: shapes[ours] + (1,) * axes for ours, (name, axes) in original_names(family).items()}
    for name, parts in joined_names(family).items():
        of_parts = [found.pop(part) for part in parts]
        joined = (sum(shape[0] for shape in of_parts), *of_parts[0][1:])
        found[name] = joined[::-1] if is_transposed(name) else joined
    published = manifest(family)
    assert BESIDE[family.family] == published.keys() - found.keys()
    assert found == {name: shape for name, shape in published.items() if name in found}


@by_family
def test_every_tensor_of_the_published_file_is_read_as_a_weight(family):
    """And each weight of ours is there once, in its shape."""
    storage = StorageRecord("", 0, 0, "little", None)

    def record(shape):
        return TensorRecord("float16", shape, tuple(prod(shape[axis + 1 :]) for axis in range(len(shape))), storage, 0)

    records = {name: record(shape) for name, shape in manifest(family).items()}
    read = {clip: record.shape for _, clip, record in as_clip(records)}
    shapes = parameter_shapes(family)
    expected = {name: shapes[ours] + (1,) * axes for ours, (name, axes) in original_names(family).items()}
    assert {name: read[name] for name in expected} == expected
    assert read.keys() - expected.keys() == BESIDE[family.family]


def test_the_published_half_precision_files_have_their_sizes():
    """The header of 2,515 names is part of the size: base as it is shared, in float16 without the sigmas."""
    tensors = {name: shape for name, shape in manifest(SDXL).items() if name != SIGMAS}
    assert len(tensors) == 2515
    assert 2 * sum(map(prod, tensors.values())) + header_bytes(tensors) == 6_938_040_682


def header_bytes(shapes):
    """Of a safetensors file whose tensors are all float16, in this order."""
    import json

    entries, start = {}, 0
    for name, shape in sorted(shapes.items()):
        end = start + 2 * prod(shape)
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    length = len(json.dumps(entries, separators=(",", ":")))
    return 8 + length + -length % 8


@by_family
def test_a_made_up_file_has_the_published_names(family):
    config = NARROW[family.family]
    state = make_checkpoint.made_up_state_dict(config)
    depths = "transformer_blocks."
    published = {name for name in manifest(family) if not _deep(name)}
    assert {name for name in state if not _deep(name)} == published
    assert any(depths in name for name in state)
    root = "conditioner.embedders.1.model." if config.text_encoder_2 else "conditioner.embedders.0.model."
    assert state[f"{root}text_projection"].shape == (64, 64)


def _deep(name):
    """In a layer that narrow models do not have."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    layered = any(part in name for part in ("resblocks.", "encoder.layers."))
    inner = name.partition("transformer_blocks.")[2].partition(".")[0]
    return (layered and numbers[1] > 2) or (inner.isdecimal() and int(inner) > 1)
