"""The units of work that every contender of `benchmark.py` can do.

All do the same with the same weights: guided DDIM steps from the same noise, that of seed SEED + i for picture i. Each
imports only its own libraries, and only when asked to.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

PROMPT = "a photograph of an astronaut riding a horse"
SEED = 1
COMPARED_STEPS = 2
UNITS = ("imports", "load", "prepare", "encode_text", "steps", "decode", "pictures", "whole", "versions")
UNITS += ("latents", "picture")  # these write a file
INT8 = "int8"  # a precision of its own: 8-bit weights and activations where a contender has them


@dataclass(frozen=True, kw_only=True)
class Way:
    """How pictures are made. Contenders of one way do the same work and are compared with each other."""

    sampler: str
    guidance_scale: float  # 1: without guidance, so one prediction per step
    endless: int  # steps of the run whose steps are measured one by one; after the last, it begins again
    reference: str  # the contender whose pictures in float32 the others are compared with
    label: str  # in the report, behind the size

    @property
    def texts(self) -> list[str]:
        """What is encoded for one picture."""
        return ["", PROMPT] if self.guidance_scale > 1 else [PROMPT]


GUIDED = Way(sampler="ddim", guidance_scale=7.5, endless=500, reference="sd-zoo", label="")
FEW = Way(sampler="lcm", guidance_scale=1, endless=50, reference="sd-zoo-few", label="LCM, no guidance")


class Seconds(float):
    """What a unit took by a contender's own clock, where it cannot do that unit alone."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every contender gets when it starts."""

    checkpoint: str  # an original file
    folder: str  # the same in the diffusers layout
    openvino: str  # a folder with the same networks for OpenVINO
    tiny_vae: str  # a file of a tiny VAE under the names of diffusers
    device: str  # "cpu", "cuda" or "mps"
    precision: str  # "fp32", "fp16" or "bf16"
    threads: int | None  # of the CPU; None: the library's choice
    compile_mode: str  # of torch.compile on CUDA, for `diffusers-compiled`
    file_precision: str = "fp32"  # of the weights in all of these
    logs: str | None = None  # a folder for the contenders' standard error; None: it is not kept


class Contender(ABC):
    """The units of work. `steps`, `decode`, `pictures` and `latents` work on what `prepare` set up."""

    own_precision: str | None = None  # overrides the requested precision
    way = GUIDED
    is_comparable = True  # whether it can be given noise and gives latents

    def __init__(self, options: Options):
        self.options = options
        self.precision = self.own_precision or options.precision

    @classmethod
    def files(cls, options: Options) -> list[str]:
        """The files and folders that it reads."""
        return [options.checkpoint]

    def imports(self) -> None:
        import torch

        self.torch = torch
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        self.dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(self.precision)

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
        """One step of a batch. With guidance, the UNet sees each picture twice."""

    def steps(self, count: int) -> Seconds | None:
        """This many steps. A GPU may be given all of them before it has finished the first."""
        for _ in range(count):
            self.step()

    @abstractmethod
    def decode(self) -> None:
        """From latents to pictures."""

    @abstractmethod
    def pictures(self, steps: int) -> list:
        """From a prompt to pictures, as PIL has them."""

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

    def picture(self, path: str, steps: int) -> None:
        """The pictures of `pictures`, uint8 (B, H, W, 3), written into a .npy file."""
        import numpy

        numpy.save(path, numpy.stack([numpy.asarray(each) for each in self.pictures(steps)]))

    @abstractmethod
    def denoised(self, steps: int):
        """(B, 4, H/8, W/8) after a whole run of so many steps."""

    def versions(self) -> dict[str, object]:
        return {"torch": self.torch.__version__, "threads": self.torch.get_num_threads()}

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.options.device != "cpu" and hasattr(self, "torch"):
            getattr(self.torch, self.options.device.partition(":")[0]).synchronize()
