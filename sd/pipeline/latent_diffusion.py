"""The networks combined: from settings to latents, and from latents to pictures.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), figure 3. The parts are
attributes of `LatentDiffusion`, and each can be used alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from sd.config import ModelConfig, ScheduleConfig
from sd.networks.text_encoder import TextEncoder
from sd.networks.unet import UNet
from sd.networks.vae import VAE, scaled, unscaled
from sd.pipeline.conditions import Conditions, conditions_for
from sd.pipeline.image.tensors import to_images, to_tensor
from sd.pipeline.runner import Predict, Runner, dtype_of, undisturbed
from sd.pipeline.second_pass import steps_run
from sd.pipeline.settings import SettingError, Settings
from sd.sampling.denoiser import Denoiser
from sd.sampling.init_image import InitImage, PredictEps
from sd.sampling.names import final_alpha
from sd.sampling.noise import PictureNoise
from sd.sampling.samplers import find_sampler
from sd.sampling.schedule import Steps, alphas_cumprod, custom_steps, sampling_steps, x_0_from_eps, zero_terminal_snr
from sd.text.chunks import Chunk, chunks_of, empty_chunk
from sd.text.conditioning import ContextByStep, encode_chunks, encode_in_towers
from sd.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sd.networks.depth import DepthNetwork
    from sd.networks.text_tower import TextTower
    from sd.networks.tiny_vae import TinyVAE
    from sd.text.learned_words import LearnedWord


def table_and_steps(config: ScheduleConfig, settings: Settings) -> tuple[Tensor, Steps]:
    """alpha_bar by timestep, and the steps of the settings' schedule."""
    table = alphas_cumprod(config)
    if settings.zero_terminal_snr:
        table = zero_terminal_snr(table)
    if settings.sigmas:
        return table, custom_steps(table, settings.sigmas)
    discards = settings.discard_penultimate
    options = {"schedule": settings.schedule, "discard_penultimate": discards}
    final = final_alpha(settings.sampler, settings.schedule, discards=discards)
    return table, sampling_steps(table, settings.steps, final_alpha=final, **options)


