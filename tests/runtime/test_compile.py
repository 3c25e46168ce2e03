"""--compile: one program for each kind of prediction, the same pictures, weights as they are now.

Here, "compiled" programs are PyTorch's traces of the network, run as they are: they are made in a moment, and
everything but the writing of code is as on a GPU.
"""

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, assemble, fill, final, pixels, refused, settings, settings_of
from PIL import Image
from torch import nn

import sd
from sd.app.cli.bench import lines_about
from sd.pipeline.errors import SettingError
from sd.runtime.device import RunOptions
from sd.runtime.execution import Execution
from sd.runtime.gpu import compile as compiling
from sd.runtime.gpu.compile import keep_programs, own_code, problem_of, reason_of, require_compiler
from sd.study.benchmark.layer_kinds import CONVOLUTION, Rates
from sd.study.benchmark.measuring import pictures, profile_step
from sd.study.explain.recording import explain

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
COMPILED = RunOptions(compile=True)
# two levels, one residual block in each: every kind of block, a fifth of the time to trace them all
SMALL = replace(
    TINY, unet=replace(TINY.unet, multipliers=(1, 2), residuals_per_level=1, depths=(1, 0), heads=TINY.unet.heads[:2])
)


@pytest.fixture(scope="module")
def networks():
    return fill(SMALL)


class Traces:
    """A compiler that keeps what it was given."""

    def __init__(self):
        self.programs = []

    def __call__(self, function):
        def backend(program, inputs):
            self.programs.append(program)
            return program.forward

        return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


@pytest.fixture
def models(networks):
    """One that runs as it is, and one that is compiled, with the same networks."""
    plain = assemble(SMALL, networks)
    traces = Traces()
    return plain, replace(plain, runner=Execution(COMPILED, compiler=traces)), traces


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.slow
def test_a_size_is_compiled_once_and_its_pictures_are_the_same(models):
    plain, compiled, traces = models
    shapes = []
    compiled.runner.on_compile = shapes.append
    common = {"steps": 2, "sampler": "plms"}  # keeps earlier predictions
    for seed in (1, 2):
        batch = [settings(seed=seed, **common)]
        assert distance(final(compiled, batch), final(plain, batch)) < 1e-5
    assert shapes == [(2, 4, 8, 8)]
    assert len(traces.programs) == 1

    wide = [settings(width=128, **common)]
    assert distance(final(compiled, wide), final(plain, wide)) < 1e-5
    assert shapes[1:] == [(2, 4, 8, 16)]
    again = [settings(seed=3, **common)]
    assert distance(final(compiled, again), final(plain, again)) < 1e-5
    assert len(traces.programs) == 2
    assert not any("forward" in vars(module) for module in compiled.unet.modules())


def test_each_kind_of_prediction_has_a_program_of_its_own(models):
    plain, compiled, _ = models
    programs = []
    compiled.runner = Execution(COMPILED, compiler=lambda function: programs.append(function) or function)
    kinds = {"guided": {}, "plain": {"guidance_scale": 1.0}, "tile": {"tile": "x"}, "other tile": {"tile": "y"}}
    for _ in range(2):
        for options in kinds.values():
            batch = [settings(steps=1, **options)]
            assert distance(final(compiled, batch), final(plain, batch)) < 1e-5
        final(compiled, [settings(steps=1, seed=seed) for seed in (1, 2)])
        assert len(programs) == len(kinds) + 1


def test_with_reused_features_the_network_runs_as_it_is(models):
    plain, compiled, traces = models
    batch = [settings(steps=3, reuse_features=2)]
    assert torch.equal(final(compiled, batch), final(plain, batch))
    assert not traces.programs


@pytest.mark.slow
def test_changed_weights_are_seen_without_compiling():
    plain = assemble(SMALL, fill(SMALL))
    traces = Traces()
    compiled = replace(plain, runner=Execution(COMPILED, compiler=traces))
    batch = [settings(steps=1)]
    before = final(compiled, batch)
    plain.unet.out.conv.weight.mul_(2)
    block = plain.unet.middle_block.residual1
    block.time_proj.weight = nn.Parameter(-block.time_proj.weight, requires_grad=False)
    expected = final(plain, batch)
    assert distance(before, expected) > 1e-3
    assert distance(final(compiled, batch), expected) < 1e-5
    assert len(traces.programs) == 1


