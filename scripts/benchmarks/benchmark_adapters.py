"""Time and memory of an adapter on a loaded model: putting it on, a step with it, taking it off.

    python scripts/benchmarks/benchmark_adapters.py files/made-up-full.ckpt
    python scripts/benchmarks/benchmark_adapters.py files/made-up-full.ckpt --adapter style.safetensors --precision fp32

Without an adapter, one is made up, as kohya's scripts write them: rank 32, all attention and feed-forward layers. Steps
with and without it take turns, with guidance. Peak memory is that of a process that makes one step, with the adapter
and without, as the kernel counts it.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from benchmark_process import environment
from safetensors.torch import save_file
from tqdm import tqdm

from convert.layouts.adapter_names import adapted_family, kohya_names, modules
from sd.config import ModelConfig
from sd.pipeline.settings import Settings
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.runtime.cpu.process_memory import keep_freed_memory
from sd.runtime.loading import load
from sd.study.benchmark.memory import resident_peak
from sd.study.clock import synchronize


def made_up_adapter(path: Path, config: ModelConfig, rank: int = 32) -> None:
    family, tensors = adapted_family(config), {}
    for target, name in kohya_names(family).items():
        outputs, *inputs = modules(family)[target]
        attends = target.startswith("text_encoder.") or ".attention." in target
        if inputs and attends and "norm" not in target:
            tensors[f"{name}.lora_down.weight"] = torch.randn(rank, inputs[0]).mul(0.01).half()
            tensors[f"{name}.lora_up.weight"] = torch.randn(outputs, rank).mul(0.01).half()
            tensors[f"{name}.alpha"] = torch.tensor(rank / 2).half()
    save_file(tensors, path)


def step(model: StableDiffusion, size: int) -> float:
    """Seconds of one guided step, without texts and decoding."""
    steps = model.sample([Settings(prompt="a horse", seed=1, width=size, height=size, steps=2)])
    next(steps)
    synchronize(model.device)
    started = time.perf_counter()
    next(steps)
    synchronize(model.device)
    return time.perf_counter() - started


def applied(model: StableDiffusion, adapters: list[Path]) -> float:
    started = time.perf_counter()
    model.apply(adapters)
    synchronize(model.device)
    return time.perf_counter() - started


def peak(args: argparse.Namespace, adapters: list[Path]) -> int:
    """Peak memory, in bytes, of a process that loads the model, applies adapters and makes a step."""
    given = [str(args.model), args.precision, str(args.size), *map(str, adapters)]
    command = [sys.executable, str(Path(__file__).resolve()), "--alone", *given]
    return int(subprocess.run(command, env=environment(), stdout=subprocess.PIPE, check=True).stdout)


def alone(model: str, precision: str, size: str, *adapters: str) -> None:
    keep_freed_memory()
    loaded = load(model, precision=precision)
    loaded.apply(adapters)
    step(loaded, int(size))
    print(resident_peak("self"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, help="a checkpoint")
    parser.add_argument("--adapter", type=Path, help="(default: made up)")
    parser.add_argument("--precision", default="auto", help="auto, fp32, fp16 or bf16 (default: auto)")
    parser.add_argument("--size", type=int, default=512, help="of the pictures (default: 512)")
    parser.add_argument("--runs", type=int, default=3, help="(default: 3)")
    args = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        model, adapter = load(args.model, precision=args.precision), args.adapter
        if adapter is None:
            adapter = Path(folder, "rank32.safetensors")
            made_up_adapter(adapter, model.config)
        step(model, args.size)
        on, off, with_it, without = ([] for _ in range(4))
        for _ in tqdm(range(args.runs)):
            on.append(applied(model, [adapter]))
            with_it.append(step(model, args.size))
            off.append(applied(model, []))
            without.append(step(model, args.size))
        del model
        more, less = peak(args, [adapter]), peak(args, [])
    print(f"apply {min(on):.2f} s, take off {min(off):.2f} s, the fastest of {args.runs}")
    print(f"a step with it {min(with_it):.3f} s, without {min(without):.3f} s: {min(with_it) / min(without):.3f}")
    print(f"peak memory with it {more / 1e9:.2f} GB, without {less / 1e9:.2f} GB: {more / less:.3f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        alone(*sys.argv[2:])
    else:
        main()
