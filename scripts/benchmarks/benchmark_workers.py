"""The process of one contender of `benchmark.py`: it does and times one unit of work per request.

Requests are lines of JSON on standard input, {"unit": "step"}; answers are lines on standard output, {"seconds": 0.5}
or {"error": "..."}. Output of libraries goes to standard error.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmark_contender import FEW, INT8, PROMPT, SEED, UNITS, Contender, Options, Seconds
from benchmark_diffusers import Diffusers, DiffusersCompiled, DiffusersPlain, DiffusersTuned
from benchmark_few import FastSD, FastSDInt8, export_tiny_vae
from benchmark_int8 import OpenVINOInt8, quantize_for_openvino
from benchmark_openvino import OpenVINO, export_to_openvino
from benchmark_sd_cpp import SdCpp


class SdZoo(Contender):
    """This project, through its Python interface."""

    compiled = False

    def imports(self) -> None:
        super().imports()
        import sd.runtime.loading  # noqa: F401

    def load(self) -> None:
        import sd
        from sd.runtime.cpu.process_memory import keep_freed_memory

        running = {"device": self.options.device, "precision": self.precision, "compile": self.compiled, **self.extra()}
        self.model = sd.load(self.options.checkpoint, **running)
        if self.options.device == "cpu":
            keep_freed_memory()  # like the command

    def extra(self) -> dict[str, str]:
        """Further options of `sd.load`, and of the command."""
        return {}

    def batch(self, steps: int) -> list:
        from sd.pipeline.settings import Settings

        common = {"prompt": PROMPT, "steps": steps, **self.settings()}
        return [Settings(**common, width=self.width, height=self.height, seed=SEED + i) for i in range(self.batch_size)]

    def settings(self) -> dict[str, object]:
        return {"sampler": self.way.sampler, "guidance_scale": self.way.guidance_scale}

    def prepare(self, width: int, height: int, batch_size: int) -> None:
        self.width, self.height, self.batch_size = width, height, batch_size
        self.states = self.model.sample(self.batch(self.way.endless))

    def encode_text(self):
        return self.model.encode_prompts(self.way.texts)

    def step(self) -> None:
        latents = next(self.states, None)
        if latents is None:
            self.prepare(self.width, self.height, self.batch_size)
            latents = next(self.states)
        self.latest = latents

    def decode(self) -> None:
        self.model.decode(self.latest)

    def pictures(self, steps: int) -> list:
        size = {"width": self.width, "height": self.height, "batch_size": self.batch_size}
        return self.model.txt2img(PROMPT, **size, steps=steps, seed=SEED, **self.settings())

    def whole(self, width: int, height: int, steps: int) -> None:
        """Through the command, which also writes the picture to a file."""
        from sd.app.cli import main as command

        flags = {"model": self.options.checkpoint, "device": self.options.device, "precision": self.precision}
        flags |= {"width": width, "height": height, "steps": steps, **self.settings(), **self.extra()}
        with tempfile.TemporaryDirectory() as folder:
            flags |= {"seed": SEED, "out": folder}
            words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
            code = command(["txt2img", PROMPT, *words, "--quiet", *["--compile"] * self.compiled])
        if code:
            raise RuntimeError(f"sd txt2img ended with exit code {code}")

    def denoised(self, steps: int):
        *_, latents = self.model.sample(self.batch(steps))
        return latents

    def versions(self) -> dict[str, object]:
        import sd

        captured = self.model.runner.captured
        graphs = {"CUDA graphs": captured.problem or "captured"} if captured else {}
        return {"sd-zoo": sd.__version__, **super().versions(), **graphs}


class SdZooUncaptured(SdZoo):
    """The same without CUDA graphs; no difference on a CPU."""

    def load(self) -> None:
        super().load()
        self.model.runner = self.model.runner.for_watching()


class SdZooCompiled(SdZoo):
    """The same with the UNet compiled; the first step of each size compiles."""

    compiled = True


class SdZooInt8(SdZoo):
    """The same with 8-bit weights and activations in the UNet."""

    own_precision = INT8


class SdZooFew(SdZoo):
    """A few steps without guidance, decoded by a tiny VAE."""

    way = FEW

    @classmethod
    def files(cls, options: Options) -> list[str]:
        return [*super().files(options), options.tiny_vae]

    def extra(self) -> dict[str, str]:
        return {"tiny_vae": self.options.tiny_vae}


class SdZooFewInt8(SdZooFew):
    """The same with 8-bit weights and activations in the UNet."""

    own_precision = INT8


CONTENDERS: dict[str, type[Contender]] = {
    "sd-zoo": SdZoo,
    "sd-zoo-uncaptured": SdZooUncaptured,
    "sd-zoo-compiled": SdZooCompiled,
    "sd-zoo-int8": SdZooInt8,
    "sd-zoo-few": SdZooFew,
    "sd-zoo-few-int8": SdZooFewInt8,
    "diffusers": Diffusers,
    "diffusers-plain": DiffusersPlain,
    "diffusers-tuned": DiffusersTuned,
    "diffusers-compiled": DiffusersCompiled,
    "openvino": OpenVINO,
    "openvino-int8": OpenVINOInt8,
    "fastsd": FastSD,
    "fastsd-int8": FastSDInt8,
    "sd.cpp": SdCpp,
}


def answer_to(contender: Contender, request: dict) -> dict:
    """Do one unit of work."""
    unit = request.pop("unit")
    if unit not in UNITS:
        return {"error": f"no unit of work is called {unit!r}"}
    try:
        started = time.perf_counter()
        result = getattr(contender, unit)(**request)
        contender.wait()
        seconds = result if isinstance(result, Seconds) else time.perf_counter() - started
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
    return {"seconds": seconds, **(result if unit == "versions" else {})}


PREPARATIONS = {"export": export_to_openvino, "export-tiny": export_tiny_vae, "quantize": quantize_for_openvino}


def main(arguments: Sequence[str]) -> None:
    """Arguments: the name of a contender or of a preparation, the options as JSON, and for the latter the file."""
    name, options = arguments[0], Options(**json.loads(arguments[1]))
    if name in PREPARATIONS:
        PREPARATIONS[name](options, Path(arguments[2]))
        return
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps output of libraries out of the answers
    contender = CONTENDERS[name](options)
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        for line in sys.stdin:
            print(json.dumps(answer_to(contender, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
