"""The hardware and software that something was measured on, for the reader of the numbers."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING

from sd import __version__

if TYPE_CHECKING:
    import torch

CPU_INFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The processor's name, as its maker gives it."""
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model", "Hardware"):
                return value.strip()
    return platform.processor() or platform.machine() or "unknown processor"


def hardware(device: "torch.device") -> dict[str, object]:
    """What times depend on besides the model, as plain data."""
    import torch

    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sd_zoo": __version__,
    }
