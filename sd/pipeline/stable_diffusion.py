"""From a prompt to pictures that carry their settings.

How the networks work together is in `sd.pipeline.latent_diffusion`.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from PIL import Image
from torch import Tensor

from sd import __version__
from sd.pipeline.image.parameters import parameters_of
from sd.pipeline.image.tensors import init_image_from
from sd.pipeline.latent_diffusion import LatentDiffusion
from sd.pipeline.runner import NonFiniteError, dtype_of, precision_name, widen
from sd.pipeline.second_pass import first_size
from sd.pipeline.settings import IMAGE_GUIDANCE, SettingError, Settings
from sd.sampling.init_image import InitImage

if TYPE_CHECKING:
    from os import PathLike

    from sd.pipeline.image.canvas import Canvas
    from sd.pipeline.image.given import Given
    from sd.pipeline.image.input_settings import InputSettings

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class VAESource:
    """The file of a VAE that is used in place of the model's own."""

    name: str  # of the file
    sha256: Callable[[], str | None]  # as in `Source`


@dataclass(frozen=True, kw_only=True)
class Source:
    """The file that the weights came from."""

    name: str  # of the file, without its suffix
    weights: str  # "ema" or "model"
    sha256: Callable[[], str | None]  # None if the file is gone; takes seconds for a large one, the first time
    # What the file itself does not tell: {"prediction": "v"}
    beside: Mapping[str, object] = field(default_factory=dict)
    vae: VAESource | None = None  # None: the model's own
    tiny_vae: VAESource | None = None  # that decodes, if there is one

    @property
    def label(self) -> str:
        """Its name and hash, as the common web UI writes them."""
        sha256 = self.sha256()
        return f"{self.name} [{sha256[:10]}]" if sha256 else self.name

    def facts(self) -> dict[str, object]:
        """What a picture notes of its model. May take seconds, the first time."""
        others = {"vae": self.vae, "tiny_vae": self.tiny_vae}
        others = {part: {"name": file.name, "sha256": file.sha256()} for part, file in others.items() if file}
        return {"name": self.name, "sha256": self.sha256(), "weights": self.weights, **self.beside, **others}


