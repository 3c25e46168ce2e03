"""`sd extract`: the difference between two models as a LoRA."""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from convert.actions.writing import PRECISIONS
from convert.adapters.spellings import SPELLINGS
from convert.errors import counted, joined, shown
from convert.families.family import COMPONENTS
from sd.app.cli import say
from sd.app.cli.flags import add_output_flags, whole_number
from sd.app.cli.parser import Parser
from sd.app.cli.terminal import aligned, progress_bar
from sd.app.jobs.model_folder import find

if TYPE_CHECKING:
    from convert.actions.extraction import Extraction, Sums

WRITTEN, SAME = 0, 1


def parser() -> Parser:
    parser = Parser(
        prog="sd extract",
        description="Write the difference between two checkpoints as a LoRA: added to A, it gives B, as closely as\n"
        "its rank allows. The error is measured on what is written, block by block.",
        epilog="examples:\n"
        "  sd extract v1-5-pruned-emaonly.ckpt tuned.safetensors -o tuned-lora.safetensors\n"
        "  sd extract base.ckpt tuned.ckpt -o lora.safetensors --rank 64 --conv-rank 16\n\n"
        "exit codes: 0 written; 1 there is no difference that a LoRA could hold, and nothing was written;\n"
        "2 a file cannot be read or written",
    )
    # fmt: off
    add = parser.add_argument
    add("first", type=Path, metavar="A", help="the model that the LoRA is for")
    add("second", type=Path, metavar="B", help="the model that A becomes with it")
    add("-o", "--out", type=Path, required=True, metavar="OUT", help="a .safetensors; for PEFT's spelling, a folder")
    add("-r", "--rank", "--dim", type=whole_number(1), default=16, metavar="N",
        help="of linear layers; a higher rank comes closer to B and takes a larger file (default: 16)")
    add("--conv-rank", "--conv_dim", type=whole_number(0), metavar="N",
        help="of convolutions; 0 leaves them out (default: as --rank)")
    add("--weights", choices=["auto", "model", "ema"], default="auto",
        help="which UNet weights of B, if it has both: its own, or their average over the training (default: auto, its "
        "own)")
    add("--full", action="store_true",
        help="also write the differences of biases and norms, in full; some programs cannot read them")
    add("--precision", choices=[*PRECISIONS], default="fp16", help="of the LoRA (default: fp16)")
    add("--spelling", choices=SPELLINGS, default="kohya", help="whose names the tensors have (default: kohya)")
    add("--json", action="store_true", help="one JSON object with the errors instead of the path of OUT")
    # fmt: on
    add_output_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from convert.actions.extract import extract  # imports torch

    first, second = find(args.first), find(args.second)
    with progress_bar("comparing", args.quiet) as bar:
        found = extract(
            first,
            second,
            args.out,
            rank=args.rank,
            conv_rank=args.conv_rank,
            full=args.full,
            weights=args.weights,
            precision=args.precision,
            spelling=args.spelling,
            force=args.force,
            on_start=bar.reset,
            on_bytes=bar.update,
        )
    for note in found.notes:
        say(f"{shown(second.name)} {note}")
    for line in not_held(found):
        say(line)
    if found.rounded:
        number = counted(found.rounded, "tensor")
        say(f"{number} differ by their precision only, and are left out", quiet=args.quiet)
    if not found.tensors:
        same = "differ in no layer that a LoRA could hold" if found.not_held or found.vae else "do not differ"
        say(f"{shown(first.name)} and {shown(second.name)} {same}: nothing is written.")
        return SAME
    say("\n".join(table(found)), quiet=args.quiet)
    print(json.dumps(as_data(found, args.out)) if args.json else args.out)
    return WRITTEN


def table(found: "Extraction") -> Iterator[str]:
    """How far apart the models are, block by block, and what share of that the LoRA lacks."""
    rows = [("", "layers", "B - A", "left out")]
    for (part, block), sums in found.blocks.items():
        rows.append((f"{COMPONENTS[part]} {block}", *numbers(sums)))
    rows.append(("together", *numbers(found.held)))
    yield "differences relative to A, and what the LoRA lacks of them, as norms:"
    yield from (f"  {line}" for line in aligned(rows, "<>>>"))
    if found.not_held:
        yield f"with what it does not hold, it lacks {found.whole.error:.2%} of the difference"


def numbers(sums: "Sums") -> tuple[str, str, str]:
    return str(sums.tensors), f"{sums.relative_change:.2e}", f"{sums.error:.2%}"


def not_held(found: "Extraction") -> Iterator[str]:
    """What differs and is not in the LoRA."""
    if found.not_held:
        kinds = joined([plural(sums.tensors, kind) for kind, sums in found.not_held.items()])
        advice = "; --full writes biases and norms" if {"bias", "norm"} & found.not_held.keys() else ""
        yield f"not in the LoRA, though they differ: {kinds}{advice}"
    if found.vae:
        yield f"the VAE differs, too, in {counted(found.vae, 'tensor')}, which no LoRA changes: use --vae with B's"


def plural(number: int, kind: str) -> str:
    """ "2 biases" """
    noun, _, more = kind.partition(" ")
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{ending} {more}".rstrip()


def as_data(found: "Extraction", out: Path) -> dict:
    def sums_data(sums: "Sums") -> dict:
        values = asdict(sums) | {"error": sums.error, "relative_change": sums.relative_change}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    return {
        "path": str(out),
        "tensors": found.tensors,
        "blocks": [{"part": part, "name": name, **sums_data(sums)} for (part, name), sums in found.blocks.items()],
        "together": sums_data(found.held),
        "not_held": {kind: sums_data(sums) for kind, sums in found.not_held.items()},
        "with_not_held": sums_data(found.whole),
        "vae": found.vae,
        "only_rounding": found.rounded,
    }
