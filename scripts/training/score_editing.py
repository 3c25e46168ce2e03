"""Measure how well a model edits by instruction, and for comparison, what img2img makes of the result's caption.

    python scripts/training/train_editing.py runs/editing
    python scripts/training/score_editing.py runs/editing/model.ckpt scores/editing

The instructions change a thing's colour or shape, or the background's colour, in pictures of one or two things.
Training showed none of the results. An instruction is followed if plain image analysis finds the change and everything
else as it was; the rest is kept if it has a PSNR of 25 dB or more. Writes a table, `editing.md`, and a sheet,
`editing.png`, with pictures above, results below, and red frames around wrong ones.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from PIL import Image, ImageDraw
from score_tiny import framed
from tqdm import tqdm
from training_command import parser_of, save_sheet

import sd
from sd.study.benchmark.table import markdown
from sd.training.shapes.edit_scoring import Edit, EditVerdict, judge, new_edits
from sd.training.shapes.edits import CHANGES, KINDS

SHOWN = 14  # pictures on the sheet
SCENES = {"one thing": ("single",), "one or two": KINDS}  # the sheet shows the last
STRENGTH = 0.8  # of img2img
STRIP = 42  # height of the instruction on the sheet, in pixels: three lines


def line(way: str, scenes: str, change: str, judged: Sequence[EditVerdict]) -> list[str]:
    followed, kept = [each.followed for each in judged], [each.kept for each in judged]
    both = [each.followed and each.kept for each in judged]
    shares = [f"{100 * fmean(values):.0f} %" for values in (followed, kept, both)]
    return [way, scenes, change, str(len(judged)), *shares, f"{fmean(each.psnr for each in judged):.1f} dB"]


def lines(way: str, scenes: str, edits: Sequence[Edit], judged: Sequence[EditVerdict]) -> list[list[str]]:
    rows = [
        line(way, scenes, what, [verdict for edit, verdict in zip(edits, judged, strict=True) if edit.what == what])
        for what in CHANGES
        if any(edit.what == what for edit in edits)
    ]
    return [*rows, line(way, scenes, "any", judged)]


def shown(edit: Edit, result: Image.Image, right: bool) -> Image.Image:
    """The picture, the instruction, and the result, from top to bottom."""
    above, below = framed(edit.picture, True), framed(result, right)
    words = textwrap.fill(edit.instruction, 22)
    sheet = Image.new("RGB", (above.width, above.height + STRIP + below.height), "white")
    ImageDraw.Draw(sheet).multiline_text((4, above.height + 1), words, "black", spacing=2)
    sheet.paste(above, (0, 0))
    sheet.paste(below, (0, above.height + STRIP))
    return sheet


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("model", type=Path, help="a checkpoint with eight channels")
    add("folder", type=Path, help="output folder")
    add("--ordinary", type=Path, help="a checkpoint with four channels (default: the embedded model)")
    add("--count", type=int, default=100, help="instructions (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the instructions (default: %(default)s)")
    add("--steps", type=int, default=20, help="(default: %(default)s)")
    add("--guidance-scale", type=float, default=2.0, help="(default: %(default)s)")
    add("--image-guidance", type=float, default=1.5, help="(default: %(default)s)")
    add("--plain", action="store_true", help="skip img2img")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    model = sd.load(args.model)
    ordinary = None if args.plain else sd.load(args.ordinary)
    scales = {"guidance_scale": args.guidance_scale, "image_guidance": args.image_guidance}
    rows = []
    for scenes, kinds in SCENES.items():
        edits = new_edits(args.count, model.config.native_size, args.seed, kinds)
        results = [
            model.edit(edit.instruction, edit.picture, seed=edit.result.seed, steps=args.steps, **scales)[0]
            for edit in tqdm(edits, desc=f"edit, {scenes}", leave=False)
        ]
        judged = judge(results, edits)
        rows += lines("edit, by instruction", scenes, edits, judged)
        if ordinary:
            others = [
                ordinary.img2img(
                    edit.result.prompt, edit.picture, strength=STRENGTH, seed=edit.result.seed, steps=args.steps
                )[0]
                for edit in tqdm(edits, desc=f"img2img, {scenes}", leave=False)
            ]
            rows.append(line(f"img2img, by caption, strength {STRENGTH}", scenes, "any", judge(others, edits)))
    cells = [
        shown(edit, result, verdict.followed and verdict.kept)
        for edit, result, verdict in list(zip(edits, results, judged, strict=True))[:SHOWN]
    ]
    save_sheet(args.folder / "editing.png", cells, min(SHOWN // 2, args.count), optimize=True)
    header = ["way", "pictures of", "change", "instructions", "followed", "rest kept", "both", "PSNR of the rest"]
    written = markdown(header, rows)
    (args.folder / "editing.md").write_text(written)
    print(written, end="")


if __name__ == "__main__":
    main()
