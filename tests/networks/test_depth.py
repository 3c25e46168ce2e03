"""The depth network against transformers' DPT with the same weights, and against slow formulas.

Narrow networks here, at several sizes; the full-size ones are marked slow.
"""

import math
import re
from pathlib import Path

import make_checkpoint
import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error

from convert.layouts.depth_layout import PREFIX, depth_parameters, fused_names, unused_parameters
from sd.config import DPT_HYBRID, DepthConfig
from sd.networks import depth
from sd.networks.depth import Bottleneck, DepthNetwork, StandardisedConv, Stem, pad_same

NARROW = DepthConfig(
    stem_width=16,
    stage_widths=(32, 64, 128),
    stage_blocks=(2, 1, 3),
    groups=8,
    width=32,
    hidden_width=64,
    layers=4,
    heads=2,
    grid=4,
    taps=(1, 3),
    fusion_width=16,
    head_width=32,  # transformers has no other
)
OTHER = DepthConfig(**{**vars(NARROW), "stage_widths": (64, 96, 64), "layers": 3, "taps": (0, 2), "grid": 3})
CONFIGS = {"DPT-Hybrid": DPT_HYBRID, "narrow": NARROW, "other": OTHER}
ERROR = 1e-12  # roundings of float64, at most 1e-14 as measured; a wrong eps gives 1e-7 or more
FULL = 1e-5  # of float32; 5e-6 as measured
SIZES = {"trained": (4, 4), "wide": (4, 6), "tall": (8, 2), "large": (10, 6)}  # in 16x16 pixels


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(config):
    """The network with made-up weights. Those of the last convolution are positive, so that most of the depth is."""
    generator = torch.Generator().manual_seed(0)
    shapes = {parameter.ours: parameter.shape for parameter in depth_parameters(config)}
    state = {name: make_checkpoint.made_up(name, shape, generator) for name, shape in shapes.items()}
    state["head.conv3.weight"].abs_()
    with torch.device("meta"):
        network = DepthNetwork(config)
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def network():
    """In float64, in which nothing hides behind rounding."""
    return filled(NARROW).double()


def transformers_dpt(config):
    """Without memory for its weights."""
    from transformers import DPTConfig, DPTForDepthEstimation

    widths, tokens = list(config.stage_widths), config.width
    settings = DPTConfig(
        is_hybrid=True,
        backbone_config={
            "model_type": "bit",
            "layer_type": "bottleneck",
            "global_padding": "same",
            "embedding_dynamic_padding": True,
            "embedding_size": config.stem_width,
            "hidden_sizes": widths,
            "depths": list(config.stage_blocks),
            "num_groups": config.groups,
            "out_features": ["stage1", "stage2", "stage3"],
        },
        backbone_featmap_shape=[1, widths[-1], config.grid, config.grid],
        backbone_out_indices=[0, 1, *config.taps],
        neck_hidden_sizes=[*widths[:-1], tokens, tokens],
        neck_ignore_stages=[0, 1],
        reassemble_factors=[1, 1, 1, 0.5],
        readout_type="project",
        hidden_size=tokens,
        intermediate_size=config.hidden_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        fusion_hidden_size=config.fusion_width,
        image_size=config.native_size,
        use_batch_norm_in_fusion_residual=False,
        layer_norm_eps=1e-6,  # transformers' default is 1e-12; the weights were trained with this one
    )
    with torch.device("meta"):
        return DPTForDepthEstimation(settings).eval()


def theirs_filled(config, network):
    model, state = transformers_dpt(config), network.state_dict()
    weights = {parameter.diffusers: state[parameter.ours] for parameter in depth_parameters(config)}
    unused = {p.diffusers: torch.full(p.shape, torch.nan) for p in unused_parameters(config) if p.diffusers}
    model.load_state_dict(weights | unused, assign=True)
    return model.to(network.class_token.dtype)


