"""Give a model a tiny VAE, which then decodes in place of its own."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from convert.files.hashing import FileHash
from convert.files.reader import open_checkpoint
from convert.layouts.tiny_vae_names import tiny_vae_parameters
from convert.tiny_vae import TinyVAEFile, read_tiny_vae, require_decoder
from sd.files import written_whole
from sd.networks.build import SkipInitialisation
from sd.networks.tiny_vae import TinyVAE
from sd.pipeline.stable_diffusion import StableDiffusion, VAESource
from sd.runtime.weights import read_parameters


def build_tiny_vae(found: TinyVAEFile) -> TinyVAE:
    """The halves that a file has, on the meta device."""
    with torch.device("meta"), SkipInitialisation():
        network = TinyVAE(found.config)
    for half in {"encoder", "decoder"} - {*found.halves}:
        setattr(network, half, None)
    return network.requires_grad_(False).eval()


def load_tiny_vae(path: str | os.PathLike, model: StableDiffusion, dtype: torch.dtype) -> None:
    """Read a tiny VAE in this precision, and have the model decode with it: `model.tiny_vae`.

    Raises CheckpointError for what is no tiny VAE with a decoder, or is damaged.
    """
    home = next(model.vae.parameters()).device
    with open_checkpoint(path) as file:
        found = require_decoder(read_tiny_vae(file), model.config)
        network = build_tiny_vae(found)
        parameters, _ = read_parameters(file, found, home, dtype)
    network.load_state_dict(parameters, assign=True)
    model.tiny_vae = network
    path = Path(path)
    model.source = replace(model.source, tiny_vae=VAESource(name=path.name, sha256=FileHash(path)))


def save_tiny_vae(path: Path, network: TinyVAE, metadata: Mapping[str, str] | None = None) -> None:
    """Write both halves in float16, with the names of diffusers' AutoencoderTiny; replaces an older file."""
    state = {
        f"{half}.layers.{row.diffusers}": getattr(network, half).get_parameter(row.ours).detach()
        for half in ("encoder", "decoder")
        for row in tiny_vae_parameters(network.config, half)
    }
    with written_whole(path, force=True) as file:
        save_file(
            {
                name: value.to("cpu", torch.float16, memory_format=torch.contiguous_format)
                for name, value in state.items()
            },
            file.name,
            {"format": "pt", **(metadata or {})},
        )
