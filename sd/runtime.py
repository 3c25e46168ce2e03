"""How the networks are run: device, precision, memory format. The networks themselves know nothing of this."""

import torch

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is the first of CUDA, Apple's MPS and the CPU that is there. Raises ValueError for one that is not."""
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
    """Whether this CPU multiplies bf16 numbers itself; others convert to float32 and back, which is slower."""
    return any(getattr(torch.cpu, test, bool)() for test in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))


def pick_precision(device: torch.device, name: str = "auto") -> torch.dtype:
    """The dtype for the networks. "auto" is the fastest on the device that keeps the picture.

    Raises ValueError for a name that does not exist.
    """
    if name in PRECISIONS:
        return PRECISIONS[name]
    if name != "auto":
        raise ValueError(f"precision must be auto, {', '.join(PRECISIONS)}, got {name!r}")
    if device.type == "cpu":
        return torch.bfloat16 if has_fast_bf16() else torch.float32
    return (
        torch.float16
    )  # as fast as bf16 on GPUs, and 8 times as precise; where it overflows, the pipeline goes higher


def memory_format(tensor: torch.Tensor) -> torch.memory_format:
    """How a weight should lie in memory: convolutions run fastest where the channels of a position lie side by side."""
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format


def precision_name(dtype: torch.dtype) -> str:
    return next(name for name, known in PRECISIONS.items() if known == dtype)
