"""Write a model as the diffusers library saves one: a folder that `StableDiffusionPipeline.from_pretrained` loads.

What is in such a folder: `convert.files.diffusers_folder`. The safety checker is left out: it is another model, and we
have none.
"""

import json
from pathlib import Path

from convert.families.diffusers_config import (
    PREDICTIONS,
    TEXT_FIXED,
    UNET_FIXED,
    text_settings,
    unet_settings,
    vae_settings,
    vector_settings,
)
from convert.families.diffusers_levels import latent_settings, sigma_settings
from convert.families.table import family_named
from convert.files.diffusers_folder import CLASSES, DEPTH_CLASS, SECOND_CLASS
from convert.files.folder_kinds import INDEX
from convert.layouts.names import DEPTH_ESTIMATOR, SECOND_TEXT, folder_of, generation, text_places
from sd.config import ModelConfig, TextEncoderConfig
from sd.files import written_whole

DIFFUSERS_VERSION = "0.21.0"  # the oldest that knows everything said here
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    SECOND_TEXT[0]: f"{SECOND_TEXT[0]}/model.safetensors",  # of few models
    DEPTH_ESTIMATOR: f"{DEPTH_ESTIMATOR}/model.safetensors",
}
EULER = {"interpolation_type": "linear", "use_karras_sigmas": False}  # Karras et al. (2022), algorithm 2 without noise
CONSISTENCY = {"original_inference_steps": 50, "timestep_scaling": 10.0, "set_alpha_to_one": True}  # Luo et al. (2023)
PLMS = {"skip_prk_steps": True, "timestep_spacing": "leading"}  # Liu et al. (2022), without its Runge-Kutta steps
ENDING_IN_NOISE = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}  # Lin et al. (2023)
NONE = [None, None]
END_OF_WORD, END = "</w>", 49407


def folder_settings(config: ModelConfig, *, ends_in_noise: bool = False) -> dict[str, dict]:
    """Everything in a folder that is JSON, by its path, the tokenizer's vocabulary excepted.

    ends_in_noise  trained with zero terminal SNR, which DDIMScheduler supports
    """
    usual = "EulerDiscreteScheduler" if config.unet.vector_width else "PNDMScheduler"
    usual = "LCMScheduler" if config.unet.guidance_width else usual
    scheduler = "EDMEulerScheduler" if config.schedule.sigma_max else "DDIMScheduler" if ends_in_noise else usual
    latent_side = config.native_size // config.vae.factor
    heads = set(config.unet.heads)
    version = {"_diffusers_version": DIFFUSERS_VERSION}
    others, beside = _beside(config)
    texts, of_texts = _texts(config)
    return {
        INDEX: {
            "_class_name": family_named(config.family).pipeline.removesuffix("Pipeline") + "Pipeline",
            **version,
            **others,
            "scheduler": ["diffusers", scheduler],
            **texts,
            "unet": ["diffusers", CLASSES["unet"]],
            "vae": ["diffusers", CLASSES["vae"]],
        },
        "unet/config.json": {
            "_class_name": CLASSES["unet"],
            **version,
            **UNET_FIXED,
            "use_linear_projection": generation(config).linear,
            **vector_settings(config.unet),
            **unet_settings(config.unet),
            "attention_head_dim": config.unet.heads[0] if len(heads) == 1 else list(config.unet.heads),
            "sample_size": latent_side,
        },
        "vae/config.json": {
            "_class_name": CLASSES["vae"],
            **version,
            "act_fn": "silu",
            **vae_settings(config.vae),
            "sample_size": config.native_size,
            **latent_settings(config),
        },
        "scheduler/scheduler_config.json": {"_class_name": scheduler, **version, **sigma_settings(config)}
        if config.schedule.sigma_max
        else {
            "_class_name": scheduler,
            **version,
            "num_train_timesteps": config.schedule.timesteps,
            "beta_start": config.schedule.beta_start,
            "beta_end": config.schedule.beta_end,
            "beta_schedule": "scaled_linear",
            "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[config.prediction],
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "clip_sample": False,
            "trained_betas": None,
            **(EULER if scheduler.startswith("Euler") else {}),
            **(ENDING_IN_NOISE if ends_in_noise else CONSISTENCY if scheduler.startswith("LCM") else PLMS),
        },
        **of_texts,
        **beside,
    }


