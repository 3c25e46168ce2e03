"""Measure a model on this machine: loading, text encoding, a guided step, decoding, a whole picture, memory.

Everything runs as for a picture, through `LatentDiffusion.sample` and `decode`. Times are in seconds.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sd.pipeline.latent_diffusion import LatentDiffusion
from sd.pipeline.settings import IMAGE_GUIDANCE, Settings
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.sampling.init_image import InitImage
from sd.study.benchmark.layer_kinds import LayerWatch, Profile, Rates, measure_rates
from sd.study.benchmark.memory import PeakMemory
from sd.study.clock import seconds_of, synchronize

PROMPT = "a photograph of an astronaut riding a horse"
WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One quantity, measured several times."""

    median: float
    shortest: float
    longest: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median=statistics.median(values), shortest=min(values), longest=max(values), count=len(values))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One batch of pictures, in seconds."""

    steps: tuple[float, ...]  # from the second on; the first also pays for the text and for set-up
    decode: float
    total: float  # from the prompt, and the picture if there is one, to the pictures


@dataclass(frozen=True, kw_only=True)
class Case:
    """The measurements for one picture size and batch size."""

    width: int
    height: int
    batch_size: int
    steps: int
    step: Spread
    decode: Spread
    total: Spread
    operations: int  # of one guided step
    operations_per_second: float  # in the median step
    own_memory: int | None  # the most bytes that the process held, without pages of mapped files
    device_memory: int | None  # the most bytes on a GPU
    profile: Profile


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    rates: Rates
    load: Spread
    text: Spread  # encoding a prompt and the empty one
    depth: Spread | None  # estimating the depth of a picture of the first size, if the model has a depth network
    cases: tuple[Case, ...]


def benchmark(
    load: Callable[[], StableDiffusion],
    *,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[tuple[int, int]],
    batch_sizes: Sequence[int],
    steps: int,
    repeat: int,
    on_unit: Callable[[], object] = lambda: None,
) -> Benchmark:
    """Load a model a few times, and make pictures of each size with it.

    load     returns the model on that device, in that precision
    sizes    (width, height) in pixels
    steps    of a picture, at least 2
    repeat   how often each quantity is measured, after one warm-up that does not count
    on_unit  called `units(...)` times

    Raises NonFiniteError if a network fails.
    """
    rates = measure_rates(device, dtype)
    model, loads = None, []
    for _ in range(repeat):
        del model  # one at a time
        started = time.perf_counter()
        model = load()
        synchronize(device)
        loads.append(time.perf_counter() - started)
        on_unit()
    encode_text(model)
    texts = [encode_text(model) for _ in range(repeat)]
    depths = [estimate_depth(model, sizes[0]) for _ in range(1 + repeat)][1:] if model.depth_network else []
    cases = [
        measure_case(model, size, batch_size, steps, repeat, rates, on_unit)
        for size in sizes
        for batch_size in batch_sizes
    ]
    depth = Spread.of(depths) if depths else None
    return Benchmark(rates=rates, load=Spread.of(loads), text=Spread.of(texts), depth=depth, cases=tuple(cases))


def units(sizes: int, batch_sizes: int, repeat: int) -> int:
    """How often `on_unit` is called: for each load, and in each case for the warm-up, the runs and the profile."""
    return repeat + sizes * batch_sizes * (repeat + 2)


def encode_text(model: LatentDiffusion) -> float:
    """Seconds for a prompt and the empty one, one after the other, as for a picture."""
    return seconds_of(lambda: [model.encode_prompts([text]) for text in (PROMPT, "")], model.device)


def estimate_depth(model: LatentDiffusion, size: tuple[int, int]) -> float:
    """Seconds for the depth of one picture."""
    return seconds_of(lambda: model.estimate_depth(grey(size)), model.device)


def grey(size: tuple[int, int]) -> Tensor:
    width, height = size
    return torch.zeros(1, 3, height, width, dtype=torch.float32, device="cpu")


def pictures(model: LatentDiffusion, size: tuple[int, int], batch_size: int, steps: int) -> list[Settings]:
    """Settings of the task that the model's UNet was made for."""
    edits = {"image_guidance": IMAGE_GUIDANCE} if further_channels(model) == 4 else {}
    common = {"prompt": PROMPT, "width": size[0], "height": size[1], "steps": steps, **edits}
    return [Settings(**common, seed=seed) for seed in range(batch_size)]


