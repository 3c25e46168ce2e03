"""Imports point one way, and importing does nothing else."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "sd").rglob("*.py"), *(ROOT / "convert").rglob("*.py")])

# lower layers first: a module imports only from lower layers, or from its own where it says so
NETWORKS = {"sd.networks.text_encoder", "sd.networks.unet", "sd.networks.vae"}
NEAR_NETWORKS = NETWORKS | {"sd.networks.attention", "sd.pipeline.latent_diffusion", "sd.pipeline.stable_diffusion"}
TORCH_FREE = [
    "sd.config",
    "sd.networks.block_plan",
    "sd.pipeline.settings",
    "sd.files",
    "sd.text.tokenizer",
    "sd.app.cli",
    "sd.app.cli.txt2img",
]
TORCH_FREE += ["sd.pipeline.image.input_settings", "sd.text.prompt_syntax", "sd.text.chunks", "sd.app.cli.tokens"]
TORCH_FREE += [
    "sd.app.jobs.step_files",
    "sd.pipeline.image.parameters",
    "sd.app.cli.like",
    "sd.pipeline.second_pass",
    "sd.sampling.strength",
    "sd.pipeline.setting_checks",
]
TORCH_FREE += ["sd.sampling.names", "sd.app.cli.schedule"]
TORCH_FREE += ["sd.app.cli.arch", "sd.app.cli.make_pictures", "sd.app.jobs.resuming", "sd.app.jobs.outputs"]
TORCH_FREE += ["sd.app.cli.explain", "sd.app.cli.noise", "sd.study.explain.page", "sd.study.explain.text"]
TORCH_FREE += [
    "convert.files.reader",
    "convert.checkpoint",
    "convert.layouts.names",
    "convert.families.family",
    "convert.actions.convert",
]
TORCH_FREE += [
    "convert.files.torch_stream_reader",
    "convert.files.diffusers_folder",
    "convert.actions.diffusers_writer",
]
TORCH_FREE += ["convert.layouts.noise_schedule", "convert.single_part", "convert.other_vae", "convert.actions.verify"]
TORCH_FREE += [
    "convert.actions.inspect",
    "convert.actions.diff",
    "convert.actions.values",
    "convert.published.known",
    "convert.published.download",
]
TORCH_FREE += [
    "sd.app.cli.bench",
    "sd.study.benchmark.process",
    "sd.runtime.cpu.process_memory",
    "sd.runtime.loading_ahead",
]
TORCH_FREE += ["sd.app.cli.img2img", "sd.app.cli.inpaint", "sd.app.cli.inspect", "sd.app.cli.diff", "sd.app.cli.models"]
PICTURES = [
    "sd.pipeline.image.reading",
    "sd.pipeline.image.resizing",
    "sd.pipeline.image.masks",
    "sd.pipeline.image.outpainting",
]  # Pillow and NumPy are enough for them


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Modules of ours that a file imports, inside functions and for type checkers only included."""
    names = {module_name(file) for file in FILES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & names
            found |= inner or {node.module}
    return {name for name in found if name.split(".")[0] in ("sd", "convert")}


GRAPH = {module_name(path): imports_of(path) for path in FILES}


def reachable(start, *, without=()):
    seen, todo = set(), [start]
    while todo:
        for name in GRAPH.get(todo.pop(), ()):
            if name not in seen and name not in without:
                seen.add(name)
                todo.append(name)
    return seen


def test_the_modules_were_found():
    assert {"sd.networks.unet", "sd.sampling.samplers.ddim", "sd.app.cli.txt2img", "convert.files.reader"} <= set(GRAPH)


# `sd` offers `load` lazily, so it is no part of a circle at import
@pytest.mark.parametrize("module", sorted(set(GRAPH) - {"sd"}))
def test_no_module_imports_itself_by_way_of_others(module):
    assert module not in reachable(module, without={"sd"})


def test_samplers_know_no_network_and_networks_no_sampler():
    for module in GRAPH:
        if module.startswith("sd.sampling.samplers"):
            assert not reachable(module, without={"sd"}) & (
                NETWORKS | {"sd.networks.attention", "sd.pipeline.latent_diffusion", "sd.pipeline.stable_diffusion"}
            ), module
    for module in NETWORKS:
        assert not any(
            name.startswith(("sd.sampling.samplers", "sd.sampling.schedule"))
            for name in reachable(module, without={"sd"})
        )


def test_only_loading_saving_and_the_commands_know_the_converter():
    for module, imported in GRAPH.items():
        if module.startswith("sd.") and not module.startswith(("sd.runtime", "sd.app")):
            assert not any(name.startswith("convert") for name in imported), module


def test_only_the_commands_print():
    for path in FILES:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        prints = any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)
        assert not prints or module_name(path).startswith("sd.app"), path


@pytest.mark.parametrize("module", TORCH_FREE)
def test_module_needs_no_torch(module):
    code = f"import sys, {module}; assert not {{'torch', 'safetensors', 'PIL', 'tqdm'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", PICTURES)
def test_module_for_pictures_needs_no_torch(module):
    code = f"import sys, {module}; assert not {{'torch', 'safetensors', 'tqdm'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_changes_nothing(tmp_path):
    """No folders, no prints, no global settings."""
    modules = ", ".join(name for name in GRAPH if not name.endswith("__main__"))
    code = (
        "import torch\n"
        "state = lambda: (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), "
        "torch.initial_seed())\n"
        f"before = state()\nimport {modules}\nassert state() == before"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_every_package_is_installed():
    """pyproject.toml lists them, since one of them, the weights', lies beside the code."""
    listed = re.search(r"^packages = (\[.*?\])$", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    expected = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES} | {"sd.weights"}
    assert set(re.findall(r'"([\w.]+)"', listed)) == expected


def test_empty_networks_are_built_without_what_fills_them():
    """torch imports its compiler and a computer algebra system for that, which takes longer than to load a model."""
    code = (
        "import sys\nfrom sd.config import SD_V1\nfrom sd.networks.build import build_networks\nbuild_networks(SD_V1)\n"
        "assert not {'sympy', 'torch._inductor'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_sources_of_kernels_and_their_headers_are_part_of_the_package():
    """Without one of them, nothing would say so: a kernel that cannot be compiled is done without."""
    (line,) = re.findall(r'^"sd\.runtime\.cpu" = (\[.*\])$', (ROOT / "pyproject.toml").read_text(), re.M)
    folder = ROOT / "sd" / "runtime" / "cpu"
    packed = {path for pattern in ast.literal_eval(line) for path in folder.glob(pattern)}
    assert packed == {path for path in folder.iterdir() if path.suffix not in ("", ".py")}
