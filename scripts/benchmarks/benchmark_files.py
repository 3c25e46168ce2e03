"""The files that the contenders of `benchmark.py` read: the same made-up weights in each one's layout."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmark_contender import Options
from benchmark_few import FastSD
from benchmark_int8 import OpenVINOInt8
from benchmark_process import ROOT, WORKERS, environment
from benchmark_workers import CONTENDERS

from sd.files import folder_written_whole
from sd.study.benchmark.memory import read_once

SPACE = {"sd-v1": 4.3e9, "sd-v2": 5.3e9, "sdxl": 13.9e9}  # full-size family -> bytes of one layout in float32


def missing_files(options: Options, contenders: Sequence[str]) -> list[str]:
    """The files and folders that the contenders need and that do not exist yet, in the order in which they are made."""
    needed = dict.fromkeys(path for name in contenders for path in CONTENDERS[name].files(options))
    return [path for path in needed if not Path(path).exists()]


def space_for(options: Options, contenders: Sequence[str], layout: float) -> float:
    """Bytes that the missing files will take.

    layout  bytes of one layout of the whole model
    """
    whole = {options.checkpoint, options.folder, options.openvino}
    quantized = str(OpenVINOInt8.networks_in(options)["unet"])
    missing = missing_files(options, contenders)
    return layout * (len(whole & {*missing}) + (quantized in missing) / 4)


def make_files(options: Options, contenders: Sequence[str], family: str, size: str) -> None:
    """Write the missing files, and bring the weights into the page cache."""
    for path in missing_files(options, contenders):
        if Path(path).exists():  # came with the folder
            continue
        make(path, options, family, size)
    for path in [Path(options.checkpoint), *Path(options.folder).rglob("*.safetensors")]:
        read_once(path)


def make(path: str, options: Options, family: str, size: str) -> None:
    """Write one of the files from those that there are."""
    script, told = "scripts/benchmarks/make_checkpoint.py", json.dumps(asdict(options))
    if path == options.checkpoint:
        run(script, path, "--family", family, "--size", size, "--precision", options.file_precision)
    elif path == options.tiny_vae:
        run(script, path, "--family", "taesd")
    elif path == options.folder:
        run("-m", "sd", "convert", options.checkpoint, path, "--to", "diffusers", "--no-hash", "-q")
    elif path == options.openvino:
        with folder_written_whole(Path(path)) as folder:
            run(str(WORKERS), "export", told, str(folder))
    elif path == str(OpenVINOInt8.networks_in(options)["unet"]):
        run(str(WORKERS), "quantize", told, path)
    elif path == str(FastSD.networks_in(options)["vae_decoder"]):
        run(str(WORKERS), "export-tiny", told, path)
    else:
        sys.exit(f"{path} is missing. Remove {options.openvino}: it is then made again")


def run(*command: str) -> None:
    """Run a preparation in another process, whose memory ends with it."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
