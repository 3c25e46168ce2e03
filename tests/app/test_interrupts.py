"""Ctrl-C at moments that a clock does not hit: while a module is imported, and as the interpreter exits."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INTERRUPTED = """
import atexit, importlib, os, runpy, signal, sys
moment = sys.argv.pop(1)
interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
class Hook:
    def find_spec(self, name, *_):
        if name == moment:
            interrupt()
sys.meta_path.insert(0, Hook())
if moment == "exit":
    atexit.register(interrupt)
entry = sys.argv.pop(1)
if ":" in entry:  # as the installed script does
    module, _, function = entry.partition(":")
    sys.exit(getattr(importlib.import_module(module), function)())
runpy.run_module(entry, run_name="__main__", alter_sys=True)
"""


def script() -> str:
    return re.search(r'^sd = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["sd", script()])
@pytest.mark.parametrize("moment", ["sd.app.cli", "argparse", "sd.pipeline.settings", "PIL", "torch", "exit"])
def test_an_interrupt_is_one_line_and_exit_code_130(tmp_path, entry, moment):
    command = [sys.executable, "-c", INTERRUPTED, moment, entry, "txt2img", "a", "-o", "x/", "-W", "64", "-H", "64"]
    if moment == "exit":
        command[5:] = ["txt2img", "--help"]
    child = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (child.returncode, len(child.stderr.splitlines())) == (130, 1), child.stderr
    assert child.stderr.startswith("sd: interrupted")
