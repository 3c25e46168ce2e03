"""The networks put together: from settings to latents, and from latents to pictures.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), figure 3. Every part can be used
alone; see the attributes of `LatentDiffusion`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from sd.config import ModelConfig, ScheduleConfig
from sd.networks.text_encoder import TextEncoder
from sd.networks.unet import UNet
from sd.networks.vae import VAE
from sd.pipeline.image.tensors import to_images, to_tensor
from sd.pipeline.settings import SettingError, Settings
from sd.pipeline.upscaling import upscale_latents, upscale_picture
from sd.runtime.cpu.packing import WholeNetwork
from sd.runtime.device import answer_of, on_its_way, precision_name
from sd.runtime.execution import Execution
from sd.runtime.shortcuts.feature_reuse import ReusedFeatures
from sd.sampling.denoiser import Denoiser
from sd.sampling.init_image import Start, keeping, shown
from sd.sampling.names import final_alpha
from sd.sampling.noise import PictureNoise
from sd.sampling.samplers import SAMPLERS
from sd.sampling.schedule import (
    Step,
    add_noise,
    alphas_cumprod,
    custom_steps,
    sampling_steps,
    x_0_from_eps,
    zero_terminal_snr,
)
from sd.sampling.strength import steps_run
from sd.text.chunks import chunks_of, empty_chunk
from sd.text.conditioning import ContextByStep, encode_chunks
from sd.text.tokenizer import Tokenizer

T = TypeVar("T")


class NonFiniteError(ArithmeticError):
    """A network gave NaN or infinite values, which no picture can be made from.

    part  the attribute of `LatentDiffusion` that holds the network
    """

    def __init__(self, part: str, dtype: torch.dtype):
        words = {"text_encoder": "text encoder", "unet": "UNet", "vae": "VAE"}
        super().__init__(f"the {words[part]} gave NaN or infinite values in {precision_name(dtype)}")
        self.part = part


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each handed on when the next one is there, too.

    Where an item is work that a device was told to do, it has some left while somebody waits for the one before.
    """
    items = iter(items)
    for item in items:
        for following in items:
            yield item
            item = following
        yield item


def table_and_steps(config: ScheduleConfig, settings: Settings) -> tuple[Tensor, list[Step]]:
    """alpha_bar by timestep, and the steps through the noise levels that the settings ask for."""
    table = alphas_cumprod(config)
    if settings.zero_terminal_snr:
        table = zero_terminal_snr(table)
    if settings.sigmas:
        return table, custom_steps(table, settings.sigmas)
    final = final_alpha(settings.sampler, settings.schedule)
    return table, sampling_steps(table, settings.steps, schedule=settings.schedule, final_alpha=final)


def check_channels(config: ModelConfig, job: str) -> None:
    """Raises ValueError where the model's UNet takes other channels than a job gives it.

    job  "text to picture", "image to image" or "inpainting"
    """
    latents, given = config.vae.latent_channels, config.unet.in_channels
    with_mask = 2 * latents + 1  # noisy latents, the mask, and the latents of what is kept
    allowed = (latents, with_mask) if job == "inpainting" else (latents,)
    if given not in allowed:
        raise ValueError(
            f"{job} needs a model whose UNet takes {' or '.join(map(str, allowed))} channels, "
            f"this one ({config.family}) takes {given}"
        )


