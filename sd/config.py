"""Every number of every model, written down once.

A config says what a network consists of, never on which device, in which precision or how fast it runs.
A variant of a family is `replace(...)` of its nearest relative, so only the differences are written down.
"""

from dataclasses import dataclass, fields, is_dataclass, replace

SEED_LIMIT = 2**64  # seeds are below it, as those of torch's generators
SMALLEST_SIDE, LARGEST_SIDE = 64, 4096  # of a picture, in pixels
USUAL_GUIDANCE = 7.5  # scale of pictures that ask for no other, unless their model does


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    vocabulary: int  # rows of the token embedding
    context_length: int  # positions, start and end token included
    width: int  # of a token's vector, and of the context that the UNet attends to
    hidden_width: int  # inside the feed-forward
    layers: int
    heads: int
    activation: str  # "quick_gelu" (OpenAI's CLIP) or "gelu" (OpenCLIP)
    pad_token: int  # fills the positions after the end token
    skipped_layers: int = 0  # last ones; if any, the context is the output of the layer before, not normed
    pooled_width: int = 0  # of the vector that stands for a whole prompt; 0: there is none


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    in_channels: int  # 4 for noisy latents; +1 for depth, +4 for a picture to edit, +5 for mask and masked latents
    out_channels: int
    width: int  # channels of the first level
    multipliers: tuple[int, ...]  # channels of each level, in units of width
    residuals_per_level: int  # on the way down; one more on the way up
    depths: tuple[int, ...]  # transformer blocks after each residual block, by level; 0: no attention at that level
    middle_depth: int  # transformer blocks in the middle block
    heads: tuple[int, ...]  # attention heads by level; the middle block uses the last level's
    context_width: int  # of one text vector
    groups: int  # of every group norm
    vector_width: int = 0  # of what it is given beside the text: the pooled prompt and sizes; 0: nothing
    guidance_width: int = 0  # of the embedded guidance scale, where it was distilled with guidance; 0: it was not


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    image_channels: int
    latent_channels: int
    width: int  # channels of the first level
    multipliers: tuple[int, ...]  # channels of each level, in units of width
    residuals_per_level: int  # in the encoder; one more in the decoder
    groups: int  # of every group norm
    latent_scale: float  # factor applied to latents after encoding, which gives them about unit variance
    latent_means: tuple[float, ...] = ()  # by channel, subtracted before; with them come deviations to divide by
    latent_deviations: tuple[float, ...] = ()

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True, kw_only=True)
class TinyVAEConfig:
    image_channels: int
    latent_channels: int
    width: int  # channels of every layer inside
    levels: int  # each halves the sides, or doubles them
    blocks_per_level: int
    latent_scale: float  # of the VAE that it stands in for

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return 2**self.levels


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    stem_width: int  # channels after the first convolution
    stage_widths: tuple[int, ...]  # channels of each convolutional stage; the first is at 1/4 of the picture's size
    stage_blocks: tuple[int, ...]  # residual blocks in each stage
    groups: int  # of every group norm
    width: int  # of a token's vector in the transformer
    hidden_width: int  # inside the feed-forward
    layers: int
    heads: int
    grid: int  # tokens along one side of a training picture: as many positions as were trained, squared
    taps: tuple[int, ...]  # transformer layers whose outputs are read, counted from 0
    fusion_width: int  # channels on the way back to the picture's size
    head_width: int  # channels before the last convolution

    @property
    def native_size(self) -> int:
        """Side of the training pictures, in pixels: each token stands for 16x16."""
        return 16 * self.grid


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    timesteps: int  # of the forward process
    beta_start: float  # variance of the noise added at the first timestep
    beta_end: float  # and at the last
    sigma_min: float = 0.0  # of noise levels without timesteps, as `sd.sampling.continuous` has them; 0: there are none
    sigma_max: float = 0.0
    sigma_data: float = 1.0  # the latents' standard deviation, in units of which these sigmas are


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    family: str
    text_encoder: TextEncoderConfig
    unet: UNetConfig
    vae: VAEConfig
    schedule: ScheduleConfig
    prediction: str  # what the UNet predicts: "eps", the noise; "v", the velocity; "edm", -v; or "x0", clean latents
    native_size: int  # side of the training pictures, in pixels
    guidance_scale: float = USUAL_GUIDANCE  # of pictures that ask for no other
    text_encoder_2: TextEncoderConfig | None = None  # of a model whose UNet attends to the vectors of two, side by side
    depth: DepthConfig | None = None  # of a model that has a depth network

    def to_dict(self) -> dict:
        """Plain nested data, for JSON. What most models do not have is left out where there is none."""
        return _plain(self)

    @classmethod
    def from_dict(cls, data: dict) -> "ModelConfig":
        """The inverse of `to_dict`; also takes the lists that JSON makes of tuples."""
        built = {
            name: part(**{key: tuple(value) if isinstance(value, list) else value for key, value in data[name].items()})
            for name, part in PARTS.items()
            if data.get(name)
        }
        return cls(**{**data, **built})


