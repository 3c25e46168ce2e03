"""`sd diff`: which tensors of two files differ, and by how much."""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from convert.errors import counted, shown, shown_list
from convert.families.family import COMPONENTS
from sd.app.cli.parser import Parser
from sd.app.cli.terminal import progress_bar

if TYPE_CHECKING:
    from convert.actions.diff import Block, Change, Diff

SAME, DIFFERENT = 0, 1
BAR = 30  # characters of the longest bar
MOST_ROWS = 40  # of one network
MOST_GROUPS = 6  # of names
TITLES = COMPONENTS | {"ema": "EMA of the UNet", "other": "others"}


def parser() -> Parser:
    parser = Parser(
        prog="sd diff",
        description="Compare the tensors of two checkpoints: which are in one file only, which differ, and\n"
        "by how much, block by block: |a - b| / |a|. Layouts and containers may differ; if both\n"
        "files hold a complete model, tensors have their names in the original layout.",
        epilog="examples:\n"
        "  sd diff v1-5-pruned.ckpt v1-5-pruned-emaonly.ckpt\n"
        "  sd diff model.ckpt model-fp16.safetensors    # only rounding?\n\n"
        "exit codes: 0 the same tensors, bit for bit; 1 they differ; 2 a file cannot be read",
    )
    parser.add_argument("first", type=Path, metavar="A")
    parser.add_argument("second", type=Path, metavar="B")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a page")
    parser.add_argument("--keys", action="store_true", help="list every tensor that differs")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    return parser


def run(args: argparse.Namespace) -> int:
    from convert.actions.diff import diff

    with progress_bar("comparing", args.quiet) as bar:
        found = diff(args.first, args.second, on_start=bar.reset, on_bytes=bar.update)
    if args.json:
        print(json.dumps(as_data(found, args.first, args.second)))
    else:
        print("\n".join(page(found, args.first, args.second, keys=args.keys)))
    return SAME if found.is_same else DIFFERENT


def as_data(found: "Diff", first: Path, second: Path) -> dict:
    """For JSON, which has no infinity: null is a difference from a tensor of zeros, or one beyond float64."""

    def change_data(change: "Change") -> dict:
        data = asdict(change) | {"relative": change.relative}
        return {name: value if math.isfinite(value) else None for name, value in data.items()}

    return asdict(found) | {
        "first": str(first),
        "second": str(second),
        "is_same": found.is_same,
        "only_rounding": found.is_rounding,
        "changed": {name: change_data(change) for name, change in found.changed.items()},
        "blocks": [asdict(block) | {"change": change_data(block.change)} for block in found.blocks],
    }


def page(found: "Diff", first: Path, second: Path, *, keys: bool = False) -> Iterator[str]:
    yield from (f"A  {shown(str(first))}", f"B  {shown(str(second))}", "")
    yield from verdict(found)
    for part in () if found.is_rounding else TITLES:
        yield from chart(TITLES[part], [block for block in found.blocks if block.part == part])
    if keys:
        yield from names(found)


def verdict(found: "Diff") -> Iterator[str]:
    """The result of the comparison, in sentences."""
    total = found.same + len(found.changed)
    rounding = ", ".join(f"{number} {dtypes}" for dtypes, number in found.dtypes.items())
    if found.is_same:
        yield f"The same: {counted(found.same, 'tensor')}, bit for bit."
    elif found.is_rounding:
        yield f"Only the precision differs: {rounding}. Every number equals the other one, rounded to nearest."
        largest = max(found.changed.values(), key=lambda change: change.relative)
        yield f"The largest |a - b| / |a| of a tensor is {largest.relative:.2e}."
    else:
        yield f"{len(found.changed)} of {counted(total, 'tensor')} in both differ, {found.same} are the same."
        rounded = sum(change.rounding for change in found.changed.values())
        if rounded:
            yield f"{rounded} of them differ only by rounding ({rounding})."
    for side, other in (("first", "A"), ("second", "B")):
        if side in found.averages:
            whose = "B" if other == "A" else "A"
            yield f"{other}'s UNet is the training average (EMA) that {whose} holds in addition to its own."
    if not found.understood:
        yield "At least one file is not a complete, known model; tensors are compared by their names in the files."
    for label, side in (("only in A", found.removed), ("only in B", found.added)):
        if side:
            yield f"{label}: {counted(len(side), 'tensor')}: {grouped(side)}"
    for name, (a, b) in list(found.shapes.items())[:8]:
        yield f"different shapes: {shown(name)}: {list(a)} and {list(b)}"
    bad = {name: change.not_finite for name, change in found.changed.items() if change.not_finite}
    if bad:
        yield f"NaN or infinite in either file: {counted(len(bad), 'tensor')}: {shown_list(list(bad))}"
    if found.not_compared:
        yield (
            f"not compared: {counted(len(found.not_compared), 'tensor')} outside the model, which the other layout "
            f"cannot hold: {grouped(found.not_compared)}"
        )


def grouped(names: tuple[str, ...]) -> str:
    """Many names in a few words: "686 model_ema.*, betas"."""
    groups = Counter(name.partition(".")[0] + ("." if "." in name else "") for name in names)
    words = [f"{number} {shown(start, 40)}*" for start, number in groups.most_common() if start.endswith(".")]
    words += [shown(start, 40) for start in groups if not start.endswith(".")]
    more = len(words) - MOST_GROUPS
    return ", ".join(words[:MOST_GROUPS]) + (f" and {more} more" if more > 0 else "")


def chart(title: str, blocks: "list[Block]") -> Iterator[str]:
    """One bar per block: its difference, relative to the largest of the network."""
    if not blocks:
        return
    rows = blocks
    if len(blocks) > MOST_ROWS:
        largest = sorted(blocks, key=lambda block: block.change.relative)[-MOST_ROWS:]
        rows = [block for block in blocks if block in largest]
    yield ""
    yield f"{title}: |a - b| / |a| by block"
    longest = max((block.change.relative for block in rows if math.isfinite(block.change.relative)), default=0.0)
    width = max(len(shown(block.name, 40)) for block in rows)
    try:
        mark = "█"
        mark.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        mark = "#"
    for block in rows:
        relative = block.change.relative
        length = BAR if not math.isfinite(relative) else round(BAR * relative / longest) if longest else 0
        few = f"  {block.changed} of {block.tensors} tensors" if block.changed < block.tensors else ""
        yield f"  {shown(block.name, 40):<{width}}  {relative:8.2e}  {mark * max(length, relative > 0)}{few}".rstrip()
    if len(rows) < len(blocks):
        yield f"  and {len(blocks) - len(rows)} blocks with smaller differences"


def names(found: "Diff") -> Iterator[str]:
    yield ""
    for mark, names in (("-", found.removed), ("+", found.added), ("s", found.shapes)):
        yield from (f"{mark} {shown(name)}" for name in names)
    for name, change in found.changed.items():
        yield f"{'r' if change.rounding else '~'} {shown(name)}  {change.relative:.2e}"
