"""Independent implementations of the same networks, given the same weights, by diffusers' and transformers' own code.

The weights go in under their original names, so that the name tables are checked too.
"""

import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from convert.actions.diffusers_writer import vocabulary
from convert.layouts.names import OPTIONAL, PREFIXES, original_names
from sd.config import ModelConfig, TextEncoderConfig


def original_state(config: ModelConfig, networks: dict) -> dict[str, torch.Tensor]:
    """The parameters of our networks as an original file names and shapes them; nothing is copied."""
    names = original_names(config)
    state = {}
    for component, network in networks.items():
        for name, parameter in network.state_dict().items():
            original = names[f"{component}.{name}"]
            state[original.name] = parameter.reshape(parameter.shape + (1,) * original.unit_axes)
    return state


def diffusers_unet(config: ModelConfig, networks: dict) -> UNet2DConditionModel:
    model = empty_unet(config)
    state = convert_ldm_unet_checkpoint(original_state(config, {"unet": networks["unet"]}), dict(model.config))
    if config.unet.guidance_width:  # which that function leaves out
        state["time_embedding.cond_proj.weight"] = networks["unet"].cond_proj.weight
    model.load_state_dict(state, assign=True)
    return model.eval()


def empty_unet(config: ModelConfig) -> UNet2DConditionModel:
    """Without memory for its weights."""
    unet = config.unet
    cross = ["CrossAttn{}Block2D" if depth else "{}Block2D" for depth in unet.depths]
    settings = {
        "sample_size": 64,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": [unet.width * multiplier for multiplier in unet.multipliers],
        "down_block_types": [kind.format("Down") for kind in cross],
        "up_block_types": [kind.format("Up") for kind in reversed(cross)],
        "layers_per_block": unet.residuals_per_level,
        "cross_attention_dim": unet.context_width,
        "attention_head_dim": list(unet.heads),  # diffusers' name for the number of heads
        "use_linear_projection": not config.family.startswith("sd-v1"),
        "norm_num_groups": unet.groups,
        # of a last level without attention: in the middle
        "transformer_layers_per_block": [*(max(depth, 1) for depth in unet.depths[:-1]), max(unet.middle_depth, 1)],
    }
    if unet.guidance_width:
        settings["time_cond_proj_dim"] = unet.guidance_width
    if unet.vector_width:
        settings |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        settings |= {"projection_class_embeddings_input_dim": unet.vector_width}
    with torch.device("meta"):
        return UNet2DConditionModel(**settings)


def diffusers_vae(config: ModelConfig, networks: dict) -> AutoencoderKL:
    model = empty_vae(config)
    state = convert_ldm_vae_checkpoint(original_state(config, {"vae": networks["vae"]}), dict(model.config))
    model.load_state_dict(state, assign=True)
    return model.eval()


def empty_vae(config: ModelConfig) -> AutoencoderKL:
    """Without memory for its weights."""
    vae = config.vae
    levels = len(vae.multipliers)
    with torch.device("meta"):
        return AutoencoderKL(
            block_out_channels=[vae.width * multiplier for multiplier in vae.multipliers],
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            layers_per_block=vae.residuals_per_level,
            latent_channels=vae.latent_channels,
            norm_num_groups=vae.groups,
            scaling_factor=vae.latent_scale,
        )


def empty_text_encoder(text: TextEncoderConfig) -> CLIPTextModel:
    settings = CLIPTextConfig(
        vocab_size=text.vocabulary,
        hidden_size=text.width,
        intermediate_size=text.hidden_width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        max_position_embeddings=text.context_length,
        hidden_act=text.activation,
        bos_token_id=49406,
        eos_token_id=49407,
        projection_dim=text.pooled_width or text.width,
    )
    return (CLIPTextModelWithProjection if text.pooled_width else CLIPTextModel)(settings)


def transformers_text_encoder(config: ModelConfig, networks: dict, component: str = "text_encoder") -> CLIPTextModel:
    model = empty_text_encoder(getattr(config, component))
    state = original_state(config, {component: networks[component]})
    prefix = (PREFIXES | OPTIONAL)[component]
    bare = {name.removeprefix(prefix): values for name, values in state.items()}
    wanted = model.state_dict()
    wrapped = {name: bare[name.removeprefix("text_model.")] for name in wanted if not name.endswith("position_ids")}
    assert len(wrapped) == len(bare)
    model.load_state_dict(wrapped, strict=False, assign=True)
    return model.eval()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def clip_tokenizer(text: TextEncoderConfig) -> CLIPTokenizer:
    texts, merges = vocabulary()
    return CLIPTokenizer(
        {text: number for number, text in enumerate(texts)},
        [tuple(pair.split()) for pair in merges],
        model_max_length=text.context_length,
        pad_token=texts[text.pad_token],
    )


def diffusers_xl_pipeline(config: ModelConfig, networks: dict, scheduler: object) -> StableDiffusionXLPipeline:
    """A base model as the library has it."""
    return StableDiffusionXLPipeline(
        vae=diffusers_vae(config, networks),
        text_encoder=transformers_text_encoder(config, networks),
        text_encoder_2=transformers_text_encoder(config, networks, "text_encoder_2"),
        tokenizer=clip_tokenizer(config.text_encoder),
        tokenizer_2=clip_tokenizer(config.text_encoder_2),
        unet=diffusers_unet(config, networks),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def diffusers_pipeline(config: ModelConfig, networks: dict) -> StableDiffusionPipeline:
    """The whole model as the library has it, with the settings of the released v1 folders."""
    return StableDiffusionPipeline(
        unet=diffusers_unet(config, networks),
        vae=diffusers_vae(config, networks),
        text_encoder=transformers_text_encoder(config, networks),
        tokenizer=clip_tokenizer(config.text_encoder),
        scheduler=PNDMScheduler(
            beta_start=config.schedule.beta_start,
            beta_end=config.schedule.beta_end,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
