"""The course's plots, drawn with matplotlib: each function returns the bytes of one SVG, always the same."""

import csv
import io
from pathlib import Path

import torch
from torch import Tensor

from convert.layouts.names import parameter_shapes
from sd.config import SD_V1
from sd.networks.attention import Attention
from sd.networks.unet import timestep_embedding
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.sampling.samplers import find_sampler
from sd.sampling.schedule import (
    add_noise,
    alpha_bar_of,
    alphas_cumprod,
    sampling_steps,
    sigma_of,
    steps_through,
)
from sd.training.losses import velocity
from sd.training.shapes.drawing import ShapesDataset
from sd.training.shapes.stages import STAGES

PROMPT = "a red circle on a blue background"
SETTINGS = {"svg.hashsalt": "sd-zoo", "svg.fonttype": "path", "font.size": 10, "axes.grid": True, "grid.alpha": 0.3}
SHADES = ("tab:gray", "tab:orange", "tab:green", "tab:blue")
UNET_STAGES = [stage.name for stage in STAGES if stage.trains == "unet"]
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "fontsize": 9}  # a legend under its axes
WITHOUT_DATE = {"Date": None, "Creator": None}


def drawn(draw, rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (5.2, 3)) -> bytes:
    """Call `draw` with all axes, row by row, and return their figure as SVG.

    size  in inches; not wider than the default, so that the letters are large enough on a phone
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        draw(*figure.subplots(rows, columns, squeeze=False).flat)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata=WITHOUT_DATE)
    return file.getvalue()


def pairs_of_places() -> bytes:
    """Chapter 1: the number of pairs that attention computes."""
    sides = [64, 128, 256, 512, 1024]
    factor = SD_V1.vae.factor

    def draw(axes):
        axes.loglog(sides, [side**4 for side in sides], marker="o", label="pixels")
        axes.loglog(sides, [(side // factor) ** 4 for side in sides], marker="o", label="latents")
        axes.set(xlabel="side of the picture, pixels", ylabel="pairs of places", xticks=sides)
        axes.set_xticks(sides, [str(side) for side in sides])
        axes.minorticks_off()
        axes.legend()

    return drawn(draw)


def some_latents(model: StableDiffusion, count: int) -> tuple[Tensor, list[str]]:
    """Scaled latents (count, 4, H, W) of combinations that training never showed, and their captions."""
    shapes = ShapesDataset(0, model.config.native_size, held_out=True)
    pictures, captions = shapes.batch(0, count)
    return model.encode_image(pictures), captions


def latent_values(model: StableDiffusion) -> bytes:
    """Chapter 2: the distribution of the scaled latents."""
    latents, _ = some_latents(model, 24)
    grid = torch.linspace(-4, 4, 200)

    def draw(axes):
        for i, channel in enumerate(latents.transpose(0, 1).flatten(1), 1):
            axes.hist(channel.tolist(), bins=grid[::4].tolist(), density=True, histtype="step", label=f"channel {i}")
        normal = torch.exp(-(grid**2) / 2) / (2 * torch.pi) ** 0.5
        axes.plot(grid.tolist(), normal.tolist(), color="black", linestyle="--", label="standard normal")
        axes.set(xlabel="value, scaled", ylabel="density")
        axes.legend(**BELOW, ncols=3)

    return drawn(draw, size=(5.2, 3.6))


def causal_attention(model: StableDiffusion) -> bytes:
    """Chapter 3: which tokens each token attends to, the mean over the heads of each layer."""
    tokens = model.tokenizer.tokenize(PROMPT)
    count = tokens.length
    words = ["start", *(text.strip() for _, text in model.tokenizer.pieces_of(tokens.ids[1 : count - 1])), "end"]
    encoder = model.text_encoder
    x = encoder.token_embedding(torch.tensor([tokens.ids])) + encoder.position_embedding.weight
    maps = []
    for layer in encoder.layers:
        maps.append(causal_shares(layer.attention, layer.norm1(x))[:count, :count])
        x = layer(x)

    rows = (len(maps) + 1) // 2

    def draw(*row):
        for axes in row[len(maps) :]:
            axes.set_visible(False)
        for i, (axes, shares) in enumerate(zip(row, maps, strict=False), 1):
            axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
            axes.set_title(f"layer {i}", fontsize=10)
            axes.set_xticks(range(count), words, rotation=90)
            axes.set_yticks(range(count), words if i % 2 else [""] * count)
            axes.tick_params(labelsize=8.5)
            axes.grid(False)
        for left in row[::2]:
            left.set_ylabel("this token ...")
        for axes in row[-2:]:
            axes.set_xlabel("... takes from these")

    return drawn(draw, rows, 2, size=(5.2, 2.9 * rows))


def causal_shares(attention: Attention, x: Tensor) -> Tensor:
    """(1, T, D) -> (T, T): the softmax of Vaswani et al. (2017), eq. 1; each token attends to those up to it."""
    q, k = (t[0].unflatten(-1, (attention.heads, -1)).transpose(0, 1) for t in (attention.q(x), attention.k(x)))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(dim=-1).mean(dim=0)


def timestep_embeddings() -> bytes:
    """Chapter 4: four waves of the timestep embedding, and all of them as a picture."""
    width = SD_V1.unet.width
    embedding = timestep_embedding(torch.arange(1000), width)

    def draw(upper, lower):
        for wave in (32, 48, 64, 96):
            upper.plot(embedding[:200, wave].tolist(), label=f"cosine {wave}")
        upper.set(xlabel="timestep (the first 200)", ylabel="value")
        upper.legend(fontsize=8, loc="lower right")
        lower.imshow(
            embedding[::10, ::2].T.numpy(), aspect="auto", cmap="RdBu", extent=(0, 999, width, 0), interpolation="none"
        )
        lower.set(xlabel="timestep", ylabel="number: cosines, then sines")
        lower.grid(False)

    return drawn(draw, rows=2, size=(5.2, 5.6))


def noise_levels() -> bytes:
    """Chapter 5: the training schedule, and the levels that samplers visit."""
    table = alphas_cumprod(SD_V1.schedule)

    def draw(upper, lower):
        upper.plot(table.tolist(), label="alpha_bar, the picture's share of the power")
        upper.plot((1 - table).tolist(), label="1 - alpha_bar, the noise's")
        upper.set(xlabel="timestep", ylim=(0, 1))
        upper.legend(fontsize=8, loc="center right")
        for schedule in ("leading", "trailing", "karras"):
            steps = sampling_steps(table, 10, schedule=schedule)
            sigmas = [sigma_of(step.alpha_bar).item() for step in steps]
            lower.semilogy(range(1, 11), sigmas, marker="o", markersize=4, label=schedule)
        lower.set(xlabel="step", ylabel="sigma before the step")
        lower.legend(fontsize=8)

    return drawn(draw, rows=2, size=(5.2, 5.6))


def sampler_errors() -> bytes:
    """Chapter 5: the error of samplers on normally distributed data, for which the exact curve is known.

    The best prediction of eps is its mean given x_t, a linear function of x_t. Along the exact curve, the distance from
    the mean, in standard deviations of x_t, stays constant.
    """
    mean, deviation = 0.7, 0.4
    table = alphas_cumprod(SD_V1.schedule)
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def spread(alpha_bar: Tensor) -> Tensor:
        return (alpha_bar * deviation**2 + 1 - alpha_bar).sqrt()

    def predict_eps(x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        return (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * mean) / spread(alpha_bar) ** 2

    def error(name: str, steps: int) -> float:
        sigmas = torch.linspace(10, 0.1, 2, dtype=torch.float64).log()
        alpha_bars = alpha_bar_of(torch.linspace(sigmas[0], sigmas[1], steps + 1, dtype=torch.float64).exp())
        *_, end = find_sampler(name)(predict_eps, x, steps_through(table, alpha_bars))
        first, last = alpha_bars[0], alpha_bars[-1]
        true = last.sqrt() * mean + (x - first.sqrt() * mean) / spread(first) * spread(last)
        return (end - true).square().mean().sqrt().item()

    def draw(axes):
        for name, predictions in (("euler", 1), ("heun", 2), ("plms", 1), ("dpmpp_2m", 1)):
            steps = [count // predictions for count in (4, 8, 16, 32, 64, 128)]
            errors = [error(name, count) for count in steps]
            axes.loglog([count * predictions for count in steps], errors, marker="o", markersize=4, label=name)
        axes.set(xlabel="predictions of the network", ylabel="error")
        axes.legend()

    return drawn(draw)


def guidance_arrows() -> bytes:
    """Chapter 6: the formula as arrows, with made-up numbers."""
    without, with_prompt = torch.tensor([1.0, 0.35]), torch.tensor([1.25, 0.75])
    guided = without + 3 * (with_prompt - without)

    def draw(axes):
        def arrow(start, end, colour, style="-"):
            options = {"arrowstyle": "-|>", "color": colour, "linestyle": style, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", end.tolist(), start.tolist(), arrowprops=options)

        zero = torch.zeros(2)
        arrow(zero, without, "tab:blue")
        arrow(zero, with_prompt, "tab:orange")
        arrow(with_prompt, guided, "tab:green", "--")
        arrow(without, with_prompt, "grey")
        arrow(zero, guided, "tab:green")
        for point, words, colour in (
            (without, " without prompt: s = 0", "tab:blue"),
            (with_prompt, " with prompt: s = 1", "tab:orange"),
            (guided, " guided: s = 3", "tab:green"),
        ):
            axes.text(*point.tolist(), words, color=colour, va="top")
        axes.set(xlim=(-0.1, 2.8), ylim=(-0.1, 1.7), aspect="equal", xticks=[], yticks=[])

    return drawn(draw, size=(5.2, 3.2))


def training_loss(folder: Path) -> bytes:
    """Chapter 7: the log of the UNet's training, stage after stage.

    Raises FileNotFoundError without the loss.csv of any of its stages.
    """
    losses: list[float] = []
    ends = {}  # of the stages
    for stage in UNET_STAGES:
        log = folder / stage / "loss.csv"
        if not log.exists():
            raise FileNotFoundError(f"{log} does not exist; scripts/training/train_tiny.py writes it")
        with open(log, newline="") as file:
            losses += [float(row["loss"]) for row in csv.DictReader(file)]
        ends[stage] = len(losses)
    part = max(1, len(losses) // 400)  # steps per point
    means = [sum(losses[i : i + part]) / len(losses[i : i + part]) for i in range(0, len(losses), part)]
    lowest, highest = 0.8 * min(means), 1.25 * max(means)

    def draw(axes):
        axes.semilogy(range(0, len(losses), part), means, linewidth=1, color="black")
        start = 0
        for (stage, end), colour in zip(ends.items(), SHADES, strict=False):
            axes.axvspan(start, end, facecolor=colour, alpha=0.35, linewidth=0, label=stage.replace("-", " "))
            start = end
        axes.set(xlabel="step", ylabel=f"loss, mean of {part} steps" if part > 1 else "loss", ylim=(lowest, highest))
        ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if lowest < tick < highest]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.set_minor_formatter("")
        axes.margins(x=0)
        axes.grid(False)
        axes.legend(**BELOW, ncols=3, title="what the pictures show", title_fontsize=9)

    return drawn(draw, size=(5.2, 4))


def loss_by_timestep(model: StableDiffusion) -> bytes:
    """Chapter 7: the trained model's error at each timestep, as error in v, in eps and in x_0."""
    latents, captions = some_latents(model, 16)
    table = alphas_cumprod(model.config.schedule)
    context = model.text_encoder(model.tokenizer(captions))
    timesteps = [0, 10, 25, 50, 100, 150, 250, 400, 550, 700, 800, 900, 950, 999]
    errors = []
    for timestep in timesteps:
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(timestep))
        output = model.unet(add_noise(latents, noise, table[timestep]), torch.tensor(timestep), context)
        if model.config.prediction == "v":
            error = (output - velocity(latents, noise, table[timestep])).square().mean()
        else:
            error = (output - noise).square().mean() / table[timestep]
        errors.append(error.item())
    alpha_bars = [table[timestep].item() for timestep in timesteps]

    def draw(axes):
        axes.plot(timesteps, errors, marker="o", markersize=4, label="v")
        eps = [alpha_bar * error for alpha_bar, error in zip(alpha_bars, errors, strict=True)]
        axes.plot(timesteps, eps, marker="o", markersize=4, label="eps")
        x_0 = [(1 - alpha_bar) * error for alpha_bar, error in zip(alpha_bars, errors, strict=True)]
        axes.plot(timesteps, x_0, marker="o", markersize=4, label="x_0")
        axes.set(xlabel="timestep", ylabel="mean squared error")
        axes.legend()

    return drawn(draw)


