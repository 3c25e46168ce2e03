"""Device, precision and memory format, all chosen outside the networks."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from sd.pipeline.errors import SettingError
from sd.pipeline.runner import PRECISIONS


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options that trade time for memory, or start-up for speed. The picture stays the same up to rounding.

    Raises SettingError for `compile` with `low_memory`, as compiling takes memory itself, and with `int8`.
    """

    low_memory: bool = False  # one network on the device at a time, one half of guidance at a time, nothing packed
    tiled_vae: bool = False  # pictures larger than a tile go through the VAE tile by tile
    compile: bool = False  # the UNet is compiled, once for each size: `sd.runtime.gpu.compile`
    int8: bool = False  # most of the UNet's products are of 8-bit numbers: `sd.runtime.cpu.int8`

    def __post_init__(self):
        if self.compile and self.low_memory:
            raise SettingError(
                "compile", "does not go with low memory: compiling takes memory. Leave one of the two out."
            )
        if self.compile and self.int8:
            raise SettingError("compile", "does not go with int8, whose code is compiled already. Leave one out.")

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cls)]


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is the first available of CUDA, Apple's MPS and the CPU. Raises ValueError for an unavailable one."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    kind, _, index = name.partition(":")
    count = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": 1}
    if not available.get(kind) or (index and not (index.isdecimal() and int(index) < count[kind])):
        there = ", ".join(["auto", *(kind for kind in available if available[kind])])
        raise ValueError(f"device {name!r} is not available here. There are: {there}.")
    return torch.device(name)


def has_fast_bf16() -> bool:
    """Whether this CPU has instructions for bf16; others convert to float32 and back, which is slower."""
    return any(getattr(torch.cpu, test, bool)() for test in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))


INT8 = "int8"  # a precision
WIDE = 256  # channels of a UNet
LARGE = 128 * 128  # positions in latents of a large picture: 1024x1024 pixels
LATENTS = 1024  # positions, 256x256 pixels: smaller pictures gain little from C++ kernels


def pick_precision(device: torch.device, name: str = "auto", width: int = WIDE) -> torch.dtype:
    """The dtype for the networks. "auto" is the fastest on the device that gives the same picture.

    For "int8" it is that of all between the products in 8 bits, bf16; `RunOptions` has `int8` itself.

    width  channels of the model's UNet. A narrow one, such as the embedded model's, is no faster in bf16 on a CPU, and
           several pictures at a time are slower (see `one_by_one`)

    Raises ValueError for a name that does not exist.
    """
    if name == INT8:
        return torch.bfloat16
    if name in PRECISIONS:
        return PRECISIONS[name]
    if name != "auto":
        raise ValueError(f"precision must be auto, {', '.join([*PRECISIONS, INT8])}, got {name!r}")
    if device.type == "cpu":
        return torch.bfloat16 if width >= WIDE and has_fast_bf16() else torch.float32
    # as fast as bf16 on GPUs, and 8 times as precise; a network that overflows is run again in fp32
    return torch.float16


def one_by_one(tensor: torch.Tensor) -> bool:
    """Whether networks with weights like this tensor get one picture, or one text, at a time.

    The number of rows decides how work is divided, and so how sums are rounded. In float32 that is invisible; in the 8
    bits of bf16, pictures of the embedded model differed by up to 38 of 255 alone and in a batch of four. A CPU is busy
    with one picture anyway, so there they are computed one by one and do not depend on the rest of the batch.
    """
    return tensor.device.type == "cpu" and tensor.dtype != torch.float32


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy values from the CPU to that device; on CUDA, without waiting for work queued before."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def is_set(flag: torch.Tensor) -> Callable[[], bool]:
    """A function that returns whether a flag () is set. On CUDA it waits only for work queued before this call."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    known = flag.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(flag.device))

    def answer() -> bool:
        copied.synchronize()
        return bool(known)

    return answer
