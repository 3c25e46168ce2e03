"""What adapters add to weights, against PEFT, diffusers, and formulas written out in float64."""

import pytest
import torch
from adapter_formulas import BY_HAND, check, normal
from conftest import TINY, fill
from oracles import diffusers_unet
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from torch import nn

from convert.adapters.parts import KINDS as KINDS_IN_FILES
from sd.networks.adapters.weight_change import KINDS, bias_change, weight_change

LAYERS = {
    "linear": lambda: nn.Linear(24, 32),
    "point": lambda: nn.Conv2d(24, 32, 1),
    "kernel": lambda: nn.Conv2d(24, 32, 3),
}
STRENGTHS = (1, 0.5, -1)
PARTS = {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude", "ia3_l": "factor"}


def peft_change(config, layer):
    """PEFT's tensors for a layer under our names, the base weight, and the change of it, calculated in float64."""
    torch.manual_seed(0)
    host = nn.ModuleDict({"layer": LAYERS[layer]()})
    host.config = {"model_type": "custom"}
    model = get_peft_model(host, config)
    parts = {}
    for name, values in model.named_parameters():
        if "base_layer" not in name:
            values.data = normal(*values.shape) + (values.data if "magnitude" in name else 0)
            words = name.split(".")
            short = next(word for word in words if word.startswith(("lora", "hada", "lokr", "ia3", "oft", "boft")))
            parts[PARTS.get(short, short.removeprefix("hada_").removeprefix("lokr_"))] = values.detach().clone()
    base = host["layer"].base_layer.weight.detach().clone()
    merged = model.double().merge_and_unload()["layer"].weight.detach()
    return parts, base, merged - base


def as_files_may_have(weight):
    """The same weight as matrix and as 1x1 convolution, if it can be both."""
    if weight[0, 0].numel() > 1:
        return [weight]
    return [weight.flatten(1), weight.flatten(1)[:, :, None, None]]


def lora(**settings):
    return LoraConfig(r=4, lora_alpha=2, target_modules=["layer"], **settings)


def lokr(**settings):
    return LoKrConfig(**{"r": 2, "alpha": 3, "target_modules": ["layer"], "decompose_factor": 4, **settings})


def loha(**settings):
    return LoHaConfig(r=4, alpha=2, target_modules=["layer"], **settings)


def ia3(**settings):
    return IA3Config(target_modules=["layer"], **settings)


OF_PEFT = {  # kind, scale, settings
    "lora": ("lora", 0.5, lora()),
    "lora, rank-stabilised": ("lora", 1.0, lora(use_rslora=True)),
    "dora": ("lora", 0.5, lora(use_dora=True)),
    "loha": ("loha", 0.5, loha()),
    "loha with cores": ("loha", 0.5, loha(use_effective_conv2d=True)),
    "lokr, second factor split": ("lokr", 1.5, lokr()),
    "lokr, both factors split": ("lokr", 3.0, lokr(r=1, decompose_factor=8, decompose_both=True)),
    "lokr, none split": ("lokr", 0.5, lokr(r=6)),
    "lokr with a core": ("lokr", 1.5, lokr(use_effective_conv2d=True)),
    "ia3 on outputs": ("ia3", 1.0, ia3(feedforward_modules=[])),
    "ia3 on inputs": ("ia3", 1.0, ia3(feedforward_modules=["layer"])),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", OF_PEFT)
def test_a_change_is_what_peft_merges(name, layer):
    kind, scale, config = OF_PEFT[name]
    parts, base, expected = peft_change(config, layer)
    for weight in as_files_may_have(base):
        for strength in STRENGTHS:
            ours = weight_change(kind, parts, weight, scale=scale, strength=strength, on_input="inputs" in name)
            check(ours, strength * expected, weight)


def test_three_adapters_add_up_as_in_peft():
    torch.manual_seed(0)
    host = nn.ModuleDict({"layer": LAYERS["kernel"]()})
    host.config = {"model_type": "custom"}
    ranks = {"first": 2, "second": 4, "third": 8}
    configs = {
        name: LoraConfig(r=rank, lora_alpha=3, target_modules=["layer"], init_lora_weights=False)
        for name, rank in ranks.items()
    }
    model = get_peft_model(host, configs["first"], adapter_name="first")
    model.add_adapter("second", configs["second"])
    model.add_adapter("third", configs["third"])
    layer, total = host["layer"], 0
    for (name, rank), strength in zip(ranks.items(), STRENGTHS, strict=True):
        parts = {"down": layer.lora_A[name].weight.detach(), "up": layer.lora_B[name].weight.detach()}
        total = total + weight_change("lora", parts, layer.weight, scale=3 / rank, strength=strength)
        layer.set_scale(name, strength)
    base = layer.base_layer.weight.detach().clone()
    merged = model.double().merge_and_unload(adapter_names=list(ranks))["layer"].weight.detach()
    check(total, merged - base, base)


def test_changes_of_all_layers_are_what_diffusers_fuses():
    """Its own reader and names: every linear layer and convolution of a narrow UNet, one rank and one alpha."""
    torch.manual_seed(0)
    unet = diffusers_unet(TINY, fill(TINY))
    state, alphas, expected = {}, {}, {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            outputs, inputs, *kernel = module.weight.shape
            parts = {"down": normal(4, inputs, *kernel), "up": normal(outputs, 4, *[1] * len(kernel))}
            state |= {f"unet.{name}.lora_A.weight": parts["down"], f"unet.{name}.lora_B.weight": parts["up"]}
            alphas[f"unet.{name}.alpha"] = 2.0
            expected[name] = parts, module.weight.detach().double()
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    unet.double().fuse_lora(lora_scale=0.7)
    layers = {name.removesuffix(".base_layer"): layer for name, layer in unet.named_modules()}
    for name, (parts, base) in expected.items():
        change = layers[name].weight.detach() - base
        check(weight_change("lora", parts, base, scale=0.5, strength=0.7), change, base)
    assert len(expected) > 100


def test_block_rotations_of_inputs_are_those_of_peft():
    """PEFT turns the inputs of a weight, other programs its outputs: the same on the transposed weight."""
    settings = {"use_cayley_neumann": False, "bias": "none"}
    parts, base, expected = peft_change(OFTConfig(oft_block_size=4, target_modules=["layer"], **settings), "linear")
    blocks = torch.zeros(6, 4, 4)
    rows, columns = torch.triu_indices(4, 4, 1)
    blocks[:, rows, columns] = parts["oft_R"]
    check(weight_change("oft", {"blocks": blocks}, base.T).T, expected, base)


SHAPES = {"linear": (32, 24), "square": (32, 32), "kernel": (32, 24, 3, 3), "latents": (32, 4, 3, 3)}
ON_OUTPUTS = ("oft", "boft", "ia3 on outputs")  # they act on all that an output reads


def make(name, shape):
    torch.manual_seed(0)
    weight = normal(*SHAPES[shape])
    return weight, BY_HAND[name](weight.double())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BY_HAND)
def test_a_change_is_its_formula(name, shape):
    base, made = make(name, shape)
    for weight in as_files_may_have(base):
        for strength in STRENGTHS:
            ours = weight_change(made.kind, made.parts, weight, strength=strength, **made.settings)
            check(ours, strength * (made.meant - base.double()), weight)


def test_every_kind_that_files_have_is_calculated_and_tested():
    tested = {kind for kind, *_ in OF_PEFT.values()} | {make(name, "kernel")[1].kind for name in BY_HAND}
    assert set(KINDS) == set(KINDS_IN_FILES) == tested


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BY_HAND)
def test_any_float_type_is_calculated_in_fp32_and_left_as_it_is(name, dtype):
    base, made = make(name, "kernel")
    given = {part: values.to(dtype) for part, values in made.parts.items()}, base.to(dtype)
    parts, weight = {part: values.clone() for part, values in given[0].items()}, given[1].clone()
    expected = weight_change(made.kind, {n: v.float() for n, v in parts.items()}, weight.float(), **made.settings)
    ours = weight_change(made.kind, parts, weight, **made.settings)
    assert (ours.dtype, torch.equal(ours, expected)) == (torch.float32, True)
    assert torch.equal(weight, given[1])
    assert all(torch.equal(parts[part], values) for part, values in given[0].items())


@pytest.mark.parametrize("channels", [5, 8, 9])
@pytest.mark.parametrize("name", [name for name in BY_HAND if not any(word in name for word in ON_OUTPUTS)])
def test_a_change_for_latents_leaves_further_channels_alone(name, channels):
    """Which depth, editing and inpainting models read beside the latents."""
    base, made = make(name, "latents")
    wide = torch.cat([base, normal(32, channels - 4, 3, 3)], dim=1)
    ours = weight_change(made.kind, made.parts, wide, **made.settings)
    check(ours[:, :4], made.meant - base.double(), base)
    assert ours.shape == wide.shape
    assert not ours[:, 4:].any()


RANK_0 = {
    "lora": {"up": (32, 0), "down": (0, 24)},
    "loha": {"w1_a": (32, 0), "w1_b": (0, 24), "w2_a": (32, 0), "w2_b": (0, 24)},
    "lokr": {"w1": (4, 4), "w2_a": (8, 0), "w2_b": (0, 6)},
    "glora": {"a1": (24, 0), "a2": (0, 24), "b1": (32, 0), "b2": (0, 24)},
}


@pytest.mark.parametrize("kind", RANK_0)
def test_rank_0_changes_nothing(kind):
    change = weight_change(kind, {name: torch.ones(shape) for name, shape in RANK_0[kind].items()}, normal(32, 24))
    assert torch.equal(change, torch.zeros(32, 24))


@pytest.mark.parametrize(
    ("kind", "parts", "weight"),
    [
        ("lora", {"up": (32, 2), "down": (2, 24)}, (32, 16)),
        ("lora", {"up": (16, 2), "down": (2, 24)}, (24, 16)),
        ("lora", {"up": (32, 2), "down": (2, 3, 3, 3)}, (32, 9, 3, 3)),
        ("full", {"weight": (32, 4)}, (32, 9)),
        ("full", {"weight": (1, 32)}, (32,)),
    ],
)
def test_a_change_of_another_size_is_refused(kind, parts, weight):
    with pytest.raises(ValueError, match="does not fit a weight of"):
        weight_change(kind, {name: torch.ones(shape) for name, shape in parts.items()}, torch.ones(weight))


def test_a_row_of_zeros_has_no_direction_and_stays():
    weight = torch.zeros(3, 2)
    parts = {"weight": torch.tensor([[3.0, 4.0], [0, 0], [0, 2.0]]), "magnitude": torch.ones(3)}
    assert torch.allclose(weight_change("full", parts, weight), torch.tensor([[0.6, 0.8], [0, 0], [0, 1.0]]))


def test_norms_and_biases_take_differences():
    parts = {"weight": normal(32).half(), "bias": normal(32).half()}
    for change in (weight_change("full", parts, normal(32), strength=-0.5), bias_change(parts, strength=-0.5)):
        assert (change.dtype, change.shape) == (torch.float32, (32,))
    assert torch.equal(weight_change("full", parts, normal(32), strength=-0.5), -0.5 * parts["weight"].float())
    assert torch.equal(bias_change(parts, strength=-0.5), -0.5 * parts["bias"].float())
    assert not weight_change("full", {"bias": parts["bias"]}, normal(32, 24)).any()