def test_a_network_that_is_run_again_in_higher_precision_is_compiled_again():
    programs, said = [], []
    model = assemble(SMALL, fill(SMALL, dtype=torch.bfloat16))
    model.runner = Execution(COMPILED, compiler=lambda function: programs.append(function) or function)
    model.unet.out.conv.bias.fill_(torch.inf)
    with pytest.raises(ArithmeticError, match="UNet gave NaN or infinite values in fp32"):
        model.make([settings(steps=1)], on_retry=said.append)
    assert len(said) == 1
    assert len(programs) == 2


def test_programs_of_one_function_do_not_share_a_place():
    def make(number):
        return lambda x: x + number

    one, other = (own_code(make(number)) for number in (1, 2))
    assert (one(1), other(1)) == (2, 3)
    assert one.__code__ is not other.__code__


def failing_backend(function):
    def backend(program, inputs):
        raise RuntimeError("in line 1:\nx.cpp:3: fatal error: omp.h: No such file\n")

    return torch.compile(lambda x, *others, **named: x + 1, backend=backend)


def unknown_python(function):
    raise RuntimeError("torch.compile is not supported on Python 4.0")


def program_out_of_memory(function):
    def fail(*_, **__):
        raise RuntimeError("not enough memory: you tried to allocate 9 bytes")

    return fail


@pytest.mark.parametrize(
    ("compiler", "kind", "message"),
    [
        (failing_backend, SettingError, "^compile does not work here: RuntimeError: x.cpp:3: fatal error: omp.h: No "
         r"such file\. Leave it out\.$"),
        (unknown_python, SettingError, "compile does not work here: RuntimeError: .* Python 4.0. Leave it out."),
        (program_out_of_memory, RuntimeError, "^not enough memory: you tried"),
    ],
)  # fmt: skip
def test_errors_of_the_compiler_become_a_sentence_and_those_of_a_program_stay(networks, compiler, kind, message):
    model = replace(assemble(SMALL, networks), runner=Execution(COMPILED, compiler=compiler))
    for _ in range(2):  # nothing of the first is kept
        with pytest.raises(kind, match=message):
            final(model, [settings(steps=1)])
    assert reason_of(ValueError()) == "ValueError"