PARTS = {
    "text_encoder": TextEncoderConfig,
    "unet": UNetConfig,
    "vae": VAEConfig,
    "schedule": ScheduleConfig,
    "text_encoder_2": TextEncoderConfig,
    "depth": DepthConfig,
}


def _plain(config: object) -> dict:
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    given = {each.name: values[each.name] for each in fields(config) if values[each.name] != each.default}
    return {name: _plain(value) if is_dataclass(value) else value for name, value in given.items()}


# Stable Diffusion 1.1 to 1.5: CompVis, configs/stable-diffusion/v1-inference.yaml.
SD_V1 = ModelConfig(
    family="sd-v1",
    # CLIP ViT-L/14: width, layers and heads as in Radford et al. (2021), table 20; the other numbers as in the released
    # model, which has slightly more tokens and positions than section 2.4 of the paper states.
    text_encoder=TextEncoderConfig(
        vocabulary=49408,
        context_length=77,
        width=768,
        hidden_width=3072,
        layers=12,
        heads=12,
        activation="quick_gelu",
        pad_token=49407,
    ),
    unet=UNetConfig(
        in_channels=4,
        out_channels=4,
        width=320,
        multipliers=(1, 2, 4, 4),
        residuals_per_level=2,
        depths=(1, 1, 1, 0),
        middle_depth=1,
        heads=(8, 8, 8, 8),
        context_width=768,
        groups=32,
    ),
    vae=VAEConfig(
        image_channels=3,
        latent_channels=4,
        width=128,
        multipliers=(1, 2, 4, 4),
        residuals_per_level=2,
        groups=32,
        # 1 / standard deviation of this VAE's latents: Rombach et al. (2022), section G; value from the original config
        latent_scale=0.18215,
    ),
    schedule=ScheduleConfig(timesteps=1000, beta_start=0.00085, beta_end=0.012),
    prediction="eps",
    native_size=512,
)

# Input channels: the noisy latents (4), the mask (1), the latents of the masked picture (4).
SD_V1_INPAINTING = replace(SD_V1, family="sd-v1-inpainting", unet=replace(SD_V1.unet, in_channels=9))

# InstructPix2Pix. Input channels: the noisy latents (4), the latents of the picture to edit (4).
SD_V1_EDIT = replace(SD_V1, family="sd-v1-edit", unet=replace(SD_V1.unet, in_channels=8))

# Input channels: the noisy latents (4), the depth (1). Without a depth network: depth maps are given to it.
SD_V1_DEPTH = replace(SD_V1, family="sd-v1-depth", unet=replace(SD_V1.unet, in_channels=5))

# OpenCLIP's text encoder, ViT-H/14. Stable Diffusion 2 was trained with the output of the last layer but one: of the 24
# layers in its files, the last is never run.
OPEN_CLIP_H = replace(
    SD_V1.text_encoder, width=1024, hidden_width=4096, layers=23, heads=16, activation="gelu", pad_token=0
)

# Stable Diffusion 2.0 and 2.1: Stability-AI/stablediffusion, v2-inference-v.yaml and its neighbours. The models for
# 512x512 pictures predict eps: no name or shape tells them apart.
SD_V2 = replace(
    SD_V1,
    family="sd-v2",
    text_encoder=OPEN_CLIP_H,
    unet=replace(SD_V1.unet, heads=(5, 10, 20, 20), context_width=1024),  # 64 channels in each head
    prediction="v",
    native_size=768,
)
SD_V2_INPAINTING = replace(
    SD_V2,
    family="sd-v2-inpainting",
    unet=replace(SD_V2.unet, in_channels=9),
    prediction="eps",
    native_size=512,
)
SD_V2_EDIT = replace(SD_V2, family="sd-v2-edit", unet=replace(SD_V2.unet, in_channels=8))