def theirs_at_any_size(model, image):
    """Transformers' parts one after the other: as a whole, it takes only squares of the size that it was trained on."""
    embedded = model.dpt.embeddings(image, interpolate_pos_encoding=True)
    tapped, x = list(embedded.intermediate_activations), embedded.last_hidden_states
    for number, layer in enumerate(model.dpt.encoder.layer):
        x = layer(x)
        if number in model.config.backbone_out_indices[2:]:
            tapped.append(x)
    height, width = (side // 16 for side in image.shape[-2:])
    return model.head(model.neck(tapped, height, width))[:, None]


def error(ours, theirs):
    """Relative to how much the depth varies; a constant added to it counts for nothing."""
    assert (theirs > 0).float().mean() > 0.5
    return relative_error(ours - theirs.mean(), theirs - theirs.mean())


def test_narrow_network_is_transformers_dpt(network):
    image = randn(2, 3, NARROW.native_size, NARROW.native_size, dtype=torch.float64)
    assert error(network(image), theirs_filled(NARROW, network)(image).predicted_depth[:, None]) <= ERROR


@pytest.mark.parametrize(("height", "width"), SIZES.values(), ids=SIZES)
def test_narrow_network_is_transformers_parts_at_every_size(network, height, width):
    image = randn(1, 3, 16 * height, 16 * width, seed=1, dtype=torch.float64)
    assert error(network(image), theirs_at_any_size(theirs_filled(NARROW, network), image)) <= ERROR


@pytest.mark.slow
def test_full_size_network_is_transformers_dpt():
    network = filled(DPT_HYBRID)
    model = theirs_filled(DPT_HYBRID, network)
    image = randn(1, 3, 384, 384)
    assert relative_error(network(image), model(image).predicted_depth[:, None]) <= FULL
    image = randn(1, 3, 384, 576, seed=1)
    assert relative_error(network(image), theirs_at_any_size(model, image)) <= FULL


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_table_has_the_names_and_shapes_of_the_network_and_of_transformers(config):
    table = list(depth_parameters(config))
    with torch.device("meta"):
        network = DepthNetwork(config)
    assert {p.ours: p.shape for p in table} == {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert len({p.ours for p in table}) == len(table)
    theirs = {p.diffusers: p.shape for p in (*table, *unused_parameters(config)) if p.diffusers}
    assert theirs == {name: tuple(values.shape) for name, values in transformers_dpt(config).state_dict().items()}


def original_shapes(parameters):
    """By original name; parameters that are parts of one tensor lie below each other."""
    whole = {part: name for name, parts in fused_names(DPT_HYBRID).items() for part in parts}
    shapes = {}
    for parameter in parameters:
        first, *rest = parameter.shape
        name = whole.get(PREFIX + parameter.original, PREFIX + parameter.original).removeprefix(PREFIX)
        shapes[name] = (shapes.get(name, (0,))[0] + first, *rest)
    return shapes


def test_every_original_tensor_is_named_and_has_its_shape():
    text = (Path(__file__).parents[1] / "golden" / "depth-network.txt").read_text()
    rows = [line.split() for line in text.splitlines() if not line.startswith("#")]
    manifest = {name: tuple(map(int, shape.split("x"))) for name, _, shape in rows}
    assert PREFIX == "depth_model.model."
    used, unused = (original_shapes(found(DPT_HYBRID)) for found in (depth_parameters, unused_parameters))
    assert not used.keys() & unused.keys()
    assert {f"model.{name}": shape for name, shape in (used | unused).items()} == manifest
    assert len(manifest) == 368
    assert sum(map(math.prod, manifest.values())) == 123_146_985
    assert sum(math.prod(p.shape) for p in depth_parameters(DPT_HYBRID)) == 121_196_289


def test_queries_keys_and_values_are_thirds_of_the_original_in_that_order():
    ours = {PREFIX + p.original: p.ours for p in depth_parameters(NARROW)}
    assert len(ours) == len(list(depth_parameters(NARROW)))
    joined = {name: [ours[part] for part in parts] for name, parts in fused_names(NARROW).items()}
    assert joined == {
        f"{PREFIX}pretrained.model.blocks.{layer}.attn.qkv.{leaf}": [
            f"layers.{layer}.attention.{name}.{leaf}" for name in "qkv"
        ]
        for layer in range(4)
        for leaf in ("weight", "bias")
    }


def slow_standardised_conv(x, weight, stride):
    """One output at a time, from windows that the definition of "SAME" gives; outside the picture is 0."""
    outputs, _, kernel, _ = weight.shape
    height, width = x.shape[-2:]
    start = [-(max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) // 2) for side in (height, width)]
    made = torch.zeros(outputs, math.ceil(height / stride), math.ceil(width / stride), dtype=torch.float64)
    for channel in range(outputs):
        values = weight[channel].double()
        mean = values.sum() / values.numel()
        deviation = (((values - mean) ** 2).sum() / values.numel() + 1e-8) ** 0.5
        for row in range(made.shape[1]):
            for column in range(made.shape[2]):
                for i in range(kernel):
                    for j in range(kernel):
                        y, z = start[0] + row * stride + i, start[1] + column * stride + j
                        if 0 <= y < height and 0 <= z < width:
                            window = x[0, :, y, z].double() * (values[:, i, j] - mean) / deviation
                            made[channel, row, column] += window.sum()
    return made[None]


@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 2), (3, 1), (1, 2), (1, 1)])
@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
def test_standardised_convolution_is_the_slow_formula(kernel, stride, size):
    conv = StandardisedConv(2, 3, kernel, stride)
    conv.weight.data = 0.3 + randn(3, 2, kernel, kernel)
    x = randn(1, 2, *size, seed=1)
    torch.testing.assert_close(conv(x).double(), slow_standardised_conv(x, conv.weight, stride), rtol=1e-4, atol=1e-5)


