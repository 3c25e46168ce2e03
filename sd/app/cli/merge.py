"""`sd merge`: a weighted sum of checkpoints."""

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from convert.actions.writing import PRECISIONS
from convert.errors import counted, joined, shown
from convert.families.family import COMPONENTS
from sd.app.cli.convert import MISMATCH, WRITTEN, add_layout_flag, converted, report
from sd.app.cli.flags import add_output_flags, numbers
from sd.app.cli.parser import Parser
from sd.app.errors import UsageError
from sd.app.jobs.model_folder import find

if TYPE_CHECKING:
    from convert.actions.merge import Merging

USUAL = {2: 0.5, 3: 1.0}  # --weight, by how many models are given


def parser() -> Parser:
    parser = Parser(
        prog="sd merge",
        description="Merge checkpoints. Two models give their weighted sum, A + w (B - A). Three add a difference,\n"
        "A + w (B - C), such as what a fine-tune B learned from its base C. The VAE is that of A.\n"
        "Sums are computed in float32, tensor by tensor.",
        epilog="examples:\n"
        "  sd merge photo.ckpt painting.ckpt -o both.safetensors --weight 0.3\n"
        "  sd merge v1-5-inpainting.ckpt tuned.ckpt v1-5.ckpt -o tuned-inpainting.ckpt\n\n"
        "exit codes: 0 written; 1 --verify found a difference, and removed the file;\n"
        "2 a model cannot be read, they do not fit together, or OUT cannot be written",
    )
    # fmt: off
    add = parser.add_argument
    add("first", type=Path, metavar="A", help="the model that is changed; one for inpainting stays one")
    add("second", type=Path, metavar="B", help="the model that is added")
    add("third", type=Path, nargs="?", metavar="C", help="the model that is subtracted from B")
    add("-o", "--out", type=Path, required=True, metavar="OUT",
        help=".safetensors; .ckpt, a pickle in the original layout; or, with --to diffusers, a folder")
    add("-w", "--weight", "--alpha", "--multiplier", type=float, metavar="W",
        help="how much of B, or of the difference: 0 none, 1 all (default: 0.5; 1 for a difference)")
    add("--block-weights", type=numbers, metavar="W,W,...",
        help="a weight for each block of the UNet: IN00 to IN11, M00, OUT00 to OUT11 (XL: to IN08 and OUT08); text "
        "encoders have --weight, or one more number in front")
    add("--vae", type=Path, metavar="FILE", help="use the VAE in FILE in place of A's")
    add_layout_flag(parser, "A")
    add("--precision", choices=["keep", *PRECISIONS], default="keep",
        help="convert all tensors to it (default: keep that of A)")
    add("--verify", action="store_true", help="read OUT back and compare every number with its sum, computed again")
    add("--no-hash", action="store_true",
        help="do not read the models for their sha256, which OUT notes; known ones are noted anyway")
    # fmt: on
    add_output_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from convert.actions.merge import Merging, Share

    first, second, third = (path and find(path) for path in (args.first, args.second, args.third))
    weight = USUAL[3 if third else 2] if args.weight is None else args.weight
    blocks = args.block_weights or ()
    if not all(map(math.isfinite, (weight, *blocks))):
        raise UsageError("--weight and --block-weights must be finite numbers, such as 0.3.")
    if len(blocks) % 2 == 0 and blocks:  # a UNet has a block in the middle, so an even number includes the base
        if args.weight is not None:
            raise UsageError(f"the first of {len(blocks)} --block-weights is for the text encoder: leave out --weight.")
        weight, *blocks = blocks
    merging = Merging(second, third, Share(weight, tuple(blocks)), hashed=not args.no_hash)
    done = converted(args, first, args.out, "merging", changing=merging)
    if not done:
        return MISMATCH
    report(done, first, merged_lines(merging, first, args.vae), quiet=args.quiet)
    print(args.out)
    return WRITTEN


def merged_lines(merging: "Merging", first: Path, vae: Path | None) -> Iterator[str]:
    """Which tensors are new, and which are those of the first model or of another VAE."""
    yield f"merged: {by_network(merging.merged)}"
    if merging.channels:
        stay = "stays as it is" if merging.channels == 1 else "stay as they are"
        yield f"the {counted(merging.channels, 'channel')} that only {shown(first.name)} reads {stay}"
    if merging.kept:
        whose = f"{shown(vae.name)} and {shown(first.name)}" if vae else shown(first.name)
        yield f"kept from {whose}: {by_network(merging.kept)}"


def by_network(tensors: Mapping[str, int]) -> str:
    """ "686 tensors of the UNet and 196 tensors of the text encoder" """
    found = {part: words for part, words in COMPONENTS.items() if tensors.get(part)}
    return joined([f"{counted(tensors[part], 'tensor')} of the {words}" for part, words in found.items()])
