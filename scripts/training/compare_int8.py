"""Measure what `--precision int8` changes: predictions, by kind of layer, and pictures.

    python scripts/training/compare_int8.py                           # the embedded model, minutes
    python scripts/training/compare_int8.py --predictions 0 --pictures 224
    python scripts/training/compare_int8.py --model model.ckpt --size 512 --timesteps 600 --predictions 1 --single 0

Predictions: the embedded model's VAE encodes pictures of drawn shapes, and noise is added. The UNet predicts from them
and their captions, with guidance; the error is |a - b| / |b| for predictions a and those in fp32, b. First only one
kind of layer computes in 8 bits, all else in fp32. Its inputs have one scale for the whole array ("array"), for each
token or position ("row"), or for each tile and point ("tile", 3x3 convolutions from 256x256 pixels); a star marks what
`--precision int8` does. Then the whole UNet, as int8 and bf16 run it, and the single layers with the largest errors.

Pictures: their PSNR to those in fp32, and the share that is right, which plain image analysis decides.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from score_tiny import make
from torch import Tensor, nn
from tqdm import tqdm
from training_command import parser_of, run

import sd
from sd.networks.unet import UNet
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.runtime.cpu import int8
from sd.runtime.cpu.int8 import Int8Conv2d, Int8Linear, WinogradIn8Bits
from sd.runtime.patching import patched
from sd.sampling.schedule import add_noise, alphas_cumprod
from sd.study.benchmark.table import markdown
from sd.study.forward_process import psnr
from sd.training.shapes.drawing import ShapesDataset
from sd.training.shapes.scoring import Request, one_thing, shares, verdicts

Forward = Callable[[Tensor], Tensor]
Forwards = dict[nn.Module, Forward]
SEED = 25  # of the pictures and the noise
ARRAY, ROW, TILE = "array", "row", "tile"


class Input(NamedTuple):
    """Of the UNet: what it is given to predict the noise in one picture with guidance.

    x        (2, 4, H, W) twice the same
    context  (2, 77, D) of the empty prompt and the caption
    """

    x: Tensor
    timestep: Tensor
    context: Tensor


def inputs_of(model: StableDiffusion, vae: StableDiffusion, size: int, timestep: int, count: int) -> list[Input]:
    """The first pictures of the drawn shapes, in a square of that many pixels, noised for that timestep."""
    images, captions = ShapesDataset(SEED, size, held_out=True).batch(0, count)
    generator = torch.Generator("cpu").manual_seed(SEED + timestep)
    alpha_bar = alphas_cumprod(model.config.schedule)[timestep]
    inputs = []
    for image, caption in zip(images, captions, strict=True):
        x_0 = vae.encode_image(image[None])
        noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float32, device="cpu")
        x_t = add_noise(x_0, noise, alpha_bar).expand(2, -1, -1, -1)
        inputs.append(Input(x_t, torch.tensor(timestep), model.encode_prompts(["", caption])))
    return inputs


def kind_of(name: str) -> str:
    """What a layer of `make_int8` is, by its name."""
    *path, last = name.split(".")
    if "feed_forward" in path:
        return "value and gate" if last == "proj_in" else "hidden values"
    kinds = dict.fromkeys("qkv", "q, k, v") | dict.fromkeys(("conv1", "conv2"), "3×3 convolutions")
    return (kinds | {"skip": "shortcuts", "conv": "resampling"}).get(last, last)


def as_linear(layer: nn.Linear | nn.Conv2d) -> Int8Linear:
    """A linear layer or 1x1 convolution as one that computes in 8 bits, with a bias."""
    outputs, inputs = layer.weight.shape[:2]
    linear = Int8Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(layer.weight.flatten(1), requires_grad=False)
    linear.bias = nn.Parameter(torch.zeros(outputs) if layer.bias is None else layer.bias, requires_grad=False)
    return linear


def in_8_bits(layer: nn.Linear | nn.Conv2d, way: str) -> Forward:
    """A forward function for inputs in fp32, which are rounded to bf16 before, as they are in `--precision int8`."""
    if isinstance(layer, Int8Conv2d):
        return lambda x: Int8Conv2d.forward(layer, x.to(torch.bfloat16)).to(torch.float32)
    linear = as_linear(layer)

    def forward(x: Tensor) -> Tensor:
        """(..., D) -> (..., N)"""
        x = x.to(torch.bfloat16)
        if way == ROW:
            rows = x.flatten(0, -2).contiguous()
            return linear.by_token(rows, torch.ones_like(rows)).unflatten(0, x.shape[:-1]).to(torch.float32)
        return linear(x).to(torch.float32)

    return forward if isinstance(layer, nn.Linear) else lambda x: forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class BetweenFloats(WinogradIn8Bits):
    """For inputs and results in fp32."""

    def compute(self, x: Tensor, weights: tuple, bias: Tensor, upsampled: bool) -> Tensor:
        return super().compute(x.to(torch.bfloat16), weights, bias.to(torch.bfloat16), upsampled).to(torch.float32)


def shortcuts_of(unet: UNet) -> dict[str, nn.Conv2d]:
    """The 1x1 convolutions beside residual blocks, which `--precision int8` leaves in bf16."""
    return {name: each for name, each in unet.named_modules() if name.endswith(".skip") and isinstance(each, nn.Conv2d)}


def used(name: str) -> str:
    """The way in which `--precision int8` computes a layer, if not by Winograd's algorithm."""
    return {"hidden values": ROW, "shortcuts": ""}.get(kind_of(name), ARRAY)


