"""Which device, which precision, and what becomes of freed memory."""

import subprocess
import sys

import pytest
import torch

from sd.pipeline.runner import precision_name
from sd.runtime.cpu.process_memory import keep_freed_memory
from sd.runtime.device import has_fast_bf16, pick_device, pick_precision


def test_auto_takes_the_first_device_that_is_there(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert pick_device().type == expected


@pytest.mark.parametrize("name", ["tpu", "cuda:1", "cuda:-1", "cuda:x", "cpu:3", ""])
def test_devices_that_are_not_there_are_refused_with_those_that_are(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"is not available here\. There are: auto, cuda"):
        pick_device(name)
    assert pick_device("cuda:0") == torch.device("cuda:0")


def test_a_precision_that_is_asked_for_is_taken_and_named():
    cpu = torch.device("cpu")
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        assert pick_precision(cpu, name) == dtype
        assert precision_name(dtype) == name
    with pytest.raises(ValueError, match="precision must be auto, fp32, fp16, bf16, int8, got 'fp8'"):
        pick_precision(cpu, "fp8")


def test_auto_is_bf16_only_on_cpus_that_multiply_it(monkeypatch):
    for there, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("sd.runtime.device.has_fast_bf16", lambda there=there: there)
        assert pick_precision(torch.device("cpu")) == expected
        assert pick_precision(torch.device("cpu"), width=64) == torch.float32  # a narrow network is no faster in bf16
    assert pick_precision(torch.device("cuda")) == torch.float16
    assert has_fast_bf16() in (True, False)


@pytest.mark.skipif(sys.platform != "linux", reason="it is about the C library of Linux")
@pytest.mark.slow
def test_kept_memory_is_used_again_without_new_pages():
    script = (
        "import resource, torch\n"
        "from sd.runtime.cpu.process_memory import keep_freed_memory\n"
        "{}\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): torch.ones(1 << 24)\n"
        "before = faults()\n"
        "for _ in range(20): torch.ones(1 << 24)\n"  # 64 MB, 16,384 pages or 32 huge ones
        "print(faults() - before)"
    )

    def faults(first):
        run = subprocess.run([sys.executable, "-c", script.format(first)], capture_output=True, text=True, check=True)
        return int(run.stdout)

    if not keep_freed_memory():
        pytest.skip("this C library has no such setting")
    assert faults("assert keep_freed_memory()") < faults("") / 4
