"""Imports point one way, room by room, and importing does nothing else."""

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "sd").rglob("*.py"), *(ROOT / "convert").rglob("*.py")])

# A room imports from rooms to its left, never from a neighbour in the same place of the row.
ROW = [
    ("config", "files"),
    ("text", "networks", "sampling"),
    ("pipeline",),
    ("runtime", "training"),
    ("study",),
    ("app",),
]
SHARED_BY_CONVERT = {"sd.config", "sd.files", "sd.networks.block_plan", "sd.text.tokenizer"}
SPEED = ("sd.runtime.cpu", "sd.runtime.gpu", "sd.runtime.low_memory", "sd.runtime.shortcuts")
TORCH = ("sd.networks", "sd.sampling", "sd.pipeline", "sd.runtime", "sd.training", "sd.study")
TORCH += ("sd.text.conditioning", "sd.app.jobs.inputs", "sd.app.web.previews", "convert.files.tensors")
TORCH += ("convert.actions.original_writer", "convert.actions.extract", "convert.adapters.values")
TORCH += ("convert.__", "sd.__")
NO_TORCH = ["networks.block_plan", "sampling.names", "pipeline.settings", "pipeline.second_pass"]
NO_TORCH += ["pipeline.image.parameters", "pipeline.image.input_settings", "pipeline.image.stored_settings.web_ui"]
NO_TORCH += ["study.benchmark.memory", "study.explain.page", "study.explain.text"]
OPTIONAL = {"sd.app.web": "starlette"}  # modules that cannot be imported without this, which an extra installs
IMAGES = ["reading", "resizing", "masks", "outpainting"]  # Pillow and NumPy are enough for them


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path): path for path in FILES}
MISSING = tuple(room for room, package in OPTIONAL.items() if find_spec(package) is None)
KINDS = (ast.Import, ast.ImportFrom, ast.Call)