@dataclass(kw_only=True)
class LatentDiffusion:
    """The parts of a model, and how they work together."""

    config: ModelConfig
    tokenizer: Tokenizer
    text_encoder: TextEncoder
    unet: UNet = WholeNetwork()  # noqa: RUF009 - no default: whoever asks for it gets it with all of its weights
    vae: VAE
    execution: Execution = field(default_factory=Execution)  # how the networks are run

    @property
    def device(self) -> torch.device:
        """Where the networks compute."""
        return self.execution.visited or self.vae.quant_conv.weight.device

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The precision that each network runs in."""
        networks = {"text_encoder": self.text_encoder, "unet": self._unet, "vae": self.vae}
        return {part: next(network.parameters()).dtype for part, network in networks.items()}

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], *, plain: bool = False, clip_skip: int = 1, chunks: int = 1
    ) -> Tensor:
        """B prompts -> context (B, 77 * N, D): N chunks for each, at least `chunks`, the last ones empty if need be.

        prompts    as they stand at one step: weights and BREAK are read, unless they are plain;
                   `sd.text.prompt_syntax.timeline` gives the texts of a prompt that changes
        clip_skip  1: the text encoder's last layer; 2: the one before it
        """
        layers = len(self.text_encoder.layers)
        if clip_skip > layers:
            raise SettingError("clip_skip", f"{clip_skip} is out of range: this text encoder has {layers} layers.")
        rows = [chunks_of(prompt, self.tokenizer, plain=plain) for prompt in prompts]
        longest = max(chunks, *map(len, rows))
        rows = [(*row, *[empty_chunk(self.tokenizer)] * (longest - len(row))) for row in rows]
        with self.execution.at_work(self.text_encoder):
            encoder = partial(self.execution.encode_text, self.text_encoder)
            context = encode_chunks(encoder, rows, skip_layers=clip_skip - 1)
        self._check("text_encoder", context)
        return context

    def chunk_count(self, settings: Settings) -> int:
        """How many chunks a picture's prompts take: as many as the longest text that one of them is at any step.

        Only pictures of the same number go together in a batch, since one more empty chunk changes a picture.
        """
        texts = {text for line in settings.texts_by_step() for text in line}
        return max(len(chunks_of(text, self.tokenizer, plain=settings.plain_prompts)) for text in texts)

    def _contexts(self, batch: Sequence[Settings]) -> list[ContextByStep]:
        """The context of the prompts and, with guidance, that of the negative prompts."""
        common = batch[0]
        options = {"plain": common.plain_prompts, "clip_skip": common.clip_skip, "chunks": self.chunk_count(common)}
        contexts = []
        for lines in zip(*(settings.texts_by_step() for settings in batch), strict=True):
            texts = list(dict.fromkeys(text for line in lines for text in line))
            rows = [tuple(texts.index(text) for text in now) for now in zip(*lines, strict=True)]
            contexts.append(ContextByStep(self.encode_prompts(texts, **options).to(self.dtypes["unet"]), rows))
        return contexts

    @torch.no_grad()
    def encode_image(self, image: Tensor, tile: str = "") -> Tensor:
        """image (B, 3, H, W) in [-1, 1] -> latents (B, 4, H/8, W/8), scaled, float32: the middle of the VAE's guess.

        tile  the axes, "x" and "y", along which the picture goes on at its other side
        """
        mean, _ = self.execution.encode(self.vae, image.to(self.device, self.dtypes["vae"]), tile)
        self._check("vae", mean)
        return self.config.vae.latent_scale * mean.float()

    @torch.no_grad()
    def sample(
        self,
        batch: Sequence[Settings],
        start: Start | None = None,
        *,
        on_clean: Callable[[Tensor], None] | None = None,
    ) -> Iterator[Tensor]:
        """Denoise a batch of pictures; yields their latents (B, 4, H/8, W/8), float32, after every step.

        Where the settings have two passes, this is the first of them.

        start  a picture to begin with; the settings' strength says how much of the way is gone. At strength 0 no step
               is, and what is yielded are the picture's own latents; at strength 1 it is forgotten outside of what a
               mask keeps, as in text to picture

        on_clean  called after every step with the clean latents (B, 4, H/8, W/8) that the network's last prediction in
                  it stands for

        The settings of a batch may differ in prompts, seeds and variations only.

        Raises ValueError where the model is not one for this, or the settings do not go together; NonFiniteError where
        a network fails.
        """
        common = batch[0]
        if not all(settings.goes_with(common) for settings in batch):
            raise ValueError(
                "the pictures of a batch may differ in prompts and seeds only, and where features are reused, their "
                "words must change at the same steps"
            )
        if len({self.chunk_count(settings) for settings in batch}) > 1:
            raise ValueError("the prompts of a batch must have the same number of chunks")
        channels = self.config.vae.latent_channels
        masked = start is not None and start.mask is not None
        check_channels(self.config, "inpainting" if masked else "image to image" if start else "text to picture")
        common.require_prediction(self.config.prediction)
        contexts = self._contexts(batch)
        table, steps = table_and_steps(self.config.schedule, common)
        factor = self.config.vae.factor
        noise = PictureNoise(
            [settings.seed for settings in batch],
            (channels, common.height // factor, common.width // factor),
            [settings.variation for settings in batch],
        )
        x = noise().to(self.device)
        reused = ReusedFeatures(common.reuse_features) if common.reuse_features > 1 else None  # of this run alone

        def unet(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            guided = len(context) > len(batch)
            return self.execution.predict(
                self._unet,
                x,
                timestep,
                context,
                guided=guided,
                tile=common.tile,
                reused=reused,
                merge=common.merge_tokens,
            )

        skipped = 0
        told = self.config.unet.in_channels > channels  # what a mask keeps
        if start is not None:
            x_0 = start.latents if start.image is None else self.encode_image(start.image, common.tile)
            skipped = len(steps) - steps_run(len(steps), common.strength)
            steps = steps[skipped:]
            if not steps:
                yield x_0.expand(len(batch), -1, -1, -1)
                return
            if skipped:
                x = add_noise(x_0, x, steps[0].alpha_bar)
            if masked:
                mask = start.latent_mask.to(self.device)
            if masked and told:
                kept = self.encode_image(start.image * (start.mask < 0.5), common.tile)
                unet = shown(unet, (mask >= 0.5).float(), kept)
        denoiser = Denoiser(
            unet,
            self.config.prediction,
            table,
            *(context(skipped) for context in contexts),
            guidance_scale=common.guidance_scale,
            guidance_rescale=common.guidance_rescale,
            guidance_interval=common.guidance_interval or (0.0, math.inf),
        )
        predict_eps = keeping(denoiser, x_0, mask) if masked and not told else denoiser
        clean: list[Tensor] = []

        def predict(x_t: Tensor, alpha_bar: Tensor) -> Tensor:
            eps = predict_eps(x_t, alpha_bar)
            clean[:] = [x_0_from_eps(x_t, eps, alpha_bar)]
            return eps

        options = {} if common.eta is None else {"eta": common.eta}
        sampler = SAMPLERS[common.sampler]
        done = sampler(
            predict if on_clean else predict_eps,
            x,
            steps,
            draw_noise=lambda: on_its_way(noise(), self.device),
            **options,
        )

        def taken() -> Iterator[tuple[Tensor, Callable[[], bool], Tensor | None]]:
            """Step by step the latents, who tells whether they are finite, and the clean ones."""
            for step, latents in enumerate(done, skipped + 1):
                yield latents, answer_of(latents.isfinite().all()), clean[0] if on_clean else None
                if step < common.steps and any(context.changes(step) for context in contexts):
                    denoiser.set_context(*(context(step) for context in contexts))
                    if reused:
                        reused.forget()  # it was about the words before

        with self.execution.at_work(self._unet):
            ahead = self.execution.captures(self.device)
            for latents, finite, predicted in one_ahead(taken()) if ahead else taken():
                if not finite():  # waits for the device
                    raise NonFiniteError("unet", self.dtypes["unet"])
                if on_clean:
                    on_clean(predicted)
                yield latents

    @torch.no_grad()
    def enlarge(self, latents: Tensor, settings: Settings) -> Tensor:
        """What the second of two passes begins with: latents of the first -> latents of the size that is asked for."""
        if settings.hires_upscale == "latent":
            factor = self.config.vae.factor
            width, height = settings.hires
            return upscale_latents(latents, (height // factor, width // factor), settings.tile)
        pictures = self.decode(latents, settings.tile)
        larger = (upscale_picture(picture, settings.hires, settings.tile) for picture in pictures)
        return torch.cat([self.encode_image(to_tensor(picture), settings.tile) for picture in larger])

    @torch.no_grad()
    def decode(self, latents: Tensor, tile: str = "") -> list[Image.Image]:
        """latents (B, 4, H/8, W/8) as `sample` gives them -> B pictures, decoded one by one to save memory.

        tile  as in `encode_image`

        Raises NonFiniteError rather than give a black picture.
        """
        pictures = []
        for latent in latents.split(1):
            latent = (latent / self.config.vae.latent_scale).to(self.dtypes["vae"])
            image = self.execution.decode(self.vae, latent, tile)
            self._check("vae", image)
            pictures += to_images(image)
        return pictures

    def _check(self, part: str, values: Tensor) -> None:
        if not values.isfinite().all():
            raise NonFiniteError(part, self.dtypes[part])