# MiDaS 3's DPT-Hybrid, which lies in the files of Stable Diffusion 2 depth: Ranftl et al. (2021), section 3, with the
# numbers of the original code, midas/vit.py; its encoder is the R50+ViT-B/16 of Dosovitskiy et al. (2021).
DPT_HYBRID = DepthConfig(
    stem_width=64,
    stage_widths=(256, 512, 1024),
    stage_blocks=(3, 4, 9),
    groups=32,
    width=768,
    hidden_width=3072,
    layers=12,
    heads=12,
    grid=24,
    taps=(8, 11),
    fusion_width=256,
    head_width=32,
)

# Input channels: the noisy latents (4), the depth (1).
SD_V2_DEPTH = replace(
    SD_V2,
    family="sd-v2-depth",
    unet=replace(SD_V2.unet, in_channels=5),
    prediction="eps",
    native_size=512,
    depth=DPT_HYBRID,
)

# OpenCLIP's ViT-bigG/14, all of whose layers are run: the pooled vector is that of the last one.
OPEN_CLIP_BIG_G = replace(
    OPEN_CLIP_H, width=1280, hidden_width=5120, layers=32, heads=20, skipped_layers=1, pooled_width=1280
)

# Stable Diffusion XL: Podell et al. (2023), table 1; Stability-AI/generative-models, sd_xl_base.yaml. Each head of its
# UNet has 64 channels. Its vector is the pooled prompt (1280) and six sizes of 256 values each.
SDXL = replace(
    SD_V1,
    family="sdxl",
    text_encoder=replace(SD_V1.text_encoder, skipped_layers=1),
    text_encoder_2=OPEN_CLIP_BIG_G,
    unet=replace(
        SD_V1.unet,
        multipliers=(1, 2, 4),
        depths=(0, 2, 10),
        middle_depth=10,
        heads=(5, 10, 20),
        context_width=768 + 1280,
        vector_width=1280 + 6 * 256,
    ),
    vae=replace(SD_V1.vae, latent_scale=0.13025),
    native_size=1024,
)
SDXL_INPAINTING = replace(SDXL, family="sdxl-inpainting", unet=replace(SDXL.unet, in_channels=9))

# The second model for the last steps: sd_xl_refiner.yaml. It reads OpenCLIP's text encoder only, and of the sizes the
# last two are replaced by one number, how beautiful the picture is.
SDXL_REFINER = replace(
    SDXL,
    family="sdxl-refiner",
    text_encoder=OPEN_CLIP_BIG_G,
    text_encoder_2=None,
    unet=replace(
        SD_V1.unet,
        width=384,
        depths=(0, 4, 4, 0),
        middle_depth=4,
        heads=(6, 12, 24, 24),
        context_width=1280,
        vector_width=1280 + 5 * 256,
    ),
)

# Ollin Boer Bohan, "TAESD" (2023), for Stable Diffusion 1 and 2; that for XL differs in the scale of its latents.
TAESD = TinyVAEConfig(
    image_channels=3,
    latent_channels=4,
    width=64,
    levels=3,
    blocks_per_level=3,
    latent_scale=SD_V1.vae.latent_scale,
)

FAMILIES = {
    config.family: config
    for config in (
        *(SD_V1, SD_V1_INPAINTING, SD_V1_EDIT, SD_V1_DEPTH),
        *(SD_V2, SD_V2_INPAINTING, SD_V2_EDIT, SD_V2_DEPTH),
        *(SDXL, SDXL_INPAINTING, SDXL_REFINER),
    )
}


def list_models() -> list[str]:
    """The names of the families that `sd.load` can load, for `get_config`: "sd-v1", ..., "sdxl-refiner".

    `sd models list` shows published checkpoints of these families.
    """
    return list(FAMILIES)


def get_config(family: str) -> ModelConfig:
    """Every number of a family, frozen; `dataclasses.replace` makes a variant.

    A loaded model has its own in `model.config`: fine-tunes may be trained for another prediction or size, and
    the 512x512 models of Stable Diffusion 2 are (eps, where "sd-v2" says v and 768).

    Raises ValueError for a name that is not in `list_models()`.
    """
    if not isinstance(family, str):
        raise ValueError(f"a family is named by a string, such as {SDXL.family!r}; got {type(family).__name__}")
    if family not in FAMILIES:
        import difflib

        near = difflib.get_close_matches(family[:60].lower(), FAMILIES, n=3, cutoff=0.5)
        names = ", ".join(near + [name for name in FAMILIES if name not in near])
        raise ValueError(f"there is no family {family[:60]!r}; there are {names}")
    return FAMILIES[family]
