"""The machine and the programs that something was measured with, for whoever reads the numbers."""

import platform

import torch

from sd import __version__
from sd.study.benchmark.process import cpu_name


def machine(device: torch.device) -> dict[str, object]:
    """What times depend on beside the model, as plain data."""
    on_cuda = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sd_zoo": __version__,
    }
