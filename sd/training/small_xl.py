"""Begin a small Stable Diffusion XL with the weights of a small ordinary model.

Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (2023), table 1: two text
encoders, and a UNet of three levels with most of its transformer blocks in the last.
"""

import copy
from dataclasses import replace

import torch
from torch import nn

from sd.config import SD_V1, SDXL, ModelConfig, TextEncoderConfig
from sd.networks.text_encoder import TextEncoder
from sd.networks.text_tower import TextTower
from sd.networks.unet import UNet
from sd.pipeline.latent_diffusion import LatentDiffusion
from sd.pipeline.vector import NUMBER_WIDTH
from sd.training.losses import rescale_latents

SIZES = 6  # numbers about the picture in XL's vector
ADDED = ("token_embedding.", "position_embedding.", ".attention.out.", ".feed_forward.proj_out.")
SHRUNK = 0.02  # what a text encoder adds up, beside
NORMED = 3.0  # the copy of its normed output that is added last


def xl_config(config: ModelConfig) -> ModelConfig:
    """A model of XL's kind with two text encoders like this model's one, and with the first levels of its UNet.

    Raises ValueError for a model that cannot become one.
    """
    head = SDXL.unet.width // SDXL.unet.heads[0]
    if config.family != SD_V1.family or config.unet.width % head:
        raise ValueError(
            f"a small XL begins with a Stable Diffusion 1 model whose UNet is a multiple of {head} wide; this is "
            f"{config.family}, {config.unet.width} wide"
        )

    def text(base: TextEncoderConfig) -> TextEncoderConfig:
        width = config.text_encoder.width
        return replace(
            base,
            width=width,
            hidden_width=config.text_encoder.hidden_width,
            layers=config.text_encoder.layers + 2,
            heads=config.text_encoder.heads,
            pooled_width=width if base.pooled_width else 0,
        )

    first, second = text(SDXL.text_encoder), text(SDXL.text_encoder_2)
    multipliers = config.unet.multipliers[: len(SDXL.unet.multipliers)]
    return replace(
        SDXL,
        text_encoder=first,
        text_encoder_2=second,
        unet=replace(
            config.unet,
            multipliers=multipliers,
            depths=(0, 1, 2),
            middle_depth=2,
            heads=tuple(config.unet.width * multiplier // head for multiplier in multipliers),
            context_width=first.width + second.width,
            vector_width=second.pooled_width + SIZES * NUMBER_WIDTH,
        ),
        vae=replace(config.vae, latent_scale=SDXL.vae.latent_scale),
        prediction=config.prediction,
        native_size=config.native_size,
    )


@torch.no_grad()
def tower_from(encoder: TextEncoder, config: TextEncoderConfig, padding: int) -> TextTower:
    """A text encoder of XL's kind whose context is about a multiple of this one's.

    XL reads a layer's output without the final norm. So a further layer adds a normed copy, beside which everything
    else is small: its feed-forward is the identity, z = gelu(z) - gelu(-z). The last layer, of which XL reads nothing
    but the pooled vector, passes its input on.

    padding  the token that fills this encoder's rows; the new one's token gets its vector
    """
    tower, width = TextTower(config), config.width
    copying, last = tower.layers[-2:]
    for layer in (copying.attention.out, copying.feed_forward, last.attention.out, last.feed_forward):
        for values in layer.parameters():
            values.zero_()
    known = encoder.state_dict()
    shrunk = {name: SHRUNK * values for name, values in known.items() if any(part in name for part in ADDED)}
    tower.load_state_dict(tower.state_dict() | known | shrunk)
    tower.token_embedding.weight[config.pad_token] = tower.token_embedding.weight[padding]
    norm = tower.layers[0].norm1  # reads the small embeddings, beside which its eps is large: its gain makes up for it
    row = torch.full((1, config.context_length), padding, dtype=torch.int64, device="cpu")
    variance = tower.embed(row).var(dim=-1, correction=0).mean()
    norm.weight *= ((variance + norm.eps) / (variance + SHRUNK**2 * norm.eps)).sqrt()
    identity = torch.eye(width, dtype=torch.float32, device="cpu")
    copying.norm2.load_state_dict(encoder.final_norm.state_dict())
    copying.feed_forward.proj_in.weight[: 2 * width] = torch.cat([identity, -identity])
    copying.feed_forward.proj_out.weight.copy_(NORMED * copying.feed_forward.proj_in.weight.T)
    if tower.projection is not None:
        tower.projection.weight.copy_(identity)
    return tower


@torch.no_grad()
def unet_from(unet: UNet, config: ModelConfig, scale: float) -> UNet:
    """XL's UNet with the blocks of an ordinary one's first levels.

    Further transformer blocks and the vector have no effect at first. Attention has fewer, wider heads than before, so
    the UNet does not predict the same: it has to be trained.

    scale  how much larger the contexts of the new text encoders are than that of the old one
    """
    new = UNet(config.unet)
    fewer = len(unet.output_blocks) - len(new.output_blocks)  # the old one's further levels are at the bottom
    known = {}
    for name, values in unet.state_dict().items():
        if name.startswith("output_blocks."):
            stage, index, rest = name.split(".", 2)
            name = f"{stage}.{int(index) - fewer}.{rest}"
        if name.endswith(("cross_attention.k.weight", "cross_attention.v.weight")):
            values = torch.cat([values, values], dim=1) / (2 * scale)  # half of it from each text encoder
        known[name] = values
    for name, module in new.named_modules():
        if name.endswith(("attention.out", "feed_forward.proj_out", "label_emb.linear2")):
            module.weight.zero_()
            module.bias.zero_()
    new.load_state_dict({name: known.get(name, values) for name, values in new.state_dict().items()})
    new.label_emb.linear1.weight[:, -SIZES * NUMBER_WIDTH :] = 0
    return new


@torch.no_grad()
def networks_from(model: LatentDiffusion, config: ModelConfig, seed: int) -> dict[str, nn.Module]:
    """The networks of a small XL, from those of an ordinary model; `config` is `xl_config`'s.

    The VAE is the same, apart from the scale of its latents, which is XL's.
    """
    torch.manual_seed(seed)
    encoder, padding = model.text_encoder, model.config.text_encoder.pad_token
    towers = [tower_from(encoder, each, padding) for each in (config.text_encoder, config.text_encoder_2)]
    row = torch.full((1, config.text_encoder.context_length), padding, dtype=torch.int64, device="cpu")
    scale = (towers[0](row).std() / encoder(row).std().cpu()).item()
    vae = copy.deepcopy(model.vae)
    each_channel = vae.post_quant_conv.bias.detach()
    factor = model.config.vae.latent_scale / config.vae.latent_scale
    rescale_latents(vae, torch.zeros_like(each_channel), torch.full_like(each_channel, factor))
    networks = {"unet": unet_from(model.unet, config, scale), "vae": vae}
    networks |= {"text_encoder": towers[0], "text_encoder_2": towers[1]}
    return {name: network.to(each_channel.device) for name, network in networks.items()}