class LastPrediction:
    """A denoiser that also keeps x_0, the clean latents implied by its last prediction."""

    def __init__(self, predict_eps: PredictEps):
        self.predict_eps = predict_eps

    def __call__(self, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        eps = self.predict_eps(x_t, alpha_bar)
        self.x_0 = x_0_from_eps(x_t, eps, alpha_bar)
        return eps


@dataclass(kw_only=True)
class LatentDiffusion:
    """The parts of a model, and how they work together."""

    config: ModelConfig
    tokenizer: Tokenizer
    text_encoder: TextEncoder
    unet: UNet
    vae: VAE
    text_encoder_2: "TextTower | None" = None  # of a model whose context is made of the vectors of two
    depth_network: "DepthNetwork | None" = None  # which few models have
    tiny_vae: "TinyVAE | None" = None  # decodes in place of the VAE, if there is one
    runner: Runner = field(default_factory=Runner)  # calls the networks
    refiner: "LatentDiffusion | None" = None  # which takes the last steps, see `sd.pipeline.refining`
    words: tuple["LearnedWord", ...] = ()  # that `sd.pipeline.learning` has added to the text encoder's own

    @property
    def device(self) -> torch.device:
        """Where the networks compute."""
        return self.runner.device(self.vae)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The precision of each network."""
        parts = ("text_encoder", "unet", "vae", "text_encoder_2", "tiny_vae")
        return {part: dtype_of(network) for part in parts if (network := getattr(self, part))}

    def encode_prompts(
        self, prompts: Sequence[str], *, plain: bool = False, clip_skip: int = 1, chunks: int = 1
    ) -> Tensor:
        """B prompts -> context (B, 77 * N, D): N chunks for each, at least `chunks`, the last ones empty if need be.

        prompts    the texts at one step: weights and BREAK are read, unless they are plain;
                   `sd.text.prompt_syntax.timeline` gives the texts of a prompt that changes
        clip_skip  1: the text encoder's last layer; 2: the one before it. Families that are trained on the one before
                   it, as XL is, take it at 1, too
        """
        return self.encode_texts(prompts, plain=plain, clip_skip=clip_skip, chunks=chunks)[0]

    @undisturbed()
    def encode_texts(
        self,
        prompts: Sequence[str],
        second: Sequence[str] | None = None,
        *,
        plain: bool = False,
        clip_skip: int = 1,
        chunks: int = 1,
    ) -> tuple[Tensor, Tensor | None]:
        """The same, and the vector (B, P) of each prompt as a whole, for families that have it.

        second  the prompts of the second text encoder; by default, the same
        """
        layers = len(self.text_encoder.layers)
        if clip_skip > layers:
            raise SettingError("clip_skip", f"{clip_skip} is out of range: this text encoder has {layers} layers.")
        texts = [*prompts, *(second or ())]
        rows = [chunks_of(prompt, self.tokenizer, plain=plain) for prompt in texts]
        longest = max(chunks, *map(len, rows))
        rows = [(*row, *[empty_chunk(self.tokenizer)] * (longest - len(row))) for row in rows]
        if self.config.unet.vector_width:
            return self._encode_in_towers(rows[: len(prompts)], rows[-len(prompts) :], clip_skip)
        encoder = partial(self.runner.encode_text, self.text_encoder)
        return encode_chunks(encoder, rows, skip_layers=clip_skip - 1), None

    def _encode_in_towers(
        self, rows: Sequence[Sequence[Chunk]], second: Sequence[Sequence[Chunk]], clip_skip: int
    ) -> tuple[Tensor, Tensor]:
        """Context and pooled vectors of prompts in chunks, for families that have a vector beside the context."""
        towers = [
            (partial(self.runner.encode_in_tower, tower, part=part), getattr(self.config, part).pad_token, prompts)
            for part, prompts in {"text_encoder": rows, "text_encoder_2": second}.items()
            if (tower := getattr(self, part))
        ]
        return encode_in_towers(towers, skip_layers=clip_skip - 1)

    def as_run(self, settings: Settings) -> Settings:
        """The settings by which the sampler runs: without guidance, if the UNet is given its scale.

        Raises SettingError for settings that have no meaning with this model.
        """
        if not (self.config.unet.guidance_width or self.config.schedule.sigma_max):
            return settings
        from sd.pipeline.xl_settings import require_model_for

        require_model_for(settings, self.config)
        return replace(settings, guidance_scale=1.0) if self.config.unet.guidance_width else settings

    def chunk_count(self, settings: Settings) -> int:
        """The number of chunks of a picture's prompts: that of the longest text at any step.

        It must be equal for all pictures of a batch, since one more empty chunk changes a picture.
        """
        texts = {text for line in self.as_run(settings).pairs_by_step() for pair in line for text in pair}
        return max(len(chunks_of(text, self.tokenizer, plain=settings.plain_prompts)) for text in texts)

    def _contexts(self, batch: Sequence[Settings]) -> list[ContextByStep]:
        """The contexts of the prompts and, with guidance, of the negative prompts."""
        common = batch[0]
        options = {"plain": common.plain_prompts, "clip_skip": common.clip_skip, "chunks": self.chunk_count(common)}
        contexts = []
        for lines in zip(*(settings.pairs_by_step() for settings in batch), strict=True):
            texts = list(dict.fromkeys(text for line in lines for text in line))
            rows = [tuple(texts.index(text) for text in now) for now in zip(*lines, strict=True)]
            first, second = map(list, zip(*texts, strict=True))
            encoded, pooled = self.encode_texts(first, None if second == first else second, **options)
            vectors = None
            if pooled is not None:
                from sd.pipeline.vector import vectors_for

                is_negative = bool(contexts)
                encoded, vectors = vectors_for(self.config, common, texts, encoded, pooled, negative=is_negative)
                vectors = vectors.to(self.dtypes["unet"])
            contexts.append(ContextByStep(encoded.to(self.dtypes["unet"]), rows, vectors))
        return contexts

    @undisturbed()
    def encode_image(self, image: Tensor, tile: str = "") -> Tensor:
        """image (B, 3, H, W) in [-1, 1] -> latents (B, 4, H/8, W/8), scaled, float32: the mean of the VAE's posterior.

        tile  the axes, "x" and "y", along which the picture continues at its opposite edge
        """
        mean = self.runner.encode(self.vae, image.to(self.device, self.dtypes["vae"]), tile)
        return scaled(mean.float(), self.config.vae)

    @undisturbed()
    def estimate_depth(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [-1, 1] -> inverse depth (B, 1, any height, any width), float32: large is near.

        Raises SettingError if the model has no depth network.
        """
        from sd.pipeline.image.depth_maps import network_input

        if self.depth_network is None:
            raise SettingError("depth", f"cannot be estimated: this model ({self.config.family}) has no depth network.")
        scaled = network_input(image.to(self.device), self.config.depth.native_size)
        return self.runner.estimate_depth(self.depth_network, scaled)

    @undisturbed()
    def sample(
        self,
        batch: Sequence[Settings],
        init: InitImage | None = None,
        *,
        on_clean: Callable[[Tensor], None] | None = None,
    ) -> Iterator[Tensor]:
        """Denoise a batch of pictures; yields their latents (B, 4, H/8, W/8), float32, after every step.

        If the settings have two passes, this is the first.

        batch     settings that differ in prompts, seeds and variations only
        init      an init image; strength is the share of the steps that run, the last ones. At strength 0, its own
                  latents are yielded; at strength 1, nothing of it is left but what a mask keeps
        on_clean  called after every step with the clean latents (B, 4, H/8, W/8) implied by the last prediction

        Raises ValueError if the settings do not fit each other or the model; NonFiniteError if a network fails.
        """
        self._require_one_batch(batch)
        common, noise = batch[0], self.noise_of(batch)
        edits = common.image_guidance is not None
        encode_image = partial(self.encode_image, tile=common.tile)
        conditions = conditions_for(self.config, init, encode_image, edits=edits)
        _, steps = table_and_steps(self.config.schedule, common)
        skipped = 0 if init is None else len(steps) - steps_run(len(steps), common.strength)
        if skipped == len(steps):
            yield conditions.x_0.expand(len(batch), -1, -1, -1)
            return
        shares = [(self, conditions, range(skipped, len(steps)))]
        if common.switch_at is not None:
            from sd.pipeline.refining import shares_of

            shares = shares_of(self, init, conditions, steps, skipped, common)
        x_t = conditions.initial(noise().to(self.device), steps, skipped)
        for model, given, numbers in shares:
            for latents, x_0 in model._denoised(batch, given, x_t, numbers, skipped, noise):
                if on_clean:
                    on_clean(x_0)
                yield latents
            x_t = latents

    def _denoised(
        self,
        batch: Sequence[Settings],
        conditions: Conditions,
        x_t: Tensor,
        numbers: range,
        skipped: int,
        noise: PictureNoise,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents after each of some steps, and the clean latents predicted in it. Prompts may change between steps.

        x_t      (B, 4, H/8, W/8) before the first of these steps
        numbers  of the steps among all
        skipped  how many of all do not run; prompts count from there
        noise    which samplers add on the way
        """
        guidance_scale, batch = batch[0].guidance_scale, [self.as_run(settings) for settings in batch]
        common, contexts = batch[0], self._contexts(batch)
        table, steps = table_and_steps(self.config.schedule, common)
        unet = self.runner.predictor(self.unet, common, len(batch))
        if self.config.schedule.sigma_max:
            from sd.sampling.continuous import told_log_sigma

            unet = told_log_sigma(unet, self.config.schedule)
        if width := self.config.unet.guidance_width:
            from sd.pipeline.embedded_guidance import guidance_embedding

            embedding = guidance_embedding(guidance_scale, width).to(self.dtypes["unet"])
            unet = partial(unet, guidance=self.runner.send(embedding, self.device))
        unet = conditions.unet(unet, len(batch))
        first = numbers.start - skipped
        denoiser = self._denoiser(unet, table, common, [context(first) for context in contexts])
        predict_eps = LastPrediction(conditions.denoiser(denoiser))

        def denoised() -> Iterator[tuple[Tensor, Tensor]]:
            options = {"draw_noise": lambda: self.runner.send(noise(), self.device)}
            options |= {} if common.eta is None else {"eta": common.eta}
            part = steps[numbers.start : numbers.stop]
            sampler = find_sampler(common.sampler)(predict_eps, x_t.to(self.device), part, **options)
            for step, latents in enumerate(sampler, first + 1):
                yield latents, predict_eps.x_0
                if step < numbers.stop - skipped and any(context.changes(step) for context in contexts):
                    denoiser.set_context(*(context(step) for context in contexts))

        yield from self.runner.run(self.unet, denoised())

    def _denoiser(
        self, unet: Predict, table: Tensor, settings: Settings, contexts: Sequence[tuple[Tensor, ...]]
    ) -> Denoiser:
        return Denoiser(
            unet,
            self.config.prediction,
            table,
            *contexts,
            guidance_scale=settings.guidance_scale,
            guidance_rescale=settings.guidance_rescale,
            guidance_interval=settings.guidance_interval or (0.0, math.inf),
            image_guidance=1.0 if settings.image_guidance is None else settings.image_guidance,
        )

    def _require_one_batch(self, batch: Sequence[Settings]) -> None:
        """Raises ValueError if the pictures cannot be made in one batch, or not by this model."""
        if not all(settings.goes_with(batch[0]) for settings in batch):
            raise ValueError(
                "the pictures of a batch may differ in prompts and seeds only, and where features are reused, their "
                "words must change at the same steps"
            )
        if len({self.chunk_count(settings) for settings in batch}) > 1:
            raise ValueError("the prompts of a batch must have the same number of chunks")
        batch[0].require_prediction(self.config.prediction)

    def noise_of(self, batch: Sequence[Settings]) -> PictureNoise:
        """Draws the noise of each picture, (B, 4, H/8, W/8)."""
        height, width = (side // self.config.vae.factor for side in (batch[0].height, batch[0].width))
        shape = (self.config.vae.latent_channels, height, width)
        seeds, variations = [each.seed for each in batch], [each.variation for each in batch]
        return PictureNoise(seeds, shape, variations, rng=batch[0].rng, seed_delta=batch[0].seed_delta)

    @undisturbed()
    def enlarge(self, latents: Tensor, settings: Settings) -> Tensor:
        """Latents of the first pass -> latents of the second pass's size, from which it begins."""
        from sd.pipeline.upscaling import upscale_latents, upscale_picture

        if settings.hires_upscale == "latent":
            factor = self.config.vae.factor
            width, height = settings.hires
            return upscale_latents(latents, (height // factor, width // factor), settings.tile)
        pictures = self.decode(latents, settings.tile)
        larger = (upscale_picture(picture, settings.hires, settings.tile) for picture in pictures)
        return torch.cat([self.encode_image(to_tensor(picture), settings.tile) for picture in larger])

    @undisturbed()
    def decode(self, latents: Tensor, tile: str = "") -> list[Image.Image]:
        """latents (B, 4, H/8, W/8) from `sample` -> B pictures, decoded one by one to save memory.

        tile  as in `encode_image`

        Raises NonFiniteError instead of returning a black picture.
        """
        pictures, vae = [], self.tiny_vae or self.vae
        for latent in latents.split(1):
            latent = unscaled(latent, self.config.vae)
            if self.tiny_vae:  # which takes them scaled, by one number
                latent = self.tiny_vae.config.latent_scale * latent
            pictures += to_images(self.runner.decode(vae, latent.to(dtype_of(vae)), tile))
        return pictures
