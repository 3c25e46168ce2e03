"""stable-diffusion.cpp as a contender of `benchmark.py`, through its Python binding."""

import os
import time

from benchmark_contender import PROMPT, SEED, Contender, Seconds


class SdCpp(Contender):
    """Weights in 16 bits, flash attention in the UNet, Euler steps, which cost as much as DDIM's.

    It makes whole pictures only. So each unit runs one and takes its own part by the clock of its progress callback; a
    step is a picture of one step.
    """

    is_comparable = False

    def imports(self) -> None:
        import stable_diffusion_cpp

        self.program = stable_diffusion_cpp
        self.threads = self.options.threads or os.cpu_count()

    def load(self) -> None:
        kind = {"fp32": "f32", "fp16": "f16", "bf16": "f16"}[self.precision]  # its bf16 is no faster on a CPU
        self.model = self.program.StableDiffusion(
            model_path=self.options.checkpoint,
            wtype=kind,
            n_threads=self.threads,
            diffusion_flash_attn=True,
            vae_decode_only=True,
            rng_type="cpu",
            verbose=False,
        )

    def prepare(self, width: int, height: int, batch_size: int) -> None:
        self.size = {"width": width, "height": height, "batch_count": batch_size}
        self.parts: dict[str, float] = {}  # of the latest run, in seconds

    def pictures(self, steps: int) -> list:
        marks = [time.perf_counter()]  # start; first step begins; each step ends
        pictures = self.model.generate_image(
            PROMPT,
            **self.size,
            cfg_scale=self.way.guidance_scale,
            sample_method="euler",
            sample_steps=steps,
            seed=SEED,
            progress_callback=lambda step, steps, seconds: marks.append(time.perf_counter()),
        )
        start, first, *_, last = marks
        self.parts = {"text": first - start, "steps": last - first, "decode": time.perf_counter() - last}
        return pictures

    def part(self, name: str) -> Seconds:
        if not self.parts:
            self.pictures(1)
        return Seconds(self.parts[name])

    def encode_text(self) -> Seconds:
        return self.part("text")

    def step(self) -> None:
        self.steps(1)

    def steps(self, count: int) -> Seconds:
        self.pictures(count)
        return self.part("steps")

    def decode(self) -> Seconds:
        return self.part("decode")

    def denoised(self, steps: int):
        raise NotImplementedError("stable-diffusion.cpp gives no latents")

    def versions(self) -> dict[str, object]:
        return {"stable-diffusion-cpp-python": self.program.__version__, "threads": self.threads}
