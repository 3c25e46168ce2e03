"""Reader and arithmetic together: what a file of each kind changes in a module, and by how much."""

from collections import Counter
from dataclasses import replace
from math import prod
from random import Random

import make_checkpoint
import pytest
import torch
from adapter_formulas import BY_HAND, check, normal
from adapters import FAMILY
from conftest import TINY
from safetensors.torch import save_file

from convert.adapters.adapter import open_adapter, read_adapter
from convert.adapters.parts import fits, fits_beside, kind_of, result_shape
from convert.files.tensors import as_tensor
from convert.layouts.adapter_names import adapted_family, diffusers_names, flat, kohya_names, modules
from sd.config import SDXL
from sd.networks.adapters.weight_change import weight_change

NAMED = {  # parts in files; those of other kinds are called as here
    **{("lora", part): f"lora_{part}.weight" for part in ("down", "up", "mid")},
    **{("loha", part): f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{("lokr", part): f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{("glora", part): f"{part}.weight" for part in ("a1", "a2", "b1", "b2", "bm")},
    **{(kind, "blocks"): "oft_blocks" for kind in ("oft", "boft")},
    ("ia3", "factor"): "ia3_l",
    ("full", "weight"): "diff",
    ("set", "weight"): "set_weight",
}
MODULES = ("cross_attention.k", "attention.proj_in", "conv1", "skip", "input_blocks.0.conv")


def narrow(text):
    return replace(text, width=32, hidden_width=32, pooled_width=text.pooled_width and 32)


SMALL = make_checkpoint.tiny(SDXL)
XL = replace(
    SMALL,
    unet=replace(SMALL.unet, width=32, multipliers=(1, 1, 1), context_width=64),
    text_encoder=narrow(SMALL.text_encoder),
    text_encoder_2=narrow(SMALL.text_encoder_2),
)
XL_FAMILY = adapted_family(XL)
SECOND = "text_encoder_2.layers.0.attention.v"
XL_NAMES = {
    "kohya": lambda ours: kohya_names(XL_FAMILY)[ours],
    "diffusers": lambda ours: diffusers_names(XL_FAMILY)[ours],
    "both": lambda ours: in_kohyas_form(diffusers_names(XL_FAMILY)[ours]),
}


def in_kohyas_form(name):
    """diffusers' name with underscores, as some programs write XL's."""
    component, _, path = name.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[component] + flat(path)


def read_back(path, kind, parts, target, config=TINY, name="", **numbers):
    """What the reader makes of a file with these parts for one module."""
    name = name or kohya_names(FAMILY)[target]
    named = {f"{name}.{NAMED.get((kind, part), part)}": values.contiguous() for part, values in parts.items()}
    save_file(named | {f"{name}.{part}": torch.tensor(float(value)) for part, value in numbers.items()}, path)
    with open_adapter(path) as file:
        (change,) = read_adapter(file, config).changes
        tensors = {part: as_tensor(file, record).clone() for part, record in change.tensors.items()}
    return change, tensors


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", BY_HAND)
def test_a_file_of_every_kind_is_read_and_means_its_formula(tmp_path, name, module):
    torch.manual_seed(0)
    shapes = modules(FAMILY)
    target = next(name for name, shape in shapes.items() if name.endswith(module) and shape[0] == 32)
    weight = normal(*shapes[target])
    made = BY_HAND[name](weight.double())
    numbers = {"on_input": made.settings["on_input"]} if made.kind == "ia3" else {}
    if made.settings.get("constraint"):
        numbers["alpha"] = made.settings["constraint"] / 32
    change, parts = read_back(tmp_path / "a.safetensors", made.kind, made.parts, target, **numbers)
    settings = {"scale": change.scale, "on_input": change.on_input, "constraint": change.constraint}
    check(weight_change(change.kind, parts, weight, **settings), made.meant - weight.double(), weight)
    assert change.rank == (3 if change.kind in ("lora", "loha", "glora") else None)


@pytest.mark.parametrize("spelling", XL_NAMES)
@pytest.mark.parametrize("name", BY_HAND)
def test_files_for_xl_are_read_in_every_spelling(tmp_path, name, spelling):
    """Of its UNet, kohya's scripts write the original names and others diffusers'; it has two text encoders."""
    torch.manual_seed(0)
    shapes = modules(XL_FAMILY)
    for end in ("cross_attention.k", "input_blocks.2.residual.conv1", "text_encoder.layers.0.attention.q", SECOND):
        target = next(name for name in shapes if name.endswith(end))
        weight = normal(*shapes[target])
        made = BY_HAND[name](weight.double())
        numbers = {"on_input": made.settings["on_input"]} if made.kind == "ia3" else {}
        if made.settings.get("constraint"):
            numbers["alpha"] = made.settings["constraint"] / 32
        called = XL_NAMES[spelling](target)
        change, parts = read_back(tmp_path / "a.safetensors", made.kind, made.parts, target, XL, called, **numbers)
        assert change.target == target
        settings = {"scale": change.scale, "on_input": change.on_input, "constraint": change.constraint}
        check(weight_change(change.kind, parts, weight, **settings), made.meant - weight.double(), weight)


@pytest.mark.parametrize("target", ["time_proj", "skip", "conv1"])
@pytest.mark.parametrize("side", ["outputs", "inputs"])
def test_what_peft_multiplies_is_told_by_its_shape(tmp_path, side, target):
    """A vector for outputs is (o, 1) or, for a convolution, (1, o, 1, 1)."""
    shapes = modules(FAMILY)
    target = next(name for name, shape in shapes.items() if name.endswith(target) and shape[0] == 32 != shape[1])
    outputs, inputs, *kernel = shapes[target]
    length = inputs if side == "inputs" else outputs
    stored = (1, length, *[1] * len(kernel)) if kernel or side == "inputs" else (length, 1)
    change, _ = read_back(tmp_path / "a.safetensors", "ia3", {"factor": normal(*stored)}, target)
    assert change.on_input is (side == "inputs")


@pytest.mark.parametrize("name", [name for name in BY_HAND if "oft" not in name and "outputs" not in name])
def test_a_change_of_latents_is_read_for_models_that_read_more(tmp_path, name):
    torch.manual_seed(0)
    weight = normal(32, 9, 3, 3)
    made = BY_HAND[name](weight[:, :4].double())
    config = replace(TINY, unet=replace(TINY.unet, in_channels=9))
    target = "unet.input_blocks.0.conv"
    change, parts = read_back(tmp_path / "a.safetensors", made.kind, made.parts, target, config, **made.settings)
    ours = weight_change(change.kind, parts, weight, scale=change.scale, on_input=change.on_input)
    check(ours[:, :4], made.meant - weight[:, :4].double(), weight[:, :4])
    assert not ours[:, 4:].any()


def mutated(shape, generator):
    """One that a damaged or hostile file may have in its place."""
    place, size = generator.randrange(len(shape) + 1), generator.choice((0, 1, 2, 3, 4, 8, 24, 32))
    before, here, behind = shape[:place], shape[place : place + 1], shape[place + 1 :]
    turned, longer, shorter = shape[::-1], (*before, 1, *here, *behind), (*before, *behind)
    flattened = (*before, prod(here + behind[:1]), *behind[1:])
    return generator.choice([turned, longer, shorter, flattened, (*before, size, *behind)])


def test_whatever_shapes_are_accepted_can_be_calculated():
    torch.manual_seed(0)
    generator = Random(0)
    weights = [(32, 24), (32, 32), (32, 24, 3, 3), (32, 4, 3, 3), (32,)]
    made = [formula(normal(*weight).double()) for formula in BY_HAND.values() for weight in weights[:-1]]
    accepted = Counter()
    for _ in range(3000):
        example, weight = generator.choice(made), generator.choice(weights)
        shapes = {part: tuple(values.shape) for part, values in example.parts.items()}
        shapes |= {part: mutated(shape, generator) for part, shape in shapes.items() if generator.random() < 0.3}
        kind = kind_of({part: (example.kind.replace("boft", "oft"), shape) for part, shape in shapes.items()})
        on_input = generator.random() < 0.5
        if fits(result_shape(kind, shapes, weight), weight) and fits_beside(shapes, weight, kind, on_input):
            parts = {part: normal(*shape) for part, shape in shapes.items()}
            assert weight_change(kind, parts, normal(*weight), on_input=on_input).shape == weight
            accepted[kind] += 1
    assert accepted.keys() == {example.kind for example in made}
