"""From a checkpoint file to a model that runs.

The networks are built on the meta device, the file is mapped, and `sd.runtime.weights` reads each parameter. No weight
takes memory twice.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from convert.checkpoint import Checkpoint, match_shapes, read_checkpoint
from convert.files.hashing import FileHash
from convert.files.reader import CheckpointFile, open_checkpoint
from sd.files import embedded_model
from sd.networks.build import build_networks, parameter_shapes
from sd.pipeline.stable_diffusion import Source, StableDiffusion, VAESource
from sd.runtime.cpu.packing import can_pack, convolutions_of, make_packed, pack
from sd.runtime.cpu.precise_norms import make_precise
from sd.runtime.device import INT8, RunOptions, pick_device, pick_precision
from sd.runtime.execution import Execution
from sd.runtime.weights import Weights, precision_of, read_parameters
from sd.text.tokenizer import Tokenizer

# Parameters of text encoders, which run once for a picture. XL's have 820 million, read in a second.
LARGE = 500_000_000


def load(
    path: str | os.PathLike | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
    weights: str = "auto",
    prediction: str = "auto",
    variant: str | None = None,
    vae: str | os.PathLike | None = None,
    tiny_vae: str | os.PathLike | None = None,
    low_memory: bool = False,
    tiled_vae: bool = False,
    compile: bool = False,
    on_tensor: Callable[[int], None] | None = None,
) -> StableDiffusion:
    """Load a checkpoint: an original `.ckpt` or `.safetensors`, one of ours, or a folder of the diffusers library.

    path       of the file; without one, the small model that comes with the package
    device     "auto", "cuda", "mps" or "cpu"
    precision  "auto" (see `sd.runtime.device.pick_precision`), "fp32", "fp16", "bf16", or on CPUs with AVX512-BF16
               "int8": faster, in less memory and less exact, see `sd.runtime.cpu.int8`
    weights    "model", "ema", or "auto": the model's own unless the file has only averaged ones, or is for editing
    prediction what the UNet predicts: "eps", "v", "x0", or "auto", as the file, a .yaml beside it or its family says
    variant    of a folder's weights: "fp16", "non_ema", ...; without one, the plain ones or those that there are
    vae        a file or folder whose VAE is used instead of the model's own
    tiny_vae   a file or folder of a tiny VAE such as TAESD, which decodes in place of the VAE, faster and less exactly;
               pictures are still encoded by the VAE
    low_memory, tiled_vae, compile
               see `sd.runtime.device.RunOptions`
    on_tensor  called after each tensor with its number of bytes in the file

    Nothing in the file is executed. Raises `convert.errors.CheckpointError`, a ValueError, if the file is missing or
    damaged; ValueError for an unknown device, precision, weights or prediction, and if networks cannot be compiled
    here.

    The model keeps the file open, to take adapters off exactly, and on a CPU it keeps reading from it: while it is in
    use, you may replace the file but not overwrite it in place. On a CPU, the weights of the UNet's convolutions keep
    the file's precision. Large text encoders, and with low_memory all networks, rest in the file: what is written into
    their weights is lost.
    """
    target = pick_device(device)
    pick_precision(target, precision)  # refuse a wrong name before the file is opened
    path = embedded_model() if path is None else Path(path)
    with ExitStack() as stack:
        if vae is None:
            file = stack.enter_context(open_checkpoint(path, variant=variant))
            checkpoint = read_checkpoint(file, weights=weights, prediction=prediction)
        else:
            from convert.other_vae import opened_model

            file, checkpoint = stack.enter_context(opened_model(path, weights, prediction, variant, vae))
        options = RunOptions(low_memory=low_memory, tiled_vae=tiled_vae, compile=compile, int8=precision == INT8)
        dtype = pick_precision(target, precision, checkpoint.config.unet.width)
        model = from_checkpoint(file, checkpoint, target, dtype, options, on_tensor)
    if tiny_vae is not None:
        from sd.runtime.tiny_vae import load_tiny_vae

        load_tiny_vae(tiny_vae, model, dtype)
    if checkpoint.said.is_guess:
        from sd.runtime.trial import warnings_after_trial

        warnings_after_trial(model, checkpoint.said)
    return model


def from_checkpoint(
    file: CheckpointFile,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    options: RunOptions,
    on_tensor: Callable[[int], None] | None = None,
) -> StableDiffusion:
    """The model in an open file, whose checkpoint was read. For arguments and errors see `load`."""
    if options.compile:
        from sd.runtime.gpu.compile import require_compiler

        require_compiler(device)  # before anything is read
    if options.int8:
        from sd.runtime.cpu.int8 import make_int8, require_int8

        require_int8(device)
    survive_forks()
    networks = build_networks(checkpoint.config)
    checkpoint = match_shapes(checkpoint, parameter_shapes(networks))
    home = torch.device("cpu") if options.low_memory else device  # where weights rest
    resting = resting_in_file(networks, device, options)
    packs = can_pack(home, dtype) and not options.low_memory
    layers = make_int8(networks["unet"]) if options.int8 else {}
    in_8_bits = {f"unet.{name}.weight": layer for name, layer in layers.items()}
    convolutions = {f"unet.{name}.weight": conv for name, conv in convolutions_of(networks["unet"]).items()}
    packers = {name: partial(pack, conv, dtype=dtype) for name, conv in convolutions.items()}
    packers |= {name: layer.pack for name, layer in in_8_bits.items()}
    packers = packers if packs else {}
    for name, layer in in_8_bits.items():
        if layer.waits:
            packers.pop(name, None)
            resting.add(name)
    parameters, packed = read_parameters(file, checkpoint, home, dtype, on_tensor, packers, resting)
    for component, network in networks.items():
        prefix = f"{component}."
        mine = {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
        network.load_state_dict(mine, assign=True)
        if component in resting:
            network.rests_as, network.runs_in = component, precision_of(component, dtype)
        if home.type == "cpu":
            make_precise(network)
    for name in in_8_bits.keys() & packed.keys():
        in_8_bits[name].use(packed.pop(name))
    make_packed({convolutions[name]: weight for name, weight in packed.items()}, dtype)
    runner = Execution(options, None if home == device else device)
    runner.weights = Weights(file.kept(), checkpoint.tensors, dtype)
    path = Path(file.path)
    text_encoder = checkpoint.config.text_encoder
    said = checkpoint.said
    told = {"prediction": said.prediction} if said.outside else {}
    told |= {"noise": list(said.noise)} if said.noise else {}
    other = getattr(file, "second", None)
    return StableDiffusion(
        config=checkpoint.config,
        tokenizer=Tokenizer(context_length=text_encoder.context_length, pad_token=text_encoder.pad_token),
        **networks,
        source=Source(
            name=file.called if path.is_dir() else path.stem,
            weights=checkpoint.weights,
            sha256=FileHash(path),
            beside=told,
            vae=other and VAESource(name=Path(other.path).name, sha256=FileHash(other.path)),
        ),
        runner=runner,
        zero_terminal_snr=said.begins_at_noise,
        usual=usual_of(checkpoint),
    )


def resting_in_file(networks: dict[str, nn.Module], device: torch.device, options: RunOptions) -> set[str]:
    """The networks that are read again whenever they are used. On a CPU: large text encoders, or all."""
    if device.type != "cpu":
        return set()
    texts = {name for name in networks if name.startswith("text_encoder")}
    many = sum(each.numel() for name in texts for each in networks[name].parameters()) > LARGE
    return set(networks) if options.low_memory else texts if many else set()


def usual_of(checkpoint: Checkpoint) -> dict[str, object]:
    """The settings of pictures for which the file states that it is made."""
    if checkpoint.few_steps is None:
        return {}
    from convert.families.few_steps import usual_settings

    return usual_settings(checkpoint.config)


@cache  # once is enough
def survive_forks() -> None:
    """Have forked children of this process compute with one thread.

    OpenMP would wait there for threads that exist in the parent only, and hang.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
