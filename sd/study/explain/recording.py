"""Record a run step by step: the UNet's inputs, outputs and cross-attention.

The run is that of `StableDiffusion.make`, to the bit: hooks on the UNet only record what goes in and out, and
`sd.study.explain.attention` computes heat maps beside the network's own attention.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn

from sd.pipeline.conditions import conditions_for
from sd.pipeline.latent_diffusion import table_and_steps
from sd.pipeline.second_pass import steps_run
from sd.pipeline.settings import Settings
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.sampling.denoiser import Denoiser
from sd.sampling.init_image import InitImage
from sd.sampling.schedule import Steps, x_0_from_eps
from sd.study.clock import synchronize
from sd.study.explain.attention import AttentionWatch, Heat, map_side
from sd.study.explain.text import TokenStrip, token_strip


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step. Latents and noise are (1, 4, H, W) float32, on the CPU.

    If a sampler needs several predictions per step, the record holds the first, at the noisy latents.
    """

    number: int  # from 1
    timestep: float  # the network's input, 999 is noisiest
    alpha_bar: float  # before the step
    alpha_bar_prev: float  # after the step
    text: int  # the index of the prompt at this step in the run's strips
    x_t: Tensor  # noisy latents before the step
    with_prompt: Tensor  # the noise that the network predicts in them
    without_prompt: Tensor | None  # the same for the negative prompt; None without guidance
    without_picture: Tensor | None  # where a picture is edited: for the negative prompt and no picture; or None
    guided: Tensor  # the prediction that the sampler takes
    after: Tensor  # latents after the step
    heats: tuple[Heat, ...]  # what each word attends to, largest maps first; empty if not recorded. Layers whose
    # features were reused have the maps of the prediction that computed these features
    milliseconds: float  # of the step, recording included

    @property
    def x_0(self) -> Tensor:
        """The clean latents if the guided prediction is the noise in x_t: Ho et al. (2020), eq. 4."""
        return x_0_from_eps(self.x_t, self.guided, torch.tensor(self.alpha_bar, dtype=torch.float64, device="cpu"))

    @property
    def difference(self) -> Tensor | None:
        """What the prompt changes in the prediction: the direction of guidance."""
        return None if self.without_prompt is None else self.with_prompt - self.without_prompt


@dataclass(frozen=True, kw_only=True)
class Run:
    settings: Settings
    prediction: str  # what the network predicts, as in `sd.config`; the records hold noise in all cases
    table: Tensor  # (timesteps,) alpha_bar by timestep
    plan: Steps  # the steps that are run: of a schedule that begins with a picture, the last ones
    start: InitImage | None  # the picture that it begins with, or edits
    depth: Tensor | None  # (1, 1, H, W) from -1, far, to 1, near: what the UNet reads after the latents, if it does
    strips: tuple[TokenStrip, ...]  # one for each text that the prompt takes during the run
    steps: tuple[StepRecord, ...]
    context: Tensor  # (T, D) what the UNet reads of the prompt at the first step, on the CPU
    picture: Image.Image
    milliseconds: float  # from the prompt to the picture, recording included


def explain(
    model: StableDiffusion,
    settings: Settings,
    start: InitImage | None = None,
    *,
    attention: bool = True,
    on_step: Callable[[], object] | None = None,
    on_retry: Callable[[str], None] | None = None,
) -> Run:
    """Make a picture and record the run: from text, from a picture, with its depth, or edited by instruction.

    start      what the run begins with, as in `StableDiffusion.make`; without a mask
    attention  whether to record heat maps, which costs time and memory
    on_step    called after every step
    on_retry   as in `StableDiffusion.make`

    Raises ValueError for inpainting, where what is kept takes the place of predictions; if the model cannot do the
    task, or no step runs; if it runs with `low_memory`, which makes the predictions of a step separately, or with
    `compile`, which hides the layers from hooks; NonFiniteError if a network fails.
    """
    for option in ("low_memory", "compile"):
        if getattr(model.runner.options, option):
            raise ValueError(f"a model loaded with {option} cannot be explained: load it without")
    if start is not None and start.mask is not None:
        raise ValueError("inpainting cannot be explained: leave the mask out")
    model = replace(model, runner=model.runner.for_watching())
    recorder = Recorder(model, settings, start, attention=attention)

    def step_done(latents: Tensor) -> None:
        recorder.step_done(latents)
        if on_step:
            on_step()

    def retry(message: str) -> None:
        if len(recorder.steps) < len(recorder.plan):  # otherwise only the decoder runs again
            recorder.restart()
        if on_retry:
            on_retry(message)

    started = time.perf_counter()
    with recorder.watching():
        (picture,) = model.make([settings], start, on_step=step_done, on_retry=retry)
    return Run(
        settings=settings,
        prediction=model.config.prediction,
        table=recorder.table,
        plan=recorder.plan,
        start=start,
        depth=None if start is None or start.depth is None else recorder.conditions.channels.cpu(),
        strips=recorder.strips,
        steps=tuple(recorder.steps),
        context=recorder.context,
        picture=picture,
        milliseconds=1000 * (time.perf_counter() - started),
    )