def test_what_is_needed_is_looked_for_first(monkeypatch, tmp_path):
    for device in ("cpu", "mps"):
        assert problem_of(torch.device(device)).startswith(
            f"is for NVIDIA GPUs; on {device}, pictures are made as fast"
        )
    cuda = torch.device("cuda")
    (tmp_path / "c").write_text("#!/bin/sh\n")
    (tmp_path / "c").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    monkeypatch.setattr(compiling, "find_spec", lambda _: None)
    assert problem_of(cuda).startswith("needs Triton, which is not installed")
    monkeypatch.setattr(compiling, "find_spec", lambda _: "there")
    assert problem_of(cuda).startswith("needs a C compiler for Triton, and there is none")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "and no-such-compiler is not there" in problem_of(cuda)
    monkeypatch.setenv("CC", str(tmp_path / "c"))
    assert problem_of(cuda).startswith("needs a GPU of compute capability 7.0 or newer, this one has 6.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda _: str(tmp_path))
    assert problem_of(cuda).startswith("needs the header files of Python")
    (tmp_path / "Python.h").write_text("")
    assert problem_of(cuda) is None


def test_programs_are_kept_where_only_the_user_can_write(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    keep_programs()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").write_text("")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    for shared in (tmp_path / "file", tmp_path / "shared"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(shared))
        keep_programs()
        own = Path(os.environ.pop("TORCHINDUCTOR_CACHE_DIR"))
        assert not own.is_relative_to(shared)
        assert own.stat().st_mode & 0o777 == 0o700
        own.rmdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_programs()
    folder = Path(os.environ.pop("TORCHINDUCTOR_CACHE_DIR"))
    assert folder == tmp_path / "sd-zoo" / "compiled"
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_nothing_of_the_compiler_is_imported_without_it(tiny_ckpt):
    code = (
        "import sys, sd\n"
        f"model = sd.load({str(tiny_ckpt)!r}, device='cpu', precision='fp32')\n"
        "model.txt2img('a horse', width=64, height=64, steps=1)\n"
        "assert not {'torch._dynamo', 'torch._inductor'} & sys.modules.keys()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_it_does_not_go_with_low_memory(run, tiny_ckpt):
    with pytest.raises(SettingError, match="compile does not go with low memory"):
        RunOptions(compile=True, low_memory=True)
    refused(
        run("txt2img", "a horse", "-m", tiny_ckpt, "--compile", "--low-memory", "--device", "cpu"),
        "--compile does not go with low memory",
    )


def test_commands_that_cannot_use_it_do_not_offer_it(run, tiny_ckpt, models):
    for command in ("explain", "noise"):
        refused(run(command, "a horse", "-m", tiny_ckpt, "--compile"), "--compile is not a flag")
    with pytest.raises(ValueError, match="loaded with compile cannot be explained"):
        explain(models[1], settings(steps=1))


def test_on_a_cpu_it_is_refused_before_anything_is_read(run, tiny_ckpt, monkeypatch):
    monkeypatch.setattr("sd.runtime.loading.read_parameters", None)
    for command in (("txt2img", "a horse"), ("bench", "--sizes", "64")):
        refused(run(*command, "-m", tiny_ckpt, "--device", "cpu", "--compile"), "--compile is for NVIDIA GPUs")
    with pytest.raises(SettingError):
        require_compiler(CPU)
    with pytest.raises(ValueError, match="compile is for NVIDIA GPUs"):
        sd.load(tiny_ckpt, device="cpu", compile=True)


@pytest.mark.slow
def test_the_flag_is_noted_in_the_picture_and_taken_from_it(call, tiny_ckpt, tmp_path, monkeypatch):
    """With the network's own functions in place of programs; what these compute is checked above."""
    monkeypatch.setattr("sd.runtime.gpu.compile.compiler_for", lambda device: lambda function: function)
    monkeypatch.setattr("sd.runtime.gpu.compile.problem_of", lambda device: None)
    out, again, last = tmp_path / "x.png", tmp_path / "again.png", tmp_path / "last.png"
    common = ("-m", tiny_ckpt, "-W", "64", "-H", "64", "--steps", "1", "-s", "1", "--device", "cpu")
    code, _, messages = call("txt2img", "a horse", *common, "--compile", "-o", out)
    assert code == 0
    assert "compiling for 64x64, 2 predictions at a time: once for each" in messages
    assert settings_of(out)["run"] == {"low_memory": False, "tiled_vae": False, "compile": True, "int8": False}
    code, _, messages = call("txt2img", "--like", out, "-m", tiny_ckpt, "-o", again)
    assert code == 0
    assert "--compile, as x.png was made" in messages
    assert settings_of(again)["run"] == settings_of(out)["run"]
    assert (pixels(Image.open(again)) == pixels(Image.open(out))).all()

    for flag, value in (("--reuse-features", 2), ("--merge-tokens", 0.5)):
        code, _, messages = call("txt2img", "a", *common, "--compile", flag, value, "--force", "-o", last)
        assert code == 0
        assert f"--compile does nothing for pictures with {flag}, which" in messages
        assert "run" not in settings_of(last)

    monkeypatch.undo()
    code, _, messages = call("txt2img", "--like", out, "-m", tiny_ckpt, "--force", "-o", last)
    assert code == 0
    assert "x.png was made with --compile, which is left out: it is for NVIDIA GPUs" in messages
    assert "run" not in settings_of(last)
    code, _, messages = call("txt2img", "--like", out, "-m", tiny_ckpt, "--low-memory", "--force", "-o", last)
    assert code == 0
    assert "left out: it does not go with --low-memory" in messages
    assert settings_of(last)["run"]["low_memory"]


def test_a_profiled_step_is_not_compiled(networks):
    programs = []
    model = assemble(SMALL, networks)
    model.runner = Execution(COMPILED, compiler=lambda function: programs.append(function) or function)
    found = profile_step(model, pictures(model, (64, 64), 1, 2), Rates(operations=1e9, bytes=1e9))
    convolutions = [module for module in model.unet.modules() if isinstance(module, nn.Conv2d)]
    assert found.kinds[CONVOLUTION].calls == sum(max(each.kernel_size) > 1 for each in convolutions)
    assert not programs
    machine = {"device": "cpu", "device_name": "Fast 9000", "threads": 2, "system": "", "sd_zoo": "", "torch": ""}
    told = {"model": {"name": "a", "family": "b", "precision": "fp32"}, "machine": {**machine, "python": ""}}
    assert lines_about({**told, "run": asdict(COMPILED)})[0] == "a: b, fp32 on cpu, --compile"