def start_of(model: LatentDiffusion, size: tuple[int, int]) -> InitImage | None:
    """What the UNet reads beside the latents: a grey picture, its depth, or a mask that repaints all of it."""
    image, channels = grey(size), further_channels(model)
    if channels == 0:
        return None
    if channels == 1:
        return InitImage(image=image, depth=model.estimate_depth(image) if model.depth_network else image[:, :1])
    if channels == 4:
        return InitImage(image=image)
    mask = torch.ones_like(image[:, :1])
    factor = model.config.vae.factor
    return InitImage(image=image, mask=mask, latent_mask=mask[:, :, ::factor, ::factor])


def further_channels(model: LatentDiffusion) -> int:
    return model.config.unet.in_channels - model.config.vae.latent_channels


def make_once(model: LatentDiffusion, batch: Sequence[Settings]) -> Run:
    """Make a batch of pictures and time each step."""
    started, moments = time.perf_counter(), []
    for latents in model.sample(batch, start_of(model, (batch[0].width, batch[0].height))):  # noqa: B007 - the last ones are decoded
        # known to be finite, so the device has finished them; a GPU already works on the next step
        moments.append(time.perf_counter())
    model.decode(latents)
    ended = time.perf_counter()
    steps = tuple(after - before for before, after in pairwise(moments))
    return Run(steps=steps, decode=ended - moments[-1], total=ended - started)


def profile_step(model: LatentDiffusion, batch: Sequence[Settings], rates: Rates) -> Profile:
    """Profile the steps of a batch from the second on; returns the profile of the step with the median time.

    A compiled or captured UNet hides its calls, so the plain one runs here.
    """
    model = copy(model)
    model.runner = model.runner.for_watching()
    states, profiles = model.sample(batch, start_of(model, (batch[0].width, batch[0].height))), []
    next(states)
    for _ in range(batch[0].steps - 1):
        with LayerWatch(model.device, rates) as watch:
            seconds = seconds_of(lambda: next(states), model.device)
        profiles.append(watch.profile(seconds))
    return sorted(profiles, key=lambda profile: profile.seconds)[(len(profiles) - 1) // 2]


def measure_case(
    model: LatentDiffusion,
    size: tuple[int, int],
    batch_size: int,
    steps: int,
    repeat: int,
    rates: Rates,
    on_unit: Callable[[], object],
) -> Case:
    on_cuda = model.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    with PeakMemory() as memory:
        make_once(model, pictures(model, size, batch_size, WARM_UP_STEPS))
        on_unit()
        runs = []
        for _ in range(repeat):
            runs.append(make_once(model, pictures(model, size, batch_size, steps)))
            on_unit()
    device_memory = torch.cuda.max_memory_allocated(model.device) if on_cuda else None
    profile = profile_step(model, pictures(model, size, batch_size, 1 + repeat), rates)
    on_unit()
    return case(size, batch_size, steps, runs, profile, memory.peak, device_memory)


def case(
    size: tuple[int, int],
    batch_size: int,
    steps: int,
    runs: Sequence[Run],
    profile: Profile,
    own_memory: int | None,
    device_memory: int | None,
) -> Case:
    """Sum up several runs of the same pictures."""
    step = Spread.of([seconds for run in runs for seconds in run.steps])
    return Case(
        width=size[0],
        height=size[1],
        batch_size=batch_size,
        steps=steps,
        step=step,
        decode=Spread.of([run.decode for run in runs]),
        total=Spread.of([run.total for run in runs]),
        operations=profile.operations,
        operations_per_second=profile.operations / step.median,
        own_memory=own_memory,
        device_memory=device_memory,
        profile=profile,
    )