class Recorder:
    """Records the first prediction of every step of one run, inside the `with` block."""

    def __init__(self, model: StableDiffusion, settings: Settings, start: InitImage | None, *, attention: bool):
        self.model, self.settings = model, model.as_run(settings)
        self.table, self.schedule = table_and_steps(model.config.schedule, settings)
        run = len(self.schedule) if start is None else steps_run(len(self.schedule), settings.strength)
        if not run:
            raise ValueError("there is nothing to explain: at this strength, no step runs. Raise it")
        self.plan = self.schedule[len(self.schedule) - run :]
        encode, edits = partial(model.encode_image, tile=settings.tile), settings.image_guidance is not None
        self.conditions = conditions_for(model.config, start, encode, edits=edits)
        by_step, *_ = settings.texts_by_step()
        texts = list(dict.fromkeys(by_step))
        rows, plain = model.chunk_count(settings), settings.plain_prompts
        self.strips = tuple(token_strip(text, model.tokenizer, plain=plain, rows=rows) for text in texts)
        self.strip_of = [texts.index(text) for text in by_step]
        factor = model.config.vae.factor
        self.shape = (model.config.vae.latent_channels, settings.height // factor, settings.width // factor)
        self.watch = None
        if attention:
            columns = max(len(strip.columns) for strip in self.strips)
            side, apart = map_side(model.config.unet, self.shape[1:], columns, settings.steps)
            self.watch = AttentionWatch(model.unet, side=side, heads_apart=apart)
        self.restart()

    def restart(self) -> None:
        self.steps: list[StepRecord] = []
        noise = self.model.noise_of([self.settings])().to(self.model.device)  # as `StableDiffusion.sample` begins
        self._x_t = self.conditions.initial(noise, self.schedule, len(self.schedule) - len(self.plan)).cpu()
        self._begin()

    def _begin(self) -> None:
        self._started: float | None = None
        self._output: Tensor | None = None  # of the first prediction
        self._heats: tuple[Heat, ...] = ()
        self._watch_next()

    def _watch_next(self) -> None:
        if self.watch and len(self.steps) < len(self.plan):
            self.watch.expect(self.strips[self.strip_of[len(self.steps)]].column_of)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for handle in (
                self.model.unet.register_forward_pre_hook(self._asked, with_kwargs=True),
                self.model.unet.register_forward_hook(self._answered),
            ):
                stack.callback(handle.remove)
            if self.watch:
                stack.enter_context(self.watch.watching())
            yield

    def _asked(self, unet: nn.Module, arguments: tuple, named: dict) -> None:
        if self._started is None:
            if not self.steps:
                context = named["context"] if "context" in named else arguments[2]
                self.context = context[-1].float().cpu()
            synchronize(self.model.device)
            self._started = time.perf_counter()

    def _answered(self, unet: nn.Module, arguments: tuple, output: Tensor) -> None:
        if self._output is None:
            self._output = output.float().cpu()
            self._heats = tuple(self.watch.take()) if self.watch else ()
            if self.settings.reuse_features > 1:
                self._watch_next()  # the next step may reuse the features of a later prediction of this step

    def step_done(self, latents: Tensor) -> None:
        synchronize(self.model.device)
        step, settings = self.plan[len(self.steps)], self.settings
        after = latents.cpu()
        *others, positive = self._output.split(1)  # of `others`, the last is that without the prompt

        def predicted(
            output: Tensor, guidance_scale: float = 1.0, guidance_rescale: float = 0.0, image_guidance: float = 1.0
        ) -> Tensor:
            """The noise, computed from the network's output by the run's own code."""
            nothing = torch.empty(0, dtype=torch.float32, device="cpu")
            denoiser = Denoiser(
                lambda *_: output,
                self.model.config.prediction,
                self.table,
                nothing,
                nothing,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                guidance_interval=settings.guidance_interval or (0.0, math.inf),
                image_guidance=image_guidance,
            )
            return denoiser(self._x_t, step.alpha_bar)

        self.steps.append(
            StepRecord(
                number=len(self.steps) + 1,
                timestep=step.timestep.item(),
                alpha_bar=step.alpha_bar.item(),
                alpha_bar_prev=step.alpha_bar_prev.item(),
                text=self.strip_of[len(self.steps)],
                x_t=self._x_t,
                with_prompt=predicted(positive),
                without_prompt=predicted(others[-1]) if others else None,
                without_picture=predicted(others[0]) if len(others) > 1 else None,
                guided=predicted(
                    self._output, settings.guidance_scale, settings.guidance_rescale, settings.image_guidance or 1.0
                ),
                after=after,
                heats=self._heats,
                milliseconds=1000 * (time.perf_counter() - self._started),
            )
        )
        self._x_t = after
        self._begin()