def checkpoint_bytes() -> bytes:
    """Chapter 9: the size of a v1 file by component."""
    sizes: dict[str, int] = {}
    for name, shape in sorted(parameter_shapes(SD_V1).items()):
        component = name.partition(".")[0]
        sizes[component] = sizes.get(component, 0) + torch.Size(shape).numel()
    files = {  # bytes per number, and whether the file also has the averaged weights of the UNet
        "float32, with\naveraged weights": (4, True),
        "float32": (4, False),
        "float16": (2, False),
    }

    def draw(axes):
        for row, (size, averaged) in enumerate(files.values()):
            begin = 0.0
            parts = [("UNet", "unet"), ("averaged UNet", "unet")][: 1 + averaged]
            parts += [("text encoder", "text_encoder"), ("VAE", "vae")]
            for colour, (label, component) in zip(_colours(averaged), parts, strict=True):
                length = sizes[component] * size / 1e9
                axes.barh(row, length, left=begin, color=colour, label=label if row == 0 else None)
                begin += length
            axes.text(begin, row, f" {begin:.1f} GB", va="center")
        axes.set_yticks(range(len(files)), files)
        axes.set(xlabel="GB", xlim=(0, 9.5))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.legend(**BELOW, ncols=2)

    return drawn(draw, size=(5.2, 3.6))


def _colours(averaged: bool) -> list[str]:
    return ["#f2b866", *["#f6dcb4"] * averaged, "#b7d8b0", "#d9b8dc"]
