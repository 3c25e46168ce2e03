"""The record of a run as plain data: all numbers, previews and heat maps that the page shows."""

import base64
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from PIL import Image, features
from torch import Tensor

from sd.pipeline.image.depth_maps import colour_picture
from sd.pipeline.image.tensors import png_bytes, to_images
from sd.pipeline.runner import NonFiniteError, dtype_of, widen
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.sampling.schedule import sigma_of
from sd.study.explain.attention import Heat
from sd.study.explain.formulas import formulas
from sd.study.explain.recording import Run, StepRecord

LARGE, SMALL = 192, 112  # longest side of previews, in pixels
QUALITY = 55
LARGEST_PNG = 900_000  # bytes; larger pictures are compressed with losses
CURVE_POINTS = 101


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs that differ in one setting."""

    name: str  # of the setting
    labels: tuple[str, ...]  # its values
    runs: tuple[Run, ...]


def report(
    model: StableDiffusion,
    run: Run,
    comparisons: Sequence[Comparison] = (),
    *,
    texts: dict[str, str] | None = None,
    on_preview: Callable[[], object] = lambda: None,
) -> dict:
    """Everything on the page, ready for JSON.

    texts       stored in the picture; by default its settings
    on_preview  called after each decoded preview, `preview_count` times
    """

    def preview(latents: Tensor, side: int) -> str:
        uri = data_uri(decoded(model, latents), side)
        on_preview()
        return uri

    return {
        "settings": run.settings.to_dict(),
        "prediction": run.prediction,
        "model": {"name": model.source.name, "sha256": model.source.sha256(), "family": model.config.family},
        "empty_prompt": "zeros" if model.config.text_encoder_2 else "encoded",  # a negative one: see `vectors_for`
        "precision": {part: str(dtype).removeprefix("torch.") for part, dtype in model.dtypes.items()},
        "device": model.device.type,
        "milliseconds": run.milliseconds,
        "picture": final_picture(run, model.texts(run.settings) if texts is None else texts),
        "vectors": vectors_picture(run),
        "vector_width": run.context.shape[-1],
        "latents": latents_picture(run.steps[-1].after),
        "given": given_pictures(run),
        "noise_norm": math.sqrt(run.steps[0].x_t.numel()),  # of pure noise, about
        "curve": curve(run.table),
        "strips": [asdict(strip) for strip in run.strips],
        "resolutions": [resolution(heat) for heat in run.steps[0].heats],
        "shares": [mean_shares(run, i) for i in range(len(run.strips))],
        "steps": list(step_reports(run, preview)),
        "comparisons": [
            {
                "name": comparison.name,
                "runs": [
                    {
                        "label": label,
                        "settings": one.settings.to_dict(),
                        "picture": data_uri(one.picture, LARGE),
                        "steps": [
                            {"timestep": step.timestep, "picture": preview(step.x_0, LARGE)} for step in one.steps
                        ],
                    }
                    for label, one in zip(comparison.labels, comparison.runs, strict=True)
                ],
            }
            for comparison in comparisons
        ],
    }


def preview_count(steps: int, predictions: int, compared: Iterable[int]) -> int:
    """How many pictures a report decodes.

    predictions  of the network in each step: 1 to 3
    compared     the number of steps of each run in comparisons
    """
    return steps * {1: 3, 2: 5, 3: 6}[predictions] + sum(compared)


def shown(step: StepRecord) -> dict[str, tuple[Tensor, int]]:
    """What the page shows of a step: latents, and the side of their preview."""
    found = {"x_t": (step.x_t, SMALL), "x_0": (step.x_0, LARGE), "with_prompt": (step.with_prompt, SMALL)}
    if step.difference is not None:
        enlarged = -enlargement(step.difference) * step.difference  # less noise there: more picture
        found |= {"without_prompt": (step.without_prompt, SMALL), "difference": (enlarged, SMALL)}
    if step.without_picture is not None:
        found["without_picture"] = step.without_picture, SMALL
    return found


def enlargement(difference: Tensor) -> float:
    """The factor by which the preview of a difference exaggerates it."""
    return 1 / max(difference.square().mean().sqrt().item(), 1e-12)


def step_reports(run: Run, preview: Callable[[Tensor, int], str]) -> Iterator[dict]:
    for step, formula in zip(run.steps, formulas(run.settings, run.plan), strict=True):
        alpha_bars = torch.tensor([step.alpha_bar, step.alpha_bar_prev], dtype=torch.float64, device="cpu")
        sigma, sigma_prev = sigma_of(alpha_bars).tolist()
        names = ("x_t", "x_0", "with_prompt", "guided", "without_prompt", "without_picture", "difference")
        norms = {name: latents for name in names if (latents := getattr(step, name)) is not None}
        yield {
            "number": step.number,
            "timestep": step.timestep,
            "alpha_bar": step.alpha_bar,
            "alpha_bar_prev": step.alpha_bar_prev,
            "sigma": sigma,
            "sigma_prev": sigma_prev,
            "signal_to_noise": 1 / sigma**2,
            "milliseconds": step.milliseconds,
            "norms": {name: latents.norm().item() for name, latents in norms.items()},
            "difference_enlarged": None if step.difference is None else enlargement(step.difference),
            "formula": asdict(formula),
            "strip": step.text,
            "shares": shares(step.heats, run.strips[step.text].words),
            **packed(step.heats),
            "pictures": {name: preview(latents, side) for name, (latents, side) in shown(step).items()},
        }


def resolution(heat: Heat) -> dict:
    heads, _, height, width = heat.weights.shape
    return {
        "height": heat.height,
        "width": heat.width,
        "layers": heat.layers,
        "heads": heads,
        "stored": [height, width],
    }


def shares(heats: Sequence[Heat], words: Sequence[Sequence[int]]) -> list[list[float]]:
    """How much of all attention each word gets: a row per resolution, then one for all layers. Rows sum to 1."""
    if not heats:
        return []
    by_column = [heat.weights.mean(dim=(0, 2, 3)) for heat in heats]
    layers = sum(heat.layers for heat in heats)
    by_column.append(sum(heat.layers * row for heat, row in zip(heats, by_column, strict=True)) / layers)
    return [[row[list(word)].sum().item() for word in words] for row in by_column]


def mean_shares(run: Run, strip: int) -> list[list[float]]:
    """The mean of `shares` over all steps that have this strip as prompt."""
    rows = [shares(step.heats, run.strips[strip].words) for step in run.steps if step.text == strip]
    return torch.tensor(rows, dtype=torch.float64, device="cpu").mean(dim=0).tolist() if rows[0] else []


def packed(heats: Sequence[Heat]) -> dict:
    """The maps of a step as bytes: the rows of each map, by resolution, head and column; 255 is the column's peak.

    peaks  for each resolution and column, the weight that 255 stands for: the largest of all heads
    maps   base64
    """
    peaks = [heat.weights.amax(dim=(0, 2, 3)).clamp(min=1e-12) for heat in heats]
    whole = [
        (255 * heat.weights / peak[:, None, None]).round().to(torch.uint8).numpy().tobytes()
        for heat, peak in zip(heats, peaks, strict=True)
    ]
    return {"peaks": [peak.tolist() for peak in peaks], "maps": base64.b64encode(b"".join(whole)).decode()}


def curve(table: Tensor) -> list[list[float]]:
    """Points of the schedule: timestep and alpha_bar."""
    places = torch.linspace(0, len(table) - 1, CURVE_POINTS, dtype=torch.float32, device="cpu").round().long()
    return [[place, table[place].item()] for place in places.tolist()]


def decoded(model: StableDiffusion, latents: Tensor) -> Image.Image:
    """A preview. If noise overflows a decoder in half precision, it switches to float32."""
    try:
        return model.decode(latents.to(model.device, torch.float32))[0]
    except NonFiniteError as error:
        if dtype_of(error.network) == torch.float32:
            raise
        widen(error.network)
        return decoded(model, latents)


def data_uri(picture: Image.Image, side: int, quality: int = QUALITY) -> str:
    """A picture as a data URI, at most `side` pixels along each side."""
    picture = picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    form = "WEBP" if features.check("webp") else "JPEG"
    file = io.BytesIO()
    picture.save(file, form, quality=quality)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def given_pictures(run: Run) -> list[dict]:
    """The picture that the run begins with, and the depth that the UNet reads."""
    if run.start is None or run.start.image is None:
        return []
    (picture,) = to_images(run.start.image)
    about = "the picture to edit" if run.settings.image_guidance is not None else "the picture it begins with"
    found = [{"uri": data_uri(picture, LARGE), "name": about}]
    if run.depth is not None:
        depth = colour_picture(run.depth, picture.size)
        found.append({"uri": data_uri(depth, LARGE), "name": "its depth as the network reads it: near is bright"})
    return found


def vectors_picture(run: Run) -> str:
    """The prompt's vectors in grey: a row for each token up to the end, and the first `SMALL` of its numbers."""
    used = [i for i, column in enumerate(run.strips[0].column_of) if run.strips[0].columns[column].kind != "padding"]
    rows = run.context[used, :SMALL]
    return grey((rows - rows.mean()) / (2 * rows.std()).clamp(min=1e-12))


def latents_picture(latents: Tensor) -> str:
    """The four channels of latents (1, 4, H, W) in grey: two above, two below."""
    channels = latents[0, :4] / (2 * latents[0, :4].std(dim=(1, 2), keepdim=True)).clamp(min=1e-12)
    return grey(channels.unflatten(0, (2, 2)).transpose(1, 2).flatten(2).flatten(0, 1))


def grey(values: Tensor) -> str:
    """A table of numbers (H, W), -1 is black and 1 is white, as a picture of one pixel each."""
    (picture,) = to_images(values.expand(1, 3, *values.shape))
    return data_uri(picture, LARGE, 90)


def final_picture(run: Run, texts: dict[str, str]) -> dict:
    """The picture itself: the exact PNG that other commands write, unless it is too large for a page."""
    png = png_bytes(run.picture, texts)
    exact = len(png) <= LARGEST_PNG
    uri = f"data:image/png;base64,{base64.b64encode(png).decode()}" if exact else data_uri(run.picture, 1024, 85)
    return {"uri": uri, "exact": exact, "width": run.picture.width, "height": run.picture.height}
