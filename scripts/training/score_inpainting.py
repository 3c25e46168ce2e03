"""Compare the two ways of inpainting: a network that is shown what is kept, and an ordinary one with blending.

    python scripts/training/train_inpainting.py runs/inpainting
    python scripts/training/score_inpainting.py runs/inpainting/model.ckpt scores/inpainting

Pictures of one thing, all of it masked, and prompts for another one in its place. What the results show is found by
plain image analysis: whether there is one thing, of the colour and shape asked for, on the old background. Written are
a table, `inpainting.md`, and a sheet, `inpainting.png`: by rows the picture, the masked picture, the ordinary network's
result, and that of the network for inpainting; wrong results have a red frame.
"""

import argparse
from pathlib import Path

from PIL import Image
from score_tiny import framed, table
from tqdm import tqdm

import sd
from sd.files import written_whole
from sd.pipeline.image.tensors import contact_sheet
from sd.training.shapes.scoring import Repaint, other_things, shares, verdicts

SHOWN = 12  # columns of the sheet


def masked(repaint: Repaint) -> Image.Image:
    picture = repaint.picture.copy()
    picture.paste("grey", mask=repaint.mask)
    return picture


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", type=Path, help="a checkpoint of nine channels")
    add("folder", type=Path, help="where the results are written to")
    add("--ordinary", type=Path, help="a checkpoint of four channels (default: the one that comes with the package)")
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
    with written_whole(args.folder / "inpainting.png", force=True) as file:
        contact_sheet(sheet, min(SHOWN, args.count)).save(file, "PNG", optimize=True)
    (args.folder / "inpainting.md").write_text(table(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
