"""Compare the two ways of inpainting: an inpainting network, and an ordinary network with blended latents.

    python scripts/training/train_inpainting.py runs/inpainting
    python scripts/training/score_inpainting.py runs/inpainting/model.ckpt scores/inpainting

Pictures show one thing, fully masked; prompts ask for another in its place. Plain image analysis checks the results:
one thing, of the right colour and shape, on the old background. Writes a table, `inpainting.md`, and a sheet,
`inpainting.png`, with one row each for the picture, the masked picture, the ordinary network's result and the
inpainting network's; wrong results have a red frame.
"""

from pathlib import Path

from PIL import Image
from score_tiny import framed, table
from tqdm import tqdm
from training_command import parser_of, save_sheet

import sd
from sd.training.shapes.scoring import Repaint, other_things, shares, verdicts

SHOWN = 12  # columns of the sheet


def masked(repaint: Repaint) -> Image.Image:
    picture = repaint.picture.copy()
    picture.paste("grey", mask=repaint.mask)
    return picture


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("model", type=Path, help="a checkpoint with nine channels")
    add("folder", type=Path, help="output folder")
    add("--ordinary", type=Path, help="a checkpoint with four channels (default: the embedded model)")
    add("--count", type=int, default=112, help="pictures (default: %(default)s)")
    add("--steps", type=int, default=20, help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    models = {"ordinary network, blending": args.ordinary, "network for inpainting": args.model}
    args.folder.mkdir(parents=True, exist_ok=True)
    rows, sheet = [], []
    for what, path in models.items():
        model = sd.load(path)
        repaints = other_things(args.count, model.config.native_size)
        requests = [each.request for each in repaints]
        pictures = [
            model.inpaint(each.request.prompt, each.picture, each.mask, seed=each.request.seed, steps=args.steps)[0]
            for each in tqdm(repaints, desc=what, leave=False)
        ]
        judged = list(verdicts(pictures, requests))
        rows.append({"prompts": "another thing", "settings": what, "pictures": len(judged), "right": shares(judged)})
        if not sheet:
            sheet += [framed(each.picture, True) for each in repaints[:SHOWN]]
            sheet += [framed(masked(each), True) for each in repaints[:SHOWN]]
        sheet += [framed(one, verdict.all) for one, verdict in zip(pictures[:SHOWN], judged[:SHOWN], strict=True)]
    save_sheet(args.folder / "inpainting.png", sheet, min(SHOWN, args.count), optimize=True)
    (args.folder / "inpainting.md").write_text(table(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
