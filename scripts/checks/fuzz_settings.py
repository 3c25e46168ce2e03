"""Fuzz the readers of settings: texts, graphs and JSON lines made from sound ones by changing them.

    python scripts/checks/fuzz_settings.py run FOLDER --minutes 10
    python scripts/checks/fuzz_settings.py command 2000 -m tiny.ckpt    # through `sd show`, --like and --from-file

FOLDER gets each input that broke a rule: one a place in the code. The rules: a reader raises only the project's own
errors, whose text is one sentence; what it returns can be written as JSON and is valid; and it takes at most a second
of processor time for 100 kB. See `docs/fuzzing.md`.
"""

import argparse
import contextlib
import io
import json
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from settings_texts import json_lines, mutated, seeds  # noqa: E402

from sd.app.cli import main as sd  # noqa: E402
from sd.app.cli.prompt_files import json_settings  # noqa: E402
from sd.app.errors import UsageError  # noqa: E402
from sd.app.jobs.plan import size_of  # noqa: E402
from sd.pipeline.errors import SettingError  # noqa: E402
from sd.pipeline.image.metadata import exact_in, settings_from  # noqa: E402
from sd.pipeline.image.stored_settings.other_programs import NoSettings, settings_of_texts  # noqa: E402
from sd.pipeline.image.stored_settings.texts import text_of  # noqa: E402
from sd.pipeline.settings import FIELDS, Settings  # noqa: E402

SECONDS = 1.0  # of processor time, for 100 kB
NEEDED = {"width": 64, "height": 64, "seed": 0}


def examine(text: str) -> str:
    """Read a text in every way; returns what became of it. Raises AssertionError where a rule is broken."""
    outcome = "refused"
    for kind in ("parameters", "prompt", "workflow", "Comment", "invokeai_metadata", "sd-metadata", "Dream", "sd"):
        texts = {kind: text, "pixels": "64x64", "Software": "NovelAI", "Description": "a"}
        settings_from(exact_in(texts))
        try:
            found = settings_of_texts(texts)
        except NoSettings as error:
            check_sentence(error)
            continue
        outcome = "read"
        json.dumps([found.settings, found.unused, found.notes, found.made_with], allow_nan=False)
        ours = {name: value for name, value in found.settings.items() if name in FIELDS}
        Settings(**{**NEEDED, **ours, "prompt": ""})
    text_of(text.encode("utf-8", "surrogatepass"))
    line = text.replace("\n", " ").strip()
    try:
        own = json_settings("line 1: ", line if line.startswith("{") else "{}", {})
        Settings(**{**NEEDED, **size_of(own, 64), **own})
    except (UsageError, SettingError) as error:
        check_sentence(error)
    else:
        outcome = "read"
    return outcome


def check_sentence(error: Exception) -> None:
    text = str(error)
    if "\n" in text or len(text) > 1500:
        raise AssertionError(f"no sentence: {text[:300]!r}")


def fault_in(text: str, examine: Callable[[str], str] = examine) -> tuple[str | None, str]:
    """What is wrong with how a text is read, and where; None if nothing is. And what became of the text."""
    started = time.process_time()
    try:
        outcome = examine(text)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}", "fault"
    spent = time.process_time() - started
    if spent > SECONDS * (1 + len(text) / 100_000):
        return f"took {spent:.1f} s", "fault"
    return None, outcome


def run(folder: Path, minutes: float, seed: int) -> int:
    """Change sound texts, and those that were read, for some time. Returns how many places in the code broke a rule."""
    folder.mkdir(parents=True, exist_ok=True)
    pick, outcomes, finds = random.Random(seed), Counter(), {}
    corpus = [*seeds()]
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        text = mutated(pick.choice(corpus), pick)
        fault, outcome = fault_in(text)
        outcomes[outcome] += 1
        if fault and fault not in finds:
            finds[fault] = sha256(text.encode("utf-8", "replace")).hexdigest()[:12]
            (folder / finds[fault]).write_text(text, encoding="utf-8", errors="replace")
            print(f"{fault}: {folder / finds[fault]}", flush=True)
        if outcome == "read" and len(text) < 20_000 and pick.random() < 0.05:
            corpus = [*corpus[-3000:], text]
    print(json.dumps({"outcomes": outcomes, "finds": finds}))
    return len(finds)


def command(number: int, model: str, seed: int) -> int:
    """Give hostile pictures and JSON lines to the commands. Returns how many ended otherwise than with 0, 1 or 2."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    pick, codes, slowest = random.Random(seed), Counter(), 0.0
    for i in range(number):
        text = mutated(pick.choice([*json_lines()] if i % 2 else [*seeds()]), pick)
        Path("lines.jsonl").write_bytes(text.replace("\n", " ").encode("utf-8", "surrogatepass"))
        info = PngInfo()
        info.add_itxt(pick.choice(["parameters", "sd", "prompt", "Comment"]), text.encode("utf-8", "replace").decode())
        Image.new("RGB", (8, 8)).save("picture.png", pnginfo=info)
        words = ["show", "picture.png", "--json"]
        if i % 2:
            words = ["txt2img", "--from-file", "lines.jsonl", "-m", model, "-o", "out/", "--seed", "1", "-q"]
        elif i % 4:
            words = ["txt2img", "--like", "picture.png", "-m", "absent.ckpt"]
        started = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            code = sd(words)
        slowest = max(slowest, time.monotonic() - started)
        codes[code] += 1
        if code not in (0, 1, 2) or "Traceback" in said.getvalue():
            print(code, words, repr(text[:300]), said.getvalue()[:300], flush=True)
    print(json.dumps({"exit codes": codes, "slowest_seconds": round(slowest, 2)}))
    return sum(count for code, count in codes.items() if code not in (0, 1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="fuzz the readers", allow_abbrev=False)
    running.add_argument("folder", type=Path, help="for what is found")
    running.add_argument("--minutes", type=float, default=10, help="(default: 10)")
    calling = commands.add_parser("command", help="give hostile settings to the commands", allow_abbrev=False)
    calling.add_argument("number", type=int, help="of settings")
    calling.add_argument("-m", "--model", default="absent.ckpt", help="(default: none, so nothing is made)")
    for each in (running, calling):
        each.add_argument("--seed", type=int, default=1, help="of the random numbers (default: 1)")
    args = parser.parse_args()
    if args.command == "run":
        sys.exit(1 if run(args.folder, args.minutes, args.seed) else 0)
    sys.exit(1 if command(args.number, args.model, args.seed) else 0)


if __name__ == "__main__":
    main()
