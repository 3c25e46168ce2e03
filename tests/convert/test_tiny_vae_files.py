"""Files of tiny VAEs in every spelling, and files that are none or are damaged."""

import json
import re

import pytest
import torch
from oracles import relative_error
from safetensors.torch import save_file
from tiny_vaes import FOLDERS, SPELLINGS, both, original, prefixed, theirs, written

from convert.actions.inspect import inspect
from convert.errors import CheckpointError
from convert.files.reader import open_checkpoint
from convert.tiny_vae import read_tiny_vae, require_decoder
from sd.config import SD_V1, SDXL
from sd.runtime.tiny_vae import build_tiny_vae
from sd.runtime.weights import read_parameters

CPU = torch.device("cpu")


def look(path):
    with open_checkpoint(path) as file:
        return read_tiny_vae(file)


@pytest.mark.parametrize("spelling", [*SPELLINGS, *FOLDERS])
def test_every_spelling_gives_the_same_network(tmp_path, spelling):
    path = written(tmp_path, spelling)
    with open_checkpoint(path) as file:
        found = require_decoder(read_tiny_vae(file), SDXL)
        network = build_tiny_vae(found)
        network.load_state_dict(read_parameters(file, found, CPU, torch.float32)[0], assign=True)
    assert found.config.latent_scale == SDXL.vae.latent_scale
    assert found.layout == ("diffusers" if spelling.startswith(("folder", "diffusion")) else "original")
    latents = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    assert relative_error(network.decode(latents), theirs().decode(latents).sample) < 1e-5
    assert found.halves == (("decoder",) if network.encoder is None else ("decoder", "encoder"))
    if network.encoder:
        image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(4))
        assert relative_error(network.encode(image), theirs().encode(image).latents) < 1e-5


def sixteen():
    return original("decoder") | {"1.weight": torch.zeros(64, 16, 3, 3)}


REFUSED = {  # what is said -> the tensors of the file
    "is a tiny VAE for latents of 16 channels, as FLUX and Stable Diffusion 3 have them": sixteen,
    "lacks 2 of the 67 weights: 19.weight, 19.bias": lambda: {
        name: value for name, value in original("decoder").items() if not name.startswith("19.")
    },
    "holds 1 weight that a tiny VAE has no place for: 20.weight": lambda: (
        original("decoder") | {"20.weight": torch.zeros(3, 3, 3, 3)}
    ),
    "holds 1 weight that does not fit a tiny VAE of its size: 3.conv.2.weight has the shape [64, 32, 3, 3]": lambda: (
        original("decoder") | {"3.conv.2.weight": torch.zeros(64, 32, 3, 3)}
    ),
    "holds 1 weight that does not fit a tiny VAE of its size: 1.bias holds int64 numbers": lambda: (
        original("decoder") | {"1.bias": torch.zeros(64, dtype=torch.int64)}
    ),
    "lacks the convolution 1.weight, which tells the size of a tiny VAE": lambda: (
        original("decoder") | {"1.weight": torch.zeros(64)}
    ),
    "lacks the convolution taesd_encoder.14.weight, which": lambda: {
        name: value[:0, :0] if value.dim() == 4 else value[:0]
        for name, value in prefixed("taesd_encoder.", original("encoder")).items()
    },
    "holds an encoder and a decoder of different sizes": lambda: (
        both("taesd_encoder.", "taesd_decoder.") | {"taesd_decoder.1.weight": torch.zeros(32, 4, 3, 3)}
    ),
    "is not a tiny VAE such as TAESD. Give taesd_decoder": lambda: {"a.weight": torch.zeros(2, 2)},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_no_tiny_vae_of_this_kind_is_refused_in_a_sentence(tmp_path, said):
    save_file(REFUSED[said](), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=rf"^x.safetensors {re.escape(said)}.*\.$"):
        look(tmp_path / "x.safetensors")


def test_a_whole_vae_is_sent_to_its_own_flag(tmp_path, tiny_state):
    vae = {name: value for name, value in tiny_state.items() if name.startswith("first_stage_model.")}
    save_file(vae, tmp_path / "vae.safetensors")
    with pytest.raises(
        CheckpointError, match=r"is not a tiny VAE such as TAESD \(it holds: VAE alone\). Give it with --vae"
    ):
        look(tmp_path / "vae.safetensors")


def test_an_encoder_alone_decodes_nothing(tmp_path):
    save_file(original("encoder"), tmp_path / "taesd_encoder.safetensors")
    found = look(tmp_path / "taesd_encoder.safetensors")
    assert found.halves == ("encoder",)
    with pytest.raises(CheckpointError, match=r"only the encoder of a tiny VAE.* Give taesd_decoder, or taesdxl_dec"):
        require_decoder(found, SD_V1)


@pytest.mark.parametrize("name", ["taesd_decoder.safetensors", "taesd_decoder.pth", "folder"])
@pytest.mark.parametrize("left", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, name, left):
    path = written(tmp_path, name)
    file = path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(CheckpointError, match=r"download|Download"):
        look(path)


@pytest.mark.parametrize(("name", "value"), [("act_fn", "gelu"), ("scaling_factor", 0.5), ("upsample_fn", [])])
def test_settings_that_mean_another_network_are_refused(tmp_path, name, value):
    folder = written(tmp_path, "folder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(CheckpointError, match=f"is a tiny VAE whose {name} is .*; only .* is supported"):
        look(folder)


USES = {  # spelling -> halves
    **dict.fromkeys(["taesd_decoder.safetensors", "taesd_decoder.pth", "wrapped.pt"], ("decoder",)),
    **dict.fromkeys(["comfy.safetensors", "whole.pth", "folder"], ("decoder", "encoder")),
}


@pytest.mark.parametrize("spelling", USES)
def test_inspect_says_what_it_is_and_how_to_use_it(tmp_path, spelling):
    report = inspect(written(tmp_path, spelling))
    assert (report.kind, report.tiny_vae, report.safe) == ("TAESD, a tiny VAE", USES[spelling], True)
    assert "is a TAESD, a tiny VAE: " in report.problem
    assert "give it with --tiny-vae FILE, and the checkpoint with -m FILE." in report.problem


def test_an_incomplete_one_is_described_without_a_use(tmp_path):
    state = original("decoder")
    del state["19.bias"]
    save_file(prefixed("taesd_decoder.", state), tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert (report.kind, report.tiny_vae) == ("TAESD, a tiny VAE", ())
    assert "lacks 1 of the 67 weights: taesd_decoder.19.bias" in report.problem