def _texts(config: ModelConfig) -> tuple[dict[str, object], dict[str, dict]]:
    """What the index lists of text encoders and tokenizers, and their settings."""
    listed, settings = {}, {}
    if generation(config).of_generative_models:
        listed = {"text_encoder": NONE, "tokenizer": NONE}
    for part, place in text_places(config).items():
        text, tokenizer = getattr(config, part), place.folder.replace("text_encoder", "tokenizer")
        kind = SECOND_CLASS if text.pooled_width else CLASSES["text_encoder"]
        listed |= {place.folder: ["transformers", kind], tokenizer: ["transformers", "CLIPTokenizer"]}
        settings[f"{place.folder}/config.json"] = {
            "architectures": [kind],
            "model_type": "clip_text_model",
            "attention_dropout": 0.0,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 1,
            "hidden_act": text.activation,
            "num_attention_heads": text.heads,
            "projection_dim": text.pooled_width or text.width,
            **TEXT_FIXED,
            **text_settings(text),
        }
        special = _special_tokens(text)
        settings[f"{tokenizer}/tokenizer_config.json"] = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": text.context_length,
            **special,
            "errors": "replace",
            "add_prefix_space": False,
            "do_lower_case": True,
        }
        settings[f"{tokenizer}/special_tokens_map.json"] = special
    return listed, settings


def _beside(config: ModelConfig) -> tuple[dict[str, object], dict[str, dict]]:
    """What the index lists of components that most models do not have, and their settings."""
    if config.unet.vector_width:
        listed = {"feature_extractor": NONE, "image_encoder": NONE}
        if config.text_encoder_2:
            return {**listed, "force_zeros_for_empty_prompt": True}, {}
        return {**listed, "force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}, {}
    if config.depth is None:
        nothing = {"feature_extractor": NONE, "image_encoder": NONE, "safety_checker": NONE}
        return {**nothing, "requires_safety_checker": False}, {}
    from convert.families.depth_sizes import depth_settings

    side = config.depth.native_size
    preparing = {
        "image_processor_type": "DPTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "keep_aspect_ratio": False,  # the library's network takes squares only
        "ensure_multiple_of": 1,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    listed = {
        DEPTH_ESTIMATOR: ["transformers", DEPTH_CLASS],
        "feature_extractor": ["transformers", preparing["image_processor_type"]],
    }
    network = {"architectures": [DEPTH_CLASS], "model_type": "dpt", **depth_settings(config.depth)}
    return listed, {
        f"{DEPTH_ESTIMATOR}/config.json": network,
        "feature_extractor/preprocessor_config.json": preparing,
    }


def write_settings(folder: Path, config: ModelConfig, part: str | None = None, *, ends_in_noise: bool = False) -> str:
    """Write everything but the weights and the card; of one part alone if `part` says so.

    Returns the name of the class that loads the folder.
    """
    everything = folder_settings(config, ends_in_noise=ends_in_noise)
    if part:
        settings = everything[f"{folder_of(config, part)}/config.json"]
        write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
        return settings["architectures"][0] if "architectures" in settings else settings["_class_name"]
    for name, settings in everything.items():
        write_text(folder / name, json.dumps(settings, indent=2) + "\n")
    texts, merges = vocabulary()
    for name in everything:
        if name.endswith("/special_tokens_map.json"):
            tokenizer = (folder / name).parent
            write_text(tokenizer / "vocab.json", json.dumps({text: number for number, text in enumerate(texts)}))
            write_text(tokenizer / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    return everything[INDEX]["_class_name"]


def vocabulary() -> tuple[list[str], list[str]]:
    """CLIP's tables as its authors wrote them: the text of every id, and the pairs that are joined, in order.

    Bytes are written as one letter each: the printable ones of Latin-1 as themselves, the rest as letters from U+0100.
    """
    from sd.text.tokenizer import BYTE_ORDER, PRINTABLE, SPECIAL, read_merges

    letters = [
        chr(byte) if rank < len(PRINTABLE) else chr(256 + rank - len(PRINTABLE)) for rank, byte in enumerate(BYTE_ORDER)
    ]
    texts = letters + [letter + END_OF_WORD for letter in letters]
    merges = []
    for left, right in read_merges().tolist():
        merges.append(f"{texts[left]} {texts[right]}")
        texts.append(texts[left] + texts[right])
    return texts + list(SPECIAL), merges


def _special_tokens(text: TextEncoderConfig) -> dict[str, str]:
    end = "<|endoftext|>"
    padding = end if text.pad_token == END else vocabulary()[0][text.pad_token]
    return {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": padding}


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with written_whole(path) as out:
        out.write(text.encode())
