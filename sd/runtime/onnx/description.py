"""What lies beside exported networks: the settings that a program needs to use them, and the tokenizer's table."""

import json
from collections.abc import Mapping

from convert.actions.diffusers_writer import END_OF_WORD, vocabulary
from convert.checkpoint import Checkpoint
from convert.families.few_steps import usual_settings
from sd.config import USUAL_GUIDANCE, ModelConfig
from sd.pipeline.vector import NUMBER_WIDTH
from sd.sampling.schedule import alphas_cumprod, zero_terminal_snr
from sd.text.tokenizer import END, SPECIAL, START

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
FORMAT, FORMAT_VERSION = "sd-zoo-onnx", 1
READS = {  # number of channels that a UNet reads after the noisy latents -> what they are
    0: [],
    1: ["depth"],
    4: ["image_latents"],
    5: ["mask", "masked_image_latents"],
}
NUMBERS = {  # encoded in the vector behind the pooled prompt -> what they are
    6: ["original_height", "original_width", "crop_top", "crop_left", "height", "width"],
    5: ["original_height", "original_width", "crop_top", "crop_left", "aesthetic_score"],
}


def description(
    checkpoint: Checkpoint, networks: Mapping[str, dict[str, object]], *, name: str, precision: str, clip_skip: int
) -> dict[str, object]:
    """The settings, as data for JSON; docs/export.md explains each.

    networks  of each exported file what it is called, and its inputs and outputs
    name      of the model's file
    """
    config = checkpoint.config
    table = alphas_cumprod(config.schedule)
    from_noise = checkpoint.said.begins_at_noise
    table = zero_terminal_snr(table) if from_noise else table
    means = {"latent_means": config.vae.latent_means, "latent_deviations": config.vae.latent_deviations}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": name,
        "weights": checkpoint.weights,
        "precision": precision,
        "family": config.family,
        "prediction": config.prediction,
        "native_size": config.native_size,
        "pixels_per_latent": config.vae.factor,
        "latent_channels": config.vae.latent_channels,
        "latent_scale": config.vae.latent_scale,
        **(means if config.vae.latent_means else {}),
        "guidance_scale": usual_settings(config).get("guidance_scale", USUAL_GUIDANCE),
        "unet_reads": ["latents", *READS[config.unet.in_channels - config.vae.latent_channels]],
        "text": _text(config, clip_skip),
        **({"vector": _vector(config)} if config.unet.vector_width else {}),
        **({"guidance_width": config.unet.guidance_width} if config.unet.guidance_width else {}),
        "networks": dict(networks),
        "zero_terminal_snr": from_noise,
        "alphas_cumprod": [float(str(value)) for value in table.numpy()],  # as few digits as float32 needs
    }


def _text(config: ModelConfig, clip_skip: int) -> dict[str, object]:
    encoders = {name: encoder for name in ("text_encoder", "text_encoder_2") if (encoder := getattr(config, name))}
    return {
        "length": config.text_encoder.context_length,
        "start_token": START,
        "end_token": END,
        "pad_tokens": {name: encoder.pad_token for name, encoder in encoders.items()},
        "clip_skip": clip_skip,
    }


def _vector(config: ModelConfig) -> dict[str, object]:
    """What the UNet gets beside the context: the pooled prompt, then numbers, each encoded as a timestep is."""
    pooled = (config.text_encoder_2 or config.text_encoder).pooled_width
    count = (config.unet.vector_width - pooled) // NUMBER_WIDTH
    return {
        "pooled": "text_encoder_2" if config.text_encoder_2 else "text_encoder",
        "numbers": NUMBERS[count],
        "number_width": NUMBER_WIDTH,
        "zeros_without_negative_prompt": config.text_encoder_2 is not None,
    }


def as_json(about: Mapping[str, object]) -> str:
    """One setting a line, and no line for each of a thousand numbers."""
    lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in about.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def tokenizer(config: ModelConfig) -> dict[str, object]:
    """CLIP's tokenizer in the form of the tokenizers library, which its bindings and transformers.js read.

    Rows are padded as the first text encoder's are. It does not repair texts as `sd.text.tokenizer.clean` does: HTML
    entities and broken encodings stay as they are.
    """
    texts, merges = vocabulary()
    text = config.text_encoder
    added = [{"id": number, "content": word} for word, number in SPECIAL.items()]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True}
    start, end = ([word, SPECIAL[word]] for word in SPECIAL)
    letters = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": {
            "direction": "Right",
            "max_length": text.context_length,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": {
            "strategy": {"Fixed": text.context_length},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": text.pad_token,
            "pad_type_id": 0,
            "pad_token": texts[text.pad_token],
        },
        "added_tokens": [each | flags for each in added],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": letters}, "behavior": "Removed", "invert": True},
                byte_level,
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": end,
            "cls": start,
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": end[0],
            "continuing_subword_prefix": "",
            "end_of_word_suffix": END_OF_WORD,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {piece: number for number, piece in enumerate(texts)},
            "merges": merges,
        },
    }
