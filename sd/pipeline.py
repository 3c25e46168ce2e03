"""From a prompt to a picture: text encoder, then the sampler with the UNet in its loop, then the VAE's decoder.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), figure 3. Every part can be used
alone; see the attributes of `StableDiffusion`.
"""

import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from sd import __version__
from sd.canvas import Canvas, image_to_image, inpainting
from sd.chunks import chunks_of, empty_chunk
from sd.conditioning import ContextByStep, encode_chunks
from sd.config import ModelConfig, ScheduleConfig
from sd.denoiser import Denoiser
from sd.from_picture import Start, keeping, shown, steps_run
from sd.image import start_from, to_images
from sd.input_settings import InputSettings
from sd.noise import PictureNoise
from sd.runtime import precision_name
from sd.sampler_names import final_alpha
from sd.samplers import SAMPLERS
from sd.schedule import Step, add_noise, alphas_cumprod, custom_steps, sampling_steps, zero_terminal_snr
from sd.settings import SettingError, Settings
from sd.text_encoder import TextEncoder
from sd.tokenizer import Tokenizer
from sd.unet import UNet
from sd.vae import VAE

T = TypeVar("T")


class NonFiniteError(ArithmeticError):
    """A network gave NaN or infinite values, which no picture can be made from.

    part  the attribute of `StableDiffusion` that holds the network
    """

    def __init__(self, part: str, dtype: torch.dtype):
        words = {"text_encoder": "text encoder", "unet": "UNet", "vae": "VAE"}
        super().__init__(f"the {words[part]} gave NaN or infinite values in {precision_name(dtype)}")
        self.part = part


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


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights came from."""

    name: str  # of the file, without its suffix
    weights: str  # "ema" or "model"
    sha256: Callable[[], str | None]  # of the file, None if it is gone; takes seconds for a large one, the first time


@dataclass(kw_only=True)
class StableDiffusion:
    """A loaded model: its parts, and the way from a prompt to a picture."""

    config: ModelConfig
    tokenizer: Tokenizer
    text_encoder: TextEncoder
    unet: UNet
    vae: VAE
    source: Source

    @property
    def device(self) -> torch.device:
        return self.unet.out.conv.weight.device

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The precision that each network runs in."""
        return {part: next(getattr(self, part).parameters()).dtype for part in ("text_encoder", "unet", "vae")}

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], *, plain: bool = False, clip_skip: int = 1, chunks: int = 1
    ) -> Tensor:
        """B prompts -> context (B, 77 * N, D): N chunks for each, at least `chunks`, the last ones empty if need be.

        prompts    as they stand at one step: weights and BREAK are read, unless they are plain; `sd.prompts.timeline`
                   gives the texts of a prompt that changes
        clip_skip  1: the text encoder's last layer; 2: the one before it
        """
        layers = len(self.text_encoder.layers)
        if clip_skip > layers:
            raise SettingError("clip_skip", f"{clip_skip} is out of range: this text encoder has {layers} layers.")
        rows = [chunks_of(prompt, self.tokenizer, plain=plain) for prompt in prompts]
        longest = max(chunks, *map(len, rows))
        rows = [(*row, *[empty_chunk(self.tokenizer)] * (longest - len(row))) for row in rows]
        context = encode_chunks(self.text_encoder, rows, skip_layers=clip_skip - 1)
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
    def encode_image(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [-1, 1] -> latents (B, 4, H/8, W/8), scaled, float32: the middle of the VAE's guess."""
        mean, _ = self.vae.encode(image.to(self.device, self.dtypes["vae"]))
        self._check("vae", mean)
        return self.config.vae.latent_scale * mean.float()

    @torch.no_grad()
    def sample(self, batch: Sequence[Settings], start: Start | None = None) -> Iterator[Tensor]:
        """Denoise a batch of pictures; yields their latents (B, 4, H/8, W/8), float32, after every step.

        start  a picture to begin with; the settings' strength says how much of the way is gone. At strength 0 no step
               is, and what is yielded are the picture's own latents; at strength 1 it is forgotten outside of what a
               mask keeps, as in text to picture

        The settings of a batch may differ in prompts and seeds only.

        Raises ValueError where the model is not one for this, or the settings do not go together; NonFiniteError where
        a network fails.
        """
        common = batch[0]
        if not all(settings.goes_with(common) for settings in batch):
            raise ValueError("the pictures of a batch may differ in prompts and seeds only")
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
            [settings.seed for settings in batch], (channels, common.height // factor, common.width // factor)
        )
        x = noise().to(self.device)
        unet, skipped = self.unet, 0
        told = self.config.unet.in_channels > channels  # what a mask keeps
        if start is not None:
            x_0 = self.encode_image(start.image)
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
                kept = self.encode_image(start.image * (start.mask < 0.5))
                unet = shown(unet, (mask >= 0.5).float(), kept)
        denoiser = Denoiser(
            unet,
            self.config.prediction,
            table,
            *(context(skipped) for context in contexts),
            guidance_scale=common.guidance_scale,
            guidance_rescale=common.guidance_rescale,
        )
        predict_eps = keeping(denoiser, x_0, mask) if masked and not told else denoiser
        options = {} if common.eta is None else {"eta": common.eta}
        sampler = SAMPLERS[common.sampler]
        done = sampler(predict_eps, x, steps, draw_noise=lambda: noise().to(self.device), **options)
        for step, latents in enumerate(done, skipped + 1):
            self._check("unet", latents)
            yield latents
            if step < common.steps and any(context.changes(step) for context in contexts):
                denoiser.set_context(*(context(step) for context in contexts))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """latents (B, 4, H/8, W/8) as `sample` gives them -> B pictures, decoded one by one to save memory.

        Raises NonFiniteError rather than give a black picture.
        """
        pictures = []
        for latent in latents.split(1):
            image = self.vae.decode((latent / self.config.vae.latent_scale).to(self.dtypes["vae"]))
            self._check("vae", image)
            pictures += to_images(image)
        return pictures

    def make(
        self,
        batch: Sequence[Settings],
        start: Start | None = None,
        *,
        on_step: Callable[[Tensor], None] | None = None,
        on_retry: Callable[[str], None] | None = None,
    ) -> list[Image.Image]:
        """Denoise and decode a batch. A network that fails is run again in float32, from the start of its stage.

        start     a picture to begin with, as in `sample`
        on_step   called with the latents (B, 4, H/8, W/8) after every step
        on_retry  called with a sentence where a network is run again

        Raises NonFiniteError where a network fails in float32, too.
        """

        def denoise() -> Tensor:
            latents = None
            for latents in self.sample(batch, start):
                if on_step:
                    on_step(latents)
            return latents

        def finite(stage: Callable[[], T]) -> T:
            try:
                return stage()
            except NonFiniteError as error:
                if self.dtypes[error.part] == torch.float32:
                    raise
                getattr(self, error.part).float()
                if on_retry:
                    on_retry(f"{error}; it is run again in fp32, and stays so")
                return finite(stage)

        latents = finite(denoise)
        return finite(lambda: self.decode(latents))

    def _check(self, part: str, values: Tensor) -> None:
        if not values.isfinite().all():
            raise NonFiniteError(part, self.dtypes[part])

    def texts(
        self, settings: Settings, labels: dict[str, object] | None = None, exact: dict | None = None
    ) -> dict[str, str]:
        """What a picture carries: its settings in the form of other tools, and exactly, as JSON.

        labels, exact  what else to say in each of them: of the picture that the run began with
        """
        sha256 = self.source.sha256()
        exact = {
            **settings.to_dict(),
            **(exact or {}),
            "model": {"name": self.source.name, "sha256": sha256, "weights": self.source.weights},
            "family": self.config.family,
            "precision": {part: precision_name(dtype) for part, dtype in self.dtypes.items()},
            "device": self.device.type,
            "version": __version__,
            "torch": torch.__version__,
        }
        return {
            "parameters": settings.parameters(self.source.name, sha256 and sha256[:10], labels),
            "sd": json.dumps(exact, ensure_ascii=False),
        }

    def txt2img(
        self, prompt: str, *, width: int | None = None, height: int | None = None, **options: object
    ) -> list[Image.Image]:
        """Pictures from a prompt.

        width, height  pixels, multiples of 8; the model's native size by default
        options        as in `pictures`
        """
        native = self.config.native_size
        size = (native if width is None else width, native if height is None else height)
        return self.pictures(prompt, size, **options)

    def img2img(
        self,
        prompt: str,
        picture: Image.Image,
        *,
        strength: float = 0.75,
        size: tuple[int, int] | None = None,
        resize_mode: str = "crop",
        **options: object,
    ) -> list[Image.Image]:
        """Pictures from a picture and a prompt.

        strength     how much of the picture is changed: 0 gives what the VAE makes of it, 1 forgets it
        size         width and height to work at, multiples of 8; by default the picture's, or near it
        resize_mode  "crop", "pad" or "stretch", where the size is of another shape
        options      as in `pictures`
        """
        canvas = image_to_image(
            picture.convert("RGB"), size, self.config.native_size, InputSettings(resize_mode=resize_mode)
        )
        return self.pictures(prompt, canvas.placement.working, canvas, strength=strength, **options)

    def inpaint(
        self,
        prompt: str,
        picture: Image.Image,
        mask: Image.Image | None,
        *,
        strength: float = 1.0,
        size: tuple[int, int] | None = None,
        inputs: InputSettings | None = None,
        **options: object,
    ) -> list[Image.Image]:
        """Repaint what is white in the mask; where it is black, the picture stays as it is, to the bit.

        mask      a picture of the same size, or None where `inputs` says how far to paint beyond the edges
        strength  how much of what is repainted may change
        inputs    how picture and mask are prepared: blur, only the masked part, expansion, …
        options   as in `pictures`
        """
        mask = None if mask is None else mask.convert("L")
        canvas = inpainting(picture.convert("RGB"), mask, size, self.config.native_size, inputs or InputSettings())
        return self.pictures(prompt, canvas.placement.working, canvas, strength=strength, **options)

    def pictures(
        self,
        prompt: str,
        size: tuple[int, int],
        canvas: Canvas | None = None,
        *,
        count: int = 1,
        batch_size: int = 1,
        seed: int | None = None,
        on_step: Callable[[Tensor], None] | None = None,
        on_retry: Callable[[str], None] | None = None,
        **settings: object,
    ) -> list[Image.Image]:
        """Pictures from a prompt. Picture i has the seed `seed + i`; without a seed, one is drawn.

        canvas             the picture to begin with, if there is one
        count, batch_size  how many batches, and how many pictures are made at a time in each
        on_step, on_retry  as in `make`
        settings           the other fields of `sd.settings.Settings`: negative_prompt, steps, guidance_scale, …
        returns            pictures, whose `info` has the texts that a PNG of them should carry
        """
        for name, number in (("count", count), ("batch_size", batch_size)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        width, height = size
        seed = secrets.randbits(32) if seed is None else seed
        first = Settings(prompt=prompt, seed=seed, width=width, height=height, **settings)
        jobs = [replace(first, seed=first.seed + i) for i in range(count * batch_size)]
        start = None if canvas is None else start_from(canvas.working_picture, canvas.working_mask)
        pictures = []
        for begin in range(0, len(jobs), batch_size):
            batch = jobs[begin : begin + batch_size]
            for picture, job in zip(self.make(batch, start, on_step=on_step, on_retry=on_retry), batch, strict=True):
                finished = picture if canvas is None else canvas.finish(picture)
                finished.info.update(self.texts(job))
                pictures.append(finished)
        return pictures