def test_constant_weights_are_standardised_to_zero():
    conv = StandardisedConv(1, 1, 3)
    conv.weight.data.fill_(7.0)
    assert conv(torch.ones(1, 1, 4, 4)).abs().max() == 0


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "padding"),
    [(384, 7, 2, (2, 3)), (192, 3, 2, (0, 1)), (5, 3, 2, (1, 1)), (96, 3, 1, (1, 1)), (96, 1, 2, (0, 0))],
)
def test_even_sides_are_padded_more_at_their_end(side, kernel, stride, padding):
    before, after = padding
    padded = pad_same(torch.ones(1, 1, side, 4), kernel, stride, value=5.0)[0, 0, :, 2]
    assert padded.tolist() == before * [5] + side * [1] + after * [5]
    across = pad_same(torch.ones(1, 1, 4, side), kernel, stride, value=5.0)[0, 0, 2]
    assert across.tolist() == padded.tolist()


def test_windows_of_the_network_lie_where_the_weights_were_trained():
    """Which pixels the first value of a feature map sees; with as much padding on both sides, one row less."""
    stem, block = Stem(8, 8), Bottleneck(8, 32, 2, 8, first=True)
    for module, channels, side, seen in ((stem.conv, 3, 16, 5), (block.conv2, 8, 16, 3), (block.shortcut[0], 8, 16, 1)):
        x = torch.zeros(1, channels, side, side, requires_grad=True)
        with torch.enable_grad():
            module(x)[0, 0, 0, 0].backward()
        assert x.grad.abs().sum((0, 1, 2)).nonzero().max() + 1 == seen
    pixels = -torch.arange(1.0, 17).reshape(1, 1, 4, 4)  # the largest of a window is its first
    assert F.max_pool2d(pad_same(pixels, 3, 2, value=-torch.inf), 3, 2).flatten().tolist() == [-1, -3, -9, -11]


@pytest.mark.parametrize(("height", "width"), [(4, 4), (6, 4), (3, 5), (1, 9)])
def test_position_grid_is_resized_between_the_centres_of_its_cells(network, height, width):
    grid, side = network.position_embedding[0, 1:].reshape(4, 4, -1), NARROW.grid
    found = network.positions(height, width)
    assert torch.equal(found[0, 0], network.position_embedding[0, 0])  # of the class token
    for row in range(height):
        for column in range(width):
            y, x = (
                min(max((place + 0.5) * side / count - 0.5, 0), side - 1)
                for place, count in ((row, height), (column, width))
            )
            top, left = min(int(y), side - 2), min(int(x), side - 2)
            above, below = (grid[r, left] * (1 - x + left) + grid[r, left + 1] * (x - left) for r in (top, top + 1))
            expected = above * (1 - y + top) + below * (y - top)
            torch.testing.assert_close(found[0, 1 + row * width + column], expected, rtol=1e-4, atol=1e-5)


def feature_map(x):
    """Tokens as the feature map that they stand for, without the class token."""
    return x if x.dim() == 4 else x[:, 1:].transpose(1, 2).unflatten(-1, (24, 24))


def test_docstring_shows_the_channels_and_scales_of_dpt_hybrid():
    rows = re.findall(r"^    ([\w.-]+) +.*? (\d+) -> +(\d+)  1/(\d+)", depth.__doc__, re.M)
    assert len(rows) == 10
    with torch.device("meta"):
        network, image, seen = DepthNetwork(DPT_HYBRID), torch.empty(1, 3, 384, 384), {}
    for name, *_ in rows:
        module = network.get_submodule(re.sub(r"\d+-(\d+)", r"\1", name))  # the last one of a row for several
        module.register_forward_hook(lambda _, args, x, row=name: seen.update({row: (args[0], x)}))
    network(image)
    for name, before, width, scale in rows:
        x, made = map(feature_map, seen[name])
        assert (x.shape[1], *made.shape[1:]) == (int(before), int(width), *2 * (384 // int(scale),)), name


def test_norms_have_the_eps_of_the_original(network):
    layer_norms = {module.eps for module in network.modules() if isinstance(module, torch.nn.LayerNorm)}
    group_norms = {module.eps for module in network.modules() if isinstance(module, torch.nn.GroupNorm)}
    assert (layer_norms, group_norms) == ({1e-6}, {1e-5})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(network, dtype):
    image = randn(1, 3, 64, 96)
    rough = filled(NARROW).to(dtype)(image.to(dtype))
    assert rough.dtype == dtype
    assert rough.isfinite().all()
    assert error(rough, network(image.double())) <= (0.02 if dtype == torch.float16 else 0.1)


def test_depth_is_as_large_as_the_picture_and_never_negative(network):
    found = network(randn(2, 3, 64, 32, dtype=torch.float64))
    assert found.shape == (2, 1, 64, 32)
    assert found.min() >= 0


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 40), (33, 32)])
def test_other_sides_are_refused(network, height, width):
    with pytest.raises(ValueError, match=f"multiples of 32 for the depth network, got {width}x{height}"):
        network(torch.zeros(1, 3, height, width, dtype=torch.float64))