def groups(unet: UNet, layers: dict[str, nn.Module], latents: int) -> Iterator[tuple[str, str, Forwards]]:
    """Kind; way, with a star if it is the one used; and the forward functions that compute so."""
    tiles = BetweenFloats(unet, keep=False)
    fast = tiles.forwards(torch.empty(0, dtype=torch.bfloat16), latents)
    for kind in dict.fromkeys(map(kind_of, layers)):
        mine = {name: layer for name, layer in layers.items() if kind_of(name) == kind}
        name, layer = next(iter(mine.items()))
        of_kind = {layer: fast[layer] for layer in fast if tiles.layers[layer] in mine.values()}
        for way in (ARRAY,) if isinstance(layer, Int8Conv2d) else (ARRAY, ROW):
            star = "*" if way == used(name) and not of_kind else ""
            yield kind, way + star, {layer: in_8_bits(layer, way) for layer in mine.values()}
        if of_kind:
            rest = set(mine.values()) - {tiles.layers[layer] for layer in of_kind}
            yield kind, TILE + "*", of_kind | {layer: in_8_bits(layer, ARRAY) for layer in rest}
    for way in (ARRAY, ROW):
        yield "all of these", way, {layer: in_8_bits(layer, way) for layer in layers.values()}
    yield (
        "all but shortcuts",
        "*",
        {layer: in_8_bits(layer, used(name)) for name, layer in layers.items() if used(name)},
    )


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


Cases = list[list[tuple[Input, Tensor]]]  # for each timestep: inputs, and what the UNet predicts in fp32


def errors(cases: Cases, predict: Callable[..., Tensor]) -> list[float]:
    """For each timestep, the mean over its inputs."""
    return [statistics.mean(distance(predict(*given), exact) for given, exact in each) for each in cases]


def row(*cells: str, values: list[float]) -> list[str]:
    return [*cells, *(f"{100 * value:.2f} %" for value in values)]


def of_layers(unet: UNet, cases: Cases, single: int) -> tuple[list[list[str]], list[list[str]]]:
    """Rows for kinds of layers, and for that many single layers with the first input of each timestep."""
    layers, rows, found = int8.make_int8(unet), [], []
    for layer in layers.values():
        vars(layer).pop("_packed", None)  # for fp32
    layers |= shortcuts_of(unet)
    latents = cases[0][0][0].x.shape[-2:].numel()
    for kind, way, forwards in tqdm(groups(unet, layers, latents), unit="kind", leave=False):
        with patched(forwards):
            rows.append(row(kind, way, values=errors(cases, unet)))
    first = [each[:1] for each in cases]
    for name, layer in tqdm(layers.items() if single else (), unit="layer", leave=False):
        with patched({layer: in_8_bits(layer, used(name) or ROW)}):
            found.append((errors(first, unet), name))
    worst = sorted(found, key=lambda pair: -statistics.mean(pair[0]))[:single]
    return rows, [row(name, kind_of(name), values=values) for values, name in worst]


