"""Fuzz the readers of checkpoints and pictures: millions of damaged and hostile files, guided by the code they reach.

    python3.11 -m venv fuzz && fuzz/bin/pip install atheris safetensors pytest coverage pillow numpy    # once
    fuzz/bin/python scripts/checks/fuzz_readers.py run FOLDER --kind zip --minutes 10
    fuzz/bin/python scripts/checks/fuzz_readers.py replay FOLDER/corpus    # each file once; of a find: what goes wrong

FOLDER gets `corpus` (inputs that reached new code), `finds` (inputs that broke a rule, one a place in the code, made as
small as they get) and `statistics.json`. What the rules are is told in `docs/fuzzing.md` and in `tests/examination.py`;
where the files come from, in `tests/mutation.py`; both of pictures, in `tests/picture_fuzzing.py`, and of adapters,
embeddings and image cards, in `tests/adapter_fuzzing.py`.
"""

import argparse
import json
import random
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

KINDS = ["zip", "stream", "safetensors", "pickle", "picture", "adapter", "card"]
LARGEST_INPUT = 12_000  # bytes: all limits that are not about bytes can be reached
SECONDS = 1.0  # of processor time, for one input, in instrumented code
GROWTH = 300 << 20  # bytes that one input may add to the largest resident set so far; 256 MiB are allowed to inflate
ADDRESS_SPACE = 2 << 30  # bytes beyond what the interpreter needs: what asks for more gets a MemoryError, a find
MOST_ACCEPTED = 5000  # inputs that are kept to start from again
REPORT_EVERY = 20.0  # seconds


class TooMuch(Exception):
    """An input that took too long or too much memory."""


class Examiner:
    """Examines inputs, keeps count, and keeps the first input that went wrong at each place in the code."""

    def __init__(self, folder: Path, examine: Callable[[bytes], str]):
        self.examine = examine
        self.folder = folder
        self.outcomes: Counter = Counter()
        self.finds: dict[str, str] = {}
        self.accepted: list[bytes] = []
        self.started = self.reported = time.monotonic()
        self.slowest = 0.0

    def __call__(self, data: bytes) -> None:
        fault = self.fault(data)
        if fault:
            self.keep(data, fault)
        if time.monotonic() - self.reported > REPORT_EVERY:
            self.report()

    def fault(self, data: bytes) -> str | None:
        """What is wrong, and where; None if all rules hold."""
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        try:
            outcome = self.examine(data)
            spent = time.process_time() - started
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest) * 1024
            if spent > SECONDS:
                raise TooMuch(f"took {spent:.1f} s")
            if grown > GROWTH:
                raise TooMuch(f"took {grown >> 20} MiB")
        except Exception as error:
            self.outcomes["fault"] += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
        self.slowest = max(self.slowest, spent)
        self.outcomes[outcome] += 1
        if outcome != "refused" and len(self.accepted) < MOST_ACCEPTED:
            self.accepted.append(data)
        return None

    def keep(self, data: bytes, fault: str) -> None:
        if fault in self.finds:
            return
        small = smallest(data, lambda candidate: self.fault(candidate) == fault)
        name = f"{fault.replace(' ', '-').replace(':', '-')}-{sha256(small).hexdigest()[:8]}"
        (self.folder / "finds" / name).write_bytes(small)
        self.finds[fault] = name
        self.report()

    def report(self) -> None:
        self.reported = time.monotonic()
        elapsed = self.reported - self.started
        executions = sum(self.outcomes.values())
        statistics = {
            "seconds": round(elapsed),
            "executions": executions,
            "executions_per_second": round(executions / elapsed, 1) if elapsed else 0,
            "outcomes": dict(self.outcomes),
            "slowest_seconds": round(self.slowest, 3),
            "largest_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            "corpus": sum(1 for _ in (self.folder / "corpus").iterdir()),
            "finds": self.finds,
        }
        (self.folder / "statistics.json").write_text(json.dumps(statistics, indent=1) + "\n")