@dataclass(kw_only=True)
class StableDiffusion(LatentDiffusion):
    """A loaded model: its parts, and the way from a prompt to a picture."""

    source: Source
    zero_terminal_snr: bool = False  # trained to begin at pure noise: pictures do, unless their settings say otherwise
    usual: Mapping[str, object] = field(default_factory=dict)  # settings that its file states, for pictures without

    @property
    def adapters(self) -> tuple:
        """The adapters in use, in the order in which they were given: each a `sd.runtime.adapters.AppliedAdapter`."""
        return self.runner.adapters

    def apply(self, adapters: Sequence) -> None:
        """Use these adapters (LoRA and its relatives) and no others; [] takes all off, to the bit.

        adapters  of each its path, or (path, strength), or (path, strength, strength in the text encoder); without the
                  last, both are the same. 1 is as trained, any number is allowed. One of `adapters` stays as it is:
                  model.apply([*model.adapters, path]) adds one

        Every adapter changes the weights that were loaded, whatever others do to them, so their order does not matter.
        If one cannot be used, the model stays as it was. Raises CheckpointError for such files, SettingError for other
        mistakes, RuntimeError while a picture is being made.
        """
        self.runner.apply(self, adapters)

    def learn(self, files: Sequence["str | PathLike"]) -> None:
        """Learn the words in files of textual inversion, in place of those learned from files before; [] forgets them.

        files  and folders of them: of a folder, those that are for models of this family

        `words` tells which there are. A word's name is that of its file; `sd.text.learned_words` says how prompts use
        it. Raises `convert.errors.CheckpointError`, a ValueError, for what cannot be read or is for another family;
        RuntimeError while a picture is being made.
        """
        self.runner.learn(self, files)

    def settings_for(self, prompt: str, **given: object) -> Settings:
        """Settings of a picture, with the model's own native size and usual settings where no others are given.

        Raises SettingError for invalid ones.
        """
        usual = {name: value for name, value in self.usual.items() if not (name == "steps" and given.get("sigmas"))}
        own = dict.fromkeys(("width", "height"), self.config.native_size)
        own |= {"guidance_scale": self.config.guidance_scale, "zero_terminal_snr": self.zero_terminal_snr}
        return Settings(prompt=prompt, **{**own, **usual, **given})

    def make(
        self,
        batch: Sequence[Settings],
        start: InitImage | None = None,
        *,
        on_step: Callable[[Tensor], None] | None = None,
        on_retry: Callable[[str], None] | None = None,
        on_clean: Callable[[Tensor], None] | None = None,
        clean: list[Tensor] | None = None,
    ) -> list[Image.Image]:
        """Denoise and decode a batch, in two passes if the settings ask for them.

        If a network fails, its stage is run again in float32.

        start     an init image, as in `sample`
        on_step   called with the latents (B, 4, H/8, W/8) after every step
        on_retry  called with a sentence when a stage is run again
        on_clean  called, before on_step, with the clean latents (B, 4, H/8, W/8) predicted in the step
        clean     gets the clean latents (B, 4, H/8, W/8) predicted in every step of every pass

        Raises NonFiniteError if a network fails in float32, too.
        """
        if start is not None and batch[0].hires:
            raise ValueError("hires works only without an input image")

        def denoise(batch: Sequence[Settings], start: InitImage | None) -> Tensor:
            latents, predicted = None, []

            def keep(x_0: Tensor) -> None:
                if clean is not None:
                    predicted.append(x_0)
                if on_clean:
                    on_clean(x_0)

            with closing(self.sample(batch, start, on_clean=keep)) as steps:  # also if on_step raises
                for latents in steps:
                    if on_step:
                        on_step(latents)
            if clean is not None:
                clean.extend(predicted)
            return latents

        def finite(stage: Callable[[], T]) -> T:
            try:
                return stage()
            except NonFiniteError as error:
                if dtype_of(error.network) == torch.float32:
                    raise
                widen(error.network)
                if on_retry:
                    on_retry(f"{error}; retrying in fp32; the network stays in fp32")
                return finite(stage)

        with self.runner.in_use():
            latents = finite(lambda: denoise(batch, start))
            if batch[0].hires:
                larger = InitImage(latents=finite(lambda: self.enlarge(latents, batch[0])))
                second = [settings.passes()[1] for settings in batch]
                latents = finite(lambda: denoise(second, larger))
            return finite(lambda: self.decode(latents, batch[0].tile))

    def texts(
        self, settings: Settings, labels: dict[str, object] | None = None, exact: dict | None = None
    ) -> dict[str, str]:
        """The texts stored in a picture: its settings in the form of other tools, and exactly, as JSON.

        labels, exact  further entries of each, about an init image
        """
        made_of = self.source.facts()
        sha256, vae = made_of["sha256"], made_of.get("vae")
        if vae:  # as the common web UI names them
            labels = {"VAE hash": vae["sha256"] and vae["sha256"][:10], "VAE": vae["name"], **(labels or {})}
        if tiny := made_of.get("tiny_vae"):
            labels = {"VAE Decoder": "TAESD", "Tiny VAE hash": tiny["sha256"] and tiny["sha256"][:10], **(labels or {})}
        used = {}
        if settings.switch_at is not None:
            used["refiner"] = self.refiner.source.facts()
            labels = {"Refiner": self.refiner.source.label, **(labels or {})}
        if self.words or self.adapters:
            from sd.pipeline.adapters import noted

            hashes, files = noted(self, settings)
            used |= files
            labels = {**hashes, **(labels or {})}
        exact = {
            **settings.to_dict(),
            **(exact or {}),
            "model": made_of,
            **used,
            "family": self.config.family,
            "precision": {part: precision_name(dtype) for part, dtype in self.dtypes.items()},
            "device": self.device.type,
            "version": __version__,
            "torch": torch.__version__,
        }
        exact |= self.runner.notes(settings)
        return {
            "parameters": parameters_of(settings, self.source.name, sha256 and sha256[:10], labels),
            "sd": json.dumps(exact, ensure_ascii=False),
        }

    def txt2img(
        self, prompt: str, *, width: int | None = None, height: int | None = None, **options: object
    ) -> list[Image.Image]:
        """Pictures from a prompt.

        width, height  pixels, multiples of 8; the model's native size by default; with `hires`, of the first pass
        options        as in `pictures`
        """
        native = self.config.native_size, self.config.native_size
        if options.get("hires") is not None and width is None and height is None:
            native = first_size(options["hires"], self.config.native_size)
        size = (native[0] if width is None else width, native[1] if height is None else height)
        return self.pictures(prompt, size, **options)

    def img2img(
        self,
        prompt: str,
        picture: "Given",
        *,
        strength: float = 0.75,
        size: tuple[int, int] | None = None,
        width: int | None = None,
        height: int | None = None,
        resize_mode: str = "crop",
        max_megapixels: float = 64,
        **options: object,
    ) -> list[Image.Image]:
        """Pictures from a picture and a prompt.

        picture         a path, a PIL image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4); transparent parts are
                        laid on white
        strength        how much of the picture is changed: 0 only encodes and decodes it, 1 ignores it
        size            (width, height) to work at, multiples of 8; by default the picture's, or near it
        width, height   the same, one by one
        resize_mode     "crop", "pad" or "stretch", if the size has another shape
        max_megapixels  the largest picture that is read
        options         as in `pictures`

        Raises PictureError for files that cannot be read, TypeError for what is no picture.
        """
        from sd.pipeline.image.canvas import image_to_image, size_from
        from sd.pipeline.image.given import given_picture
        from sd.pipeline.image.input_settings import InputSettings
        from sd.pipeline.image.reading import flatten

        size = size_from(size, width, height)
        init = flatten(given_picture(picture, megapixels=max_megapixels), "white")
        canvas = image_to_image(init, size, self.config.native_size, InputSettings(resize_mode=resize_mode))
        return self.pictures(prompt, canvas.placement.working, canvas, strength=strength, **options)

    def edit(
        self, instruction: str, picture: "Given", *, image_guidance: float = IMAGE_GUIDANCE, **options: object
    ) -> list[Image.Image]:
        """Change a picture by an instruction, with a model trained for it: its UNet takes 8 channels.

        instruction     what to change: "make it snow"
        image_guidance  how much to keep to the picture: s_I in eq. 3 of Brooks et al., "InstructPix2Pix" (2023), whose
                        s_T is guidance_scale; at 1, the prediction without the picture is not needed
        picture, options
                        as in `img2img`; there is no strength, since editing begins at pure noise

        Raises ValueError for another model, PictureError for files that cannot be read, TypeError for what is no
        picture.
        """
        if image_guidance is None:
            raise SettingError("image_guidance", "must be a number for editing, such as 1.5.")
        return self.img2img(instruction, picture, **{"strength": 1.0, **options, "image_guidance": image_guidance})

    def inpaint(
        self,
        prompt: str,
        picture: "Given",
        mask: "Given | None" = None,
        *,
        strength: float = 1.0,
        size: tuple[int, int] | None = None,
        width: int | None = None,
        height: int | None = None,
        inputs: "InputSettings | None" = None,
        max_megapixels: float = 64,
        **options: object,
    ) -> list[Image.Image]:
        """Repaint where the mask is white; where it is black, not a bit of the picture changes.

        picture, mask  as the picture of `img2img`, of the same size; of a mask with transparency, `rule_for` in
                       `sd.pipeline.image.masks` says which part is white; None if `inputs` says how far to paint
                       beyond the edges
        strength       how much the repainted part may change
        inputs         how picture and mask are prepared: blur, only the masked part, expansion, …
        size, width, height, max_megapixels, options  as in `img2img`

        Raises PictureError for files that cannot be read and masks that repaint nothing, TypeError for what is no
        picture.
        """
        from sd.pipeline.image.canvas import inpainting, size_from
        from sd.pipeline.image.given import given_picture
        from sd.pipeline.image.input_settings import InputSettings
        from sd.pipeline.image.masks import mask_from, rule_for

        size = size_from(size, width, height)
        init = given_picture(picture, megapixels=max_megapixels)
        if mask is not None:
            mask = given_picture(mask, "mask", colour_managed=False, megapixels=max_megapixels)
            mask = mask_from(mask, rule_for(mask, init))
        canvas = inpainting(init, mask, size, self.config.native_size, inputs or InputSettings())
        return self.pictures(prompt, canvas.placement.working, canvas, strength=strength, **options)

    def depth2img(
        self,
        prompt: str,
        picture: "Given",
        depth: "Given | None" = None,
        *,
        strength: float = 0.8,
        size: tuple[int, int] | None = None,
        width: int | None = None,
        height: int | None = None,
        resize_mode: str = "crop",
        invert_depth: bool = False,
        max_megapixels: float = 64,
        **options: object,
    ) -> list[Image.Image]:
        """Pictures from a picture and a prompt that keep its depth: how near each of its points is.

        picture       as the picture of `img2img`
        depth         a depth map of the same shape, near is bright: a path, a PIL image of any kind, or an array of
                      numbers (H, W); by default, the model's depth network estimates it from the picture
        strength      how much of the picture is changed; at 1, only its depth is kept
        invert_depth  dark is near in the depth map
        size, width, height, resize_mode, max_megapixels, options  as in `img2img`

        Needs a model whose UNet reads depth. Raises PictureError for files that cannot be read, TypeError for what is
        no picture, SettingError if no depth map is given and the model has no depth network, or invert_depth is True.
        """
        from sd.pipeline.image.canvas import depth_to_image, size_from
        from sd.pipeline.image.depth_maps import given_depth_map
        from sd.pipeline.image.given import given_picture
        from sd.pipeline.image.input_settings import InputSettings
        from sd.pipeline.image.reading import flatten

        size = size_from(size, width, height)
        init = flatten(given_picture(picture, megapixels=max_megapixels), "white")
        if depth is None and invert_depth:
            raise SettingError("invert_depth", "is for a depth map of your own. Give one, or leave it out.")
        if depth is not None:
            depth = given_depth_map(depth, invert=invert_depth, megapixels=max_megapixels)
        canvas = depth_to_image(init, depth, size, self.config.native_size, InputSettings(resize_mode=resize_mode))
        return self.pictures(prompt, canvas.placement.working, canvas, strength=strength, **options)

    def depth(self, picture: "Given", *, max_megapixels: float = 64) -> Image.Image:
        """The depth map of a picture: how near each of its points is, estimated by the model's depth network.

        picture         as the picture of `img2img`
        max_megapixels  the largest picture that is read
        returns         a grey picture of the same size, 16 bits, from 0, far, to 65535, near

        Raises PictureError and TypeError as `img2img` does, SettingError if the model has no depth network.
        """
        from sd.pipeline.image.depth_maps import grey_picture
        from sd.pipeline.image.given import given_picture
        from sd.pipeline.image.reading import flatten
        from sd.pipeline.image.tensors import to_tensor

        picture = flatten(given_picture(picture, megapixels=max_megapixels), "white")
        return grey_picture(self.estimate_depth(to_tensor(picture)), picture.size)

    def start_of(self, canvas: "Canvas") -> InitImage:
        """What a run begins with: a canvas at the working size, and its depth if the model reads that."""
        start = init_image_from(canvas.working_picture, canvas.working_mask)
        if not canvas.reads_depth:
            return start
        if canvas.depth_map is None:
            return replace(start, depth=self.estimate_depth(start.image))
        from sd.pipeline.image.depth_maps import to_depth

        return replace(start, depth=to_depth(canvas.working_depth))

    def pictures(
        self,
        prompt: str,
        size: tuple[int, int],
        canvas: "Canvas | None" = None,
        *,
        count: int = 1,
        batch_size: int = 1,
        seed: int | None = None,
        on_step: Callable[[Tensor], None] | None = None,
        on_retry: Callable[[str], None] | None = None,
        **settings: object,
    ) -> list[Image.Image]:
        """Pictures from a prompt. Picture i has the seed `seed + i`; without a seed, or with -1, one is drawn.

        With `vary`, all have the same seed, and picture i has the variation seed `vary_seed + i`.

        canvas             the init image, if there is one
        count, batch_size  number of batches, and of pictures in each
        on_step, on_retry  as in `make`
        settings           other fields of `sd.pipeline.settings.Settings`: negative_prompt, steps, guidance_scale, …
        returns            pictures, whose `info` has the texts to store in a PNG

        Raises SettingError for invalid settings and those that the model does not read, and where the prompt names an
        adapter that was not applied.
        """
        for name, number in (("count", count), ("batch_size", batch_size)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        width, height = size
        seed = secrets.randbits(32) if seed in (None, -1) else seed
        if settings.get("vary") and settings.get("vary_seed") in (None, -1):
            settings["vary_seed"] = secrets.randbits(32)
        first = self.settings_for(prompt, seed=seed, width=width, height=height, **settings)
        from sd.pipeline.xl_settings import NEEDS, require_readers

        if NEEDS.keys() & settings.keys():
            refined = self.refiner is not None and first.switch_at is not None
            require_readers(first, self.config, self.refiner.config if refined else None)
        with self.runner.in_use():  # adapters and words stay until they are noted
            if self.adapters or first.adapters:
                from sd.pipeline.adapters import with_applied

                first = with_applied(first, self.adapters)
            jobs = [first.counted_on(i) for i in range(count * batch_size)]
            start = None if canvas is None else self.start_of(canvas)
            pictures = []
            for begin in range(0, len(jobs), batch_size):
                batch = jobs[begin : begin + batch_size]
                for picture, job in zip(
                    self.make(batch, start, on_step=on_step, on_retry=on_retry), batch, strict=True
                ):
                    finished = picture if canvas is None else canvas.finish(picture)
                    finished.info.update(self.texts(job))
                    pictures.append(finished)
        return pictures