def of_whole(path: Path | None, precision: str, cases: Cases) -> list[str]:
    model = sd.load(path, device="cpu", precision=precision)

    def predict(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        given = x.to(torch.bfloat16), timestep, context.to(torch.bfloat16)
        return model.runner.predict(model.unet, *given, predictions=2).to(torch.float32)

    with model.runner.at_work(model.unet):
        return row(f"the whole UNet, {precision}", "", values=errors(cases, predict))


@torch.no_grad()
def predictions(path: Path | None, size: int | None, timesteps: Sequence[int], count: int, single: int) -> str:
    """Two tables: of kinds of layers and the whole UNet, and of single layers. One model at a time is in memory."""
    model = sd.load(path, device="cpu", precision="fp32")
    if model.config.unet.vector_width or model.config.unet.in_channels != model.config.vae.latent_channels:
        raise ValueError(f"{path} reads more than latents and text. Give a checkpoint of another family.")
    vae, size = sd.load(device="cpu", precision="fp32") if path else model, size or model.config.native_size
    cases = []
    for timestep in timesteps:
        inputs = inputs_of(model, vae, size, timestep, count)
        cases.append([(given, model.unet(*given)) for given in inputs])
    rows, worst = of_layers(model.unet, cases, single)
    del model, vae
    rows += [of_whole(path, precision, cases) for precision in ("int8", "bf16")]
    head = [f"t = {timestep}" for timestep in timesteps]
    kinds = markdown(["in 8 bits", "a scale for each", *head], rows)
    return kinds + "\n" + markdown(["layer", "kind", *head], worst) if single else kinds


def pictures(path: Path | None, count: int, steps: int) -> str:
    """A table: for each precision, PSNR to the pictures in fp32, and the share of right ones."""
    requests, exact, rows = one_thing(4)[:count], [], []
    for precision in ("fp32", "int8"):
        made = make(sd.load(path, device="cpu", precision=precision), requests, {"steps": steps})
        exact = exact or made
        near = [psnr(*pair) for pair in zip(made, exact, strict=True)]
        values = (
            [f"{value:.1f} dB" for value in (statistics.median(near), min(near))] if made is not exact else ["", ""]
        )
        rows.append([precision, *values, right(made, requests)])
    return markdown(["precision", "PSNR to fp32, median", "the least", f"right, of {count}"], rows)


def right(made: Sequence[Image.Image], requests: Sequence[Request]) -> str:
    return f"{100 * shares(list(verdicts(made, requests)))['all']:.1f} %"


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--model", type=Path, metavar="FILE", help="a checkpoint (default: the embedded model)")
    add("--size", type=int, metavar="PIXELS", help="side of the drawn pictures (default: the model's)")
    add("--timesteps", type=int, nargs="+", default=[900, 600, 300, 50], metavar="T", help="(default: 900 600 300 50)")
    add("--predictions", type=int, default=4, help="at each timestep, of different pictures (default: %(default)s)")
    add("--single", type=int, default=8, metavar="N", help="show the N most sensitive layers (default: %(default)s)")
    add(
        "--pictures",
        type=int,
        default=0,
        metavar="N",
        help="compare pictures of N prompts, at most 224 (default: none)",
    )
    add("--steps", type=int, default=20, help="of these pictures (default: %(default)s)")
    args = parser.parse_args(arguments)
    int8.require_int8(torch.device("cpu"))
    if not all(0 <= timestep < 1000 for timestep in args.timesteps):
        raise ValueError(f"timesteps are from 0 to 999, got {args.timesteps}")
    if args.predictions < 1 and not 1 <= args.pictures <= 224:
        raise ValueError("nothing to compare: give --predictions or --pictures, at most 224")
    if args.predictions:
        print(predictions(args.model, args.size, args.timesteps, args.predictions, args.single))
    if args.pictures:
        print(pictures(args.model, args.pictures, args.steps))


if __name__ == "__main__":
    run(main)