def smallest(data: bytes, is_fault: Callable[[bytes], bool]) -> bytes:
    """Take away pieces, halves first, single bytes last, as long as the fault stays."""
    length = len(data) // 2
    while length:
        start = 0
        while start < len(data):
            shorter = data[:start] + data[start + length :]
            if is_fault(shorter):
                data = shorter
            else:
                start += length
        length //= 2
    return data


def run(folder: Path, kind: str | None, minutes: float, seed: int) -> None:
    """Fuzz for some time, starting from files of one kind or of all. Does not return."""
    import atheris

    for name in ("corpus", "finds"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pictures = {"picture": ["sd.pipeline.image", "PIL"], "card": ["convert", "PIL"]}
    with atheris.instrument_imports(include=pictures.get(kind, ["convert"])):
        examine, seeds, mutated = subject(kind)
    for data in seeds:
        (folder / "corpus" / sha256(data).hexdigest()[:16]).write_bytes(data)
    limit_memory()
    examiner = Examiner(folder, examine)

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        pick = random.Random(seed)
        if pick.random() < 0.1:
            return atheris.Mutate(data, largest)
        if pick.random() < 0.6:  # most of the corpus is refused, in ever new ways; change what was read as well
            data = pick.choice(examiner.accepted)
        return mutated(data, pick)[:largest]

    options = [f"-max_total_time={minutes * 60:.0f}", f"-max_len={LARGEST_INPUT}", f"-seed={seed}", "-timeout=120"]
    options += ["-rss_limit_mb=4096", "-mutate_depth=1", "-print_final_stats=1", "-verbosity=1"]
    options += [f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], examiner, custom_mutator=mutate)
    atheris.Fuzz()


def subject(kind: str | None) -> tuple[Callable[[bytes], str], list[bytes], Callable[[bytes, random.Random], bytes]]:
    """What examines files, the sound ones of this kind (None: of all kinds of checkpoints), and what changes them."""
    if kind == "picture":
        import picture_fuzzing as pictures

        return pictures.examine, pictures.seeds(), pictures.mutated
    if kind in ("adapter", "card"):
        import adapter_fuzzing as adapters

        if kind == "card":
            return adapters.examine_card, adapters.cards(), adapters.mutated_card
        return adapters.examine, adapters.adapters(), adapters.mutated
    import mutation
    from examination import examine

    return examine, [data for data in mutation.seeds() if kind in (None, mutation.kind_of(data))], mutation.mutated


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def replay(place: Path, kind: str | None) -> int:
    """Examine each file of a folder, or one file, once. Returns how many broke a rule."""
    examine, _, _ = subject(kind)
    limit_memory()
    outcomes: Counter = Counter()
    for path in sorted(place.iterdir()) if place.is_dir() else [place]:
        try:
            outcomes[examine(path.read_bytes())] += 1
        except Exception:
            outcomes["fault"] += 1
            print(f"{path}:\n{traceback.format_exc()}", file=sys.stderr)
    print(json.dumps(outcomes))
    return outcomes["fault"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="fuzz", allow_abbrev=False)
    running.add_argument("folder", type=Path, help="for what comes out of it; one of before is gone on with")
    running.add_argument("--minutes", type=float, default=30, help="(default: 30)")
    running.add_argument("--seed", type=int, default=1, help="of the random numbers (default: 1)")
    replaying = commands.add_parser("replay", help="examine given files", allow_abbrev=False)
    replaying.add_argument("place", type=Path, help="a file, or a folder of them")
    for command in (running, replaying):
        command.add_argument("--kind", choices=KINDS, help="of the files to start from (default: the four containers)")
    args = parser.parse_args()
    if args.command == "replay":
        if not args.place.exists():
            parser.error(f"{args.place} does not exist")
        sys.exit(1 if replay(args.place, args.kind) else 0)
    try:
        import atheris  # noqa: F401
    except ImportError:
        parser.error("atheris is not installed; it lives best in a virtual environment of its own: see --help")
    run(args.folder, args.kind, args.minutes, args.seed)


if __name__ == "__main__":
    main()
