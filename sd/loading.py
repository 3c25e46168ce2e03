"""From a checkpoint file to a model that runs.

The networks are built without memory, the file is mapped, and each parameter becomes either a view of the mapped bytes
or, where another precision or memory format is wanted, a copy made while the bytes pass by. There is never a second
copy of the whole.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from convert.checkpoint import Checkpoint, match_shapes, read_checkpoint
from convert.hashing import FileHash
from convert.reader import CheckpointFile, open_checkpoint, release_after_last
from convert.tensors import as_tensor, in_range, out_of_range
from sd.embedded import embedded_model
from sd.networks import build_networks, parameter_shapes
from sd.pipeline import Source, StableDiffusion
from sd.running.compiler_check import require_compiler
from sd.running.execution import Execution
from sd.running.packing import PackedConvolutions, can_pack, convolutions_of, pack
from sd.running.precise_norms import make_precise
from sd.runtime import RunOptions, memory_format, pick_device, pick_precision, precision_name
from sd.tokenizer import Tokenizer


def load(
    path: str | os.PathLike | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
    weights: str = "auto",
    low_memory: bool = False,
    tiled_vae: bool = False,
    compile: bool = False,
    on_tensor: Callable[[int], None] | None = None,
) -> StableDiffusion:
    """Load a checkpoint: an original `.ckpt` or `.safetensors`, one of ours, or a folder of the diffusers library.

    path       of the file; without one, the small model that comes with the package
    device     "auto", "cuda", "mps" or "cpu"
    precision  "auto" (see `sd.runtime.pick_precision`), "fp32", "fp16" or "bf16"
    weights    "model", "ema", or "auto": the model's own unless the file has only averaged ones
    low_memory, tiled_vae, compile
               see `sd.runtime.RunOptions`
    on_tensor  called after each tensor with its number of bytes in the file

    Nothing in the file is executed. Raises `convert.errors.CheckpointError`, a ValueError, which says what is wrong
    with the file, also if there is none; ValueError for another device, precision or weights, and where networks cannot
    be compiled here.

    In float32 on the CPU the model goes on reading from the mapped file: replace the file if you must, but don't
    overwrite it in place while the model is in use.
    """
    target = pick_device(device)
    pick_precision(target, precision)  # a wrong name is told before the file is opened
    path = embedded_model() if path is None else Path(path)
    with open_checkpoint(path) as file:
        options = RunOptions(low_memory=low_memory, tiled_vae=tiled_vae, compile=compile)
        checkpoint = read_checkpoint(file, weights=weights)
        dtype = pick_precision(target, precision, checkpoint.config.unet.width)
        return from_checkpoint(file, checkpoint, target, dtype, options, on_tensor)


def from_checkpoint(
    file: CheckpointFile,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    options: RunOptions,
    on_tensor: Callable[[int], None] | None = None,
) -> StableDiffusion:
    """The model in a file that was opened and looked at already. For arguments and errors see `load`."""
    if options.compile:
        require_compiler(device)  # before anything is read
    networks = build_networks(checkpoint.config)
    checkpoint = match_shapes(checkpoint, parameter_shapes(networks))
    home = torch.device("cpu") if options.low_memory else device
    unet = networks["unet"]
    packing = can_pack(home, dtype) and not options.low_memory
    to_pack = {f"unet.{name}": conv for name, conv in convolutions_of(unet).items()} if packing else {}
    parameters, packed = read_parameters(file, checkpoint, home, dtype, to_pack, on_tensor, lean=not options.compile)
    for component, network in networks.items():
        network.load_state_dict(part(parameters, component), assign=True)
        if home.type == "cpu":
            make_precise(network)
    path = Path(file.path)
    text_encoder = checkpoint.config.text_encoder
    return StableDiffusion(
        config=checkpoint.config,
        tokenizer=Tokenizer(context_length=text_encoder.context_length, pad_token=text_encoder.pad_token),
        **networks,
        source=Source(
            name=path.resolve().name if path.is_dir() else path.stem, weights=checkpoint.weights, sha256=FileHash(path)
        ),
        execution=Execution(
            options, None if home == device else device, PackedConvolutions(unet, part(packed, "unet"))
        ),
    )


@contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which PyTorch starts none of its own: together these would be the square of what there is room for."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # the number for this thread, and for those that start later


def part(tensors: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    """The tensors of one network, by their names in it."""
    prefix = f"{component}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_parameters(
    file: CheckpointFile,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    to_pack: Mapping[str, nn.Conv2d] | None = None,
    on_tensor: Callable[[int], None] | None = None,
    *,
    lean: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every tensor by our name, checked (checksum, NaN, infinity), in the precision and memory format it is used in.

    to_pack  weights that are also packed, see `sd.running.packing`, and the convolutions that they are for
    lean     of packed weights that are in another precision than in the file, where plain ones would take memory of
             their own, there are none: they are on the meta device
    returns  the tensors, and the packed ones, both by our name

    Raises CorruptFileError for a wrong checksum, WeightMismatchError for values that are not finite in that precision.
    """
    records = checkpoint.tensors
    release = release_after_last(file, records.values())
    to_pack = to_pack or {}
    parameters, packed, unusable = {}, {}, []

    def read(name: str) -> tuple[Tensor, bool]:
        record = records[name]
        file.verify(record)
        stored = as_tensor(file, record)
        fits = in_range(stored, dtype)
        layout = memory_format(stored, packed=name in to_pack)
        used = stored.to(device=device, dtype=dtype, memory_format=layout).contiguous(memory_format=layout)
        if name in to_pack:
            packed[name] = pack(to_pack[name], used)
        copied = used.data_ptr() != stored.data_ptr()
        if copied or name in to_pack:  # what was packed is not read again
            release(record)
        return used.to("meta") if lean and copied and name in to_pack else used, fits

    # Large ones first: what is held beside the finished tensors is then smallest when most of them are finished.
    order = sorted(records, key=lambda name: -records[name].nbytes)
    # The work is memory traffic and checksums, both outside the interpreter's lock.
    with one_thread_each(min(8, os.cpu_count() or 1)) as pool:
        for name, (used, fits) in zip(order, pool.map(read, order), strict=True):
            parameters[name] = used
            if not fits:
                unusable.append(checkpoint.stored_names[name])
            if on_tensor:
                on_tensor(records[name].nbytes)
    if unusable:
        raise out_of_range(sorted(unusable), precision_name(dtype))
    return parameters, packed
