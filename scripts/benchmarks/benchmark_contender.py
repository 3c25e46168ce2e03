"""The units of work that every contender of `benchmark.py` can do.

All do the same with the same weights: guided DDIM steps from the same noise, that of seed SEED + i for picture i. Each
imports only its own libraries, and only when asked to.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

PROMPT = "a photograph of an astronaut riding a horse"
SEED = 1
GUIDANCE_SCALE = 7.5
ENDLESS = 500  # steps of the run whose steps are measured one by one; after the last, it begins again
COMPARED_STEPS = 2
UNITS = ("imports", "load", "prepare", "encode_text", "steps", "decode", "pictures", "whole", "latents", "versions")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every contender gets when it starts."""

    checkpoint: str  # an original file
    folder: str  # the same in the diffusers layout
    openvino: str  # a folder with the same networks for OpenVINO
    device: str  # "cpu", "cuda" or "mps"
    precision: str  # "fp32", "fp16" or "bf16"
    threads: int | None  # of the CPU; None: the library's choice
    compile_mode: str  # of torch.compile on CUDA, for `diffusers-compiled`
    logs: str | None = None  # a folder for the contenders' standard error; None: it is not kept


class Contender(ABC):
    """The units of work. `steps`, `decode`, `pictures` and `latents` work on what `prepare` set up."""

    own_precision: str | None = None  # overrides the requested precision

    def __init__(self, options: Options):
        self.options = options
        self.precision = self.own_precision or options.precision

    def imports(self) -> None:
        import torch

        self.torch = torch
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        self.dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]

    @abstractmethod
    def load(self) -> None:
        """From files to ready networks."""

    @abstractmethod
    def prepare(self, width: int, height: int, batch_size: int) -> None:
        """Read the prompt and draw the noise for pictures of that size."""

    @abstractmethod
    def encode_text(self):
        """The context of the prompt and of the empty one."""

    @abstractmethod
    def step(self) -> None:
        """One guided step of a batch: the UNet sees each picture twice."""

    def steps(self, count: int) -> None:
        """This many steps. A GPU may be given all of them before it has finished the first."""
        for _ in range(count):
            self.step()

    @abstractmethod
    def decode(self) -> None:
        """From latents to pictures."""

    @abstractmethod
    def pictures(self, steps: int) -> None:
        """From a prompt to pictures."""

    def whole(self, width: int, height: int, steps: int) -> None:
        """In a new process: from nothing to a picture, like a user's program."""
        self.imports()
        self.load()
        self.prepare(width, height, 1)
        self.pictures(steps)

    def latents(self, path: str) -> None:
        """The latents of the batch after COMPARED_STEPS steps, written into a .npy file."""
        import numpy

        numpy.save(path, self.denoised(COMPARED_STEPS).float().cpu().numpy())

    @abstractmethod
    def denoised(self, steps: int):
        """(B, 4, H/8, W/8) after a whole run of so many steps."""

    def versions(self) -> dict[str, object]:
        return {"torch": self.torch.__version__, "threads": self.torch.get_num_threads()}

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.options.device != "cpu" and hasattr(self, "torch"):
            getattr(self.torch, self.options.device.partition(":")[0]).synchronize()
