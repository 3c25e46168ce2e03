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

from benchmark_contender import ENDLESS, GUIDANCE_SCALE, PROMPT, SEED, UNITS, Contender, Options
from benchmark_diffusers import Diffusers, DiffusersCompiled, DiffusersPlain, DiffusersTuned
from benchmark_openvino import OpenVINO, export_to_openvino


class SdZoo(Contender):
    """This project, through its Python interface."""

    compiled = False

    def imports(self) -> None:
        super().imports()
        import sd.runtime.loading  # noqa: F401

    def load(self) -> None:
        import sd
        from sd.runtime.cpu.process_memory import keep_freed_memory

        running = {"device": self.options.device, "precision": self.options.precision, "compile": self.compiled}
        self.model = sd.load(self.options.checkpoint, **running)
        if self.options.device == "cpu":
            keep_freed_memory()  # like the command

    def batch(self, steps: int) -> list:
        from sd.pipeline.settings import Settings

        common = {"prompt": PROMPT, "steps": steps, "sampler": "ddim", "guidance_scale": GUIDANCE_SCALE}
        return [Settings(**common, width=self.width, height=self.height, seed=SEED + i) for i in range(self.batch_size)]

    def prepare(self, width: int, height: int, batch_size: int) -> None:
        self.width, self.height, self.batch_size = width, height, batch_size
        self.states = self.model.sample(self.batch(ENDLESS))

    def encode_text(self):
        return self.model.encode_prompts(["", PROMPT])

    def step(self) -> None:
        latents = next(self.states, None)
        if latents is None:
            self.prepare(self.width, self.height, self.batch_size)
            latents = next(self.states)
        self.latest = latents

    def decode(self) -> None:
        self.model.decode(self.latest)

    def pictures(self, steps: int) -> None:
        self.model.txt2img(
            PROMPT,
            width=self.width,
            height=self.height,
            steps=steps,
            sampler="ddim",
            guidance_scale=GUIDANCE_SCALE,
            seed=SEED,
            batch_size=self.batch_size,
        )

    def whole(self, width: int, height: int, steps: int) -> None:
        """Through the command, which also writes the picture to a file."""
        from sd.app.cli import main as command

        flags = {"model": self.options.checkpoint, "device": self.options.device, "precision": self.options.precision}
        flags |= {"width": width, "height": height, "steps": steps, "sampler": "ddim", "scale": GUIDANCE_SCALE}
        with tempfile.TemporaryDirectory() as folder:
            flags |= {"seed": SEED, "out": folder}
            words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
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


CONTENDERS: dict[str, type[Contender]] = {
    "sd-zoo": SdZoo,
    "sd-zoo-uncaptured": SdZooUncaptured,
    "sd-zoo-compiled": SdZooCompiled,
    "diffusers": Diffusers,
    "diffusers-plain": DiffusersPlain,
    "diffusers-tuned": DiffusersTuned,
    "diffusers-compiled": DiffusersCompiled,
    "openvino": OpenVINO,
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
        seconds = time.perf_counter() - started
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
    return {"seconds": seconds, **(result if unit == "versions" else {})}


def main(arguments: Sequence[str]) -> None:
    """Arguments: the name of a contender and its options as JSON; or "export", two folders and a precision."""
    if arguments[0] == "export":
        export_to_openvino(Path(arguments[1]), Path(arguments[2]), arguments[3])
        return
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps output of libraries out of the answers
    contender = CONTENDERS[arguments[0]](Options(**json.loads(arguments[1])))
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        for line in sys.stdin:
            print(json.dumps(answer_to(contender, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
