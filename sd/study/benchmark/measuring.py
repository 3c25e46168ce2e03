"""How fast a model is on this machine: loading, text, a guided step, decoding, a whole picture, memory.

Everything goes the way that a picture goes: through `LatentDiffusion.sample` and `decode`. Times are in seconds.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise

import torch

from sd.pipeline.latent_diffusion import LatentDiffusion
from sd.pipeline.settings import Settings
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.study.architecture.timing import synchronize
from sd.study.benchmark.layer_kinds import LayerWatch, Profile, Rates, measure_rates
from sd.study.benchmark.process import PeakMemory

PROMPT = "a photograph of an astronaut riding a horse"
WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The same thing measured several times."""

    median: float
    shortest: float
    longest: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median=statistics.median(values), shortest=min(values), longest=max(values), count=len(values))


@dataclass(frozen=True, kw_only=True)
class Run:
    """Pictures made once, in seconds."""

    steps: tuple[float, ...]  # from the second on; the first goes with the text and whatever begins
    decode: float
    total: float  # from the prompt to the pictures


@dataclass(frozen=True, kw_only=True)
class Case:
    """What was measured for pictures of one size, so many at a time."""

    width: int
    height: int
    batch_size: int
    steps: int
    step: Spread
    decode: Spread
    total: Spread
    operations: int  # of one guided step
    operations_per_second: float  # in the median step
    own_memory: int | None  # the most bytes that the process held, without the pages of mapped files
    device_memory: int | None  # the most bytes on the device, where it is not the processor
    profile: Profile


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    rates: Rates
    load: Spread
    text: Spread  # a prompt and the empty one
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

    load     gives the model on that device, in that precision
    sizes    (width, height) in pixels
    steps    of a picture, at least 2
    repeat   how often each thing is measured; everything is done once before, which does not count
    on_unit  called `units(...)` times

    Raises NonFiniteError where a network fails.
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
    cases = [
        measure_case(model, size, batch_size, steps, repeat, rates, on_unit)
        for size in sizes
        for batch_size in batch_sizes
    ]
    return Benchmark(rates=rates, load=Spread.of(loads), text=Spread.of(texts), cases=tuple(cases))


def units(sizes: int, batch_sizes: int, repeat: int) -> int:
    """How often `on_unit` is called: for each loading, and for each case for the warm-up, the runs and the profile."""
    return repeat + sizes * batch_sizes * (repeat + 2)


def encode_text(model: LatentDiffusion) -> float:
    """Seconds for a prompt and the empty one, one after the other, as for a picture."""
    started = time.perf_counter()
    for text in (PROMPT, ""):
        model.encode_prompts([text])
    synchronize(model.device)
    return time.perf_counter() - started


def pictures(size: tuple[int, int], batch_size: int, steps: int) -> list[Settings]:
    width, height = size
    return [Settings(prompt=PROMPT, width=width, height=height, steps=steps, seed=seed) for seed in range(batch_size)]


def make_once(model: LatentDiffusion, batch: Sequence[Settings]) -> Run:
    """Make a batch of pictures, and note when each step ends."""
    started, moments = time.perf_counter(), []
    for latents in model.sample(batch):  # noqa: B007 - the last ones are decoded
        # they have been waited for, since they are known to be finite; on a GPU, the next step is under way already
        moments.append(time.perf_counter())
    model.decode(latents)
    ended = time.perf_counter()
    steps = tuple(after - before for before, after in pairwise(moments))
    return Run(steps=steps, decode=ended - moments[-1], total=ended - started)


def profile_step(model: LatentDiffusion, batch: Sequence[Settings], rates: Rates) -> Profile:
    """The steps of a batch from the second on, watched; the profile is that of the step with the median time.

    Of a compiled or captured UNet nothing can be seen, so the UNet runs as it is here.
    """
    model = copy(model)
    model.runner = model.runner.for_watching()
    states, profiles = model.sample(batch), []
    next(states)
    for _ in range(batch[0].steps - 1):
        with LayerWatch(model.device, rates) as watch:
            started = time.perf_counter()
            next(states)
            synchronize(model.device)
            seconds = time.perf_counter() - started
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
        make_once(model, pictures(size, batch_size, WARM_UP_STEPS))
        on_unit()
        runs = []
        for _ in range(repeat):
            runs.append(make_once(model, pictures(size, batch_size, steps)))
            on_unit()
    device_memory = torch.cuda.max_memory_allocated(model.device) if on_cuda else None
    profile = profile_step(model, pictures(size, batch_size, 1 + repeat), rates)
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
    """What runs of the same pictures come to."""
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