@cache
def nodes_of(path):
    """The imports and calls in a file, and those of the imports that only type checkers see."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    found, unseen = ([node for node in ast.walk(each) if isinstance(node, KINDS)] for each in (tree, ast.Module(typed)))
    return found, unseen


def imports_of(path, *, types=True):
    """Modules of the project that a file imports, also inside functions.

    types  whether imports for type checkers count
    """
    nodes, for_types = nodes_of(path)
    found = set()
    for node in nodes if types else [node for node in nodes if node not in for_types]:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & NAMES.keys()
            found |= inner or {node.module}
    return {name for name in found if name.split(".")[0] in ("sd", "convert")}


GRAPH = {name: imports_of(path) for name, path in NAMES.items()}
AT_RUN = {name: imports_of(path, types=False) for name, path in NAMES.items()}


def room(module):
    return module.split(".")[1] if module.count(".") else ""


def test_the_modules_were_found():
    assert {"sd.networks.unet", "sd.sampling.samplers.ddim", "sd.app.cli.txt2img", "convert.files.reader"} <= set(GRAPH)


def test_rooms_import_only_rooms_to_their_left():
    place = {name: number for number, names in enumerate(ROW) for name in names}
    for module, imported in GRAPH.items():
        if module.endswith("__main__"):
            continue
        for other in imported:
            if module.startswith("sd.") and other.startswith("sd.") and room(module) != room(other):
                assert place[room(other)] < place[room(module)], f"{module} imports {other}"
            elif module.startswith("sd.") and other.startswith("convert"):
                assert room(module) in ("runtime", "app"), f"{module} imports {other}"
            elif module.startswith("convert.") and other.startswith("sd"):
                assert other in SHARED_BY_CONVERT, f"{module} imports {other}"


def test_speed_is_opened_by_execution_and_loading_only():
    """In the runtime; commands, studies and training may also ask what a part offers."""
    for module, imported in GRAPH.items():
        if room(module) in ("text", "networks", "sampling", "pipeline"):
            assert not any(name.startswith("sd.runtime") for name in imported), module
        if module.startswith("sd.runtime.") and not module.startswith(SPEED):
            opened = {name for name in imported if name.startswith(SPEED)}
            assert not opened or module in ("sd.runtime.execution", "sd.runtime.loading"), (module, opened)


def test_no_module_imports_itself_by_way_of_others():
    """`sd` offers `load` lazily, so it is no part of a circle at import."""
    for start in set(GRAPH) - {"sd"}:
        seen, todo = set(), [start]
        while todo:
            for name in AT_RUN.get(todo.pop(), ()):
                if name not in seen and name != "sd":
                    seen.add(name)
                    todo.append(name)
        assert start not in seen


def calls_in(path):
    return [node for node in nodes_of(path)[0] if isinstance(node, ast.Call)]


def test_only_the_commands_print():
    for path in FILES:
        prints = any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls_in(path))
        assert not prints or module_name(path).startswith("sd.app.cli"), path


def test_the_faces_do_not_know_each_other_and_only_one_needs_a_server():
    """`app/cli` may start the web face, and imports it late."""
    for module, path in NAMES.items():
        nodes = [node for node in nodes_of(path)[0] if not isinstance(node, ast.Call)]
        names = [getattr(node, "module", None) or node.names[0].name for node in nodes]
        is_web = module.startswith("sd.app.web")
        assert not (is_web and any(name.startswith("sd.app.cli") for name in names)), module
        assert is_web or not {name.split(".")[0] for name in names} & {"starlette", "uvicorn", "anyio"}, module


def test_the_house_has_few_doors():
    entries = {path.name for path in (ROOT / "sd").iterdir() if not path.name.startswith(("_", "."))} - {"py.typed"}
    assert entries == {name if (ROOT / "sd" / name).is_dir() else f"{name}.py" for names in ROW for name in names}


def imports_without(modules, *unwanted):
    code = f"import sys, {', '.join(modules)}\nfound = {set(unwanted)!r} & set(sys.modules)\nassert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_commands_files_and_text_need_no_torch():
    modules = [name for name in GRAPH if not name.startswith((*TORCH, *MISSING))] + [f"sd.{name}" for name in NO_TORCH]
    imports_without(modules, "torch", "safetensors", "PIL", "tqdm")


def test_reading_pictures_needs_no_torch():
    imports_without([f"sd.pipeline.image.{name}" for name in IMAGES], "torch", "safetensors", "tqdm")


def test_importing_changes_nothing(tmp_path):
    """No folders, no prints, no global settings."""
    modules = ", ".join(name for name in GRAPH if not name.endswith("__main__") and not name.startswith(MISSING))
    code = (
        "import torch\n"
        "state = lambda: (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), "
        "torch.initial_seed())\n"
        f"before = state()\nimport {modules}\nassert state() == before"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_no_two_test_files_have_one_name():
    """pytest imports them by name alone, and stops at the second."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_every_package_is_installed_with_its_files():
    """pyproject.toml lists them, since one of them, the weights', lies beside the code."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^packages = (\[.*?\])$", text, re.M | re.S)[1]
    expected = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES} | {"sd.weights"}
    assert set(re.findall(r'"([\w.]+)"', listed)) == expected
    (line,) = re.findall(r'^"sd\.runtime\.cpu" = (\[.*\])$', text, re.M)
    folder = ROOT / "sd" / "runtime" / "cpu"  # without one of these, a kernel that cannot be compiled is done without
    packed = {path for pattern in ast.literal_eval(line) for path in folder.glob(pattern)}
    assert packed == {path for path in folder.iterdir() if path.suffix not in ("", ".py")}


def test_empty_networks_are_built_without_what_fills_them():
    """torch imports its compiler and a computer algebra system for that, which takes longer than to load a model."""
    code = (
        "import sys\nfrom sd.config import SD_V1\nfrom sd.networks.build import build_networks\nbuild_networks(SD_V1)\n"
    )
    code += "assert not {'sympy', 'torch._inductor'} & sys.modules.keys()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stderr) == (0, "")


TRACED = """
import sys, sd
from dataclasses import replace
from sd.pipeline.runner import Runner
model, entered = sd.load(), set()
def profile(frame, event, argument):
    if event == "call" and frame.f_code.co_name != "<module>":
        entered.add(frame.f_code.co_filename)
def files(runner, prompt):
    entered.clear()
    source = replace(model.source, sha256=str)  # the hash is not part of the picture
    traced = replace(model, runner=runner, source=source)
    sys.setprofile(profile)
    traced.txt2img(prompt, width=64, height=64, steps=1, seed=1)
    sys.setprofile(None)
    return [name for name in entered if "/sd/" in name or "/convert/" in name]
modules = [name for name in sys.modules if name.split(".")[0] in ("sd", "convert")]
with_code = [name for name in modules if (file := sys.modules[name].__file__) and open(file).read()]
plain, fast = files(Runner(), "a red circle"), files(model.runner, "a blue star")
print(len(with_code), len([name for name in plain if "/sd/runtime/" not in name]), len(fast))
"""


def test_a_model_and_a_picture_take_few_files():
    """Modules with code that `sd.load` imports; files that `txt2img` enters, in the five rooms and in all."""
    result = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True, cwd=ROOT, check=True)
    modules, plain, fast = map(int, result.stdout.split())
    assert modules <= 60
    assert plain <= 23
    assert fast <= 29
