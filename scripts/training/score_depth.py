"""Score depth to image, and image to image for comparison: are the asked colours where the depth map has its things?

    python scripts/training/train_depth.py runs/depth
    python scripts/training/score_depth.py runs/depth/model.ckpt scores/depth

Each scene has a picture and a depth map; the prompt asks for the same things in other colours. Plain image analysis
finds the region in each asked colour, and compares it with the thing's region: intersection over union (IoU), of two
things the lower one. Writes a table, `depth.md`, and a sheet, `depth.png`: the pictures, the maps, and a row for each
line of the table, with red frames where the IoU is below 0.8.
"""

from itertools import product
from pathlib import Path

import numpy as np
import torch
from score_tiny import framed
from tqdm import tqdm
from training_command import parser_of, save_sheet

import sd
from sd.pipeline.image.depth_maps import colour_picture
from sd.study.benchmark.table import markdown
from sd.training.shapes.recolouring import overlap, recolourings
from sd.training.shapes.scenes import KINDS

SHOWN = 12  # columns of the sheet
ENOUGH = 0.8  # IoU of a right picture


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("model", type=Path, help="a checkpoint with five channels")
    add("folder", type=Path, help="output folder")
    add("--ordinary", type=Path, help="a checkpoint with four channels (default: the embedded model)")
    add("--count", type=int, default=100, help="scenes (default: %(default)s)")
    add("--steps", type=int, default=20, help="(default: %(default)s)")
    add("--strengths", type=float, nargs="+", default=(0.8, 1.0), help="(default: 0.8 1)")
    add("--guidance-scale", type=float, default=2.0, help="(default: %(default)s)")
    add("--kinds", nargs="+", choices=KINDS, default=("single", "all"),
        help="of scenes: one thing, not small; one or two things of any size (default: single all)")  # fmt: skip
    args = parser.parse_args(arguments)
    ordinary, model = sd.load(args.ordinary), sd.load(args.model)
    args.folder.mkdir(parents=True, exist_ok=True)
    options = {"steps": args.steps, "guidance_scale": args.guidance_scale}
    rows, sheet = [], []
    for kind in args.kinds:
        scenes = recolourings(args.count, model.config.native_size, kind=kind)
        shown = scenes[:SHOWN]
        maps = [colour_picture(torch.from_numpy(each.depth)[None, None], each.picture.size) for each in shown]
        sheet += [framed(picture, True) for picture in (*(each.picture for each in shown), *maps)]
        for strength, what in product(args.strengths, ("image to image", "depth to image")):
            found = []
            for each in tqdm(scenes, desc=f"{kind}, {what}, strength {strength:g}", leave=False):
                given = (each.prompt, each.picture)
                made = (
                    model.depth2img(*given, each.depth, strength=strength, seed=each.seed, **options)
                    if what == "depth to image"
                    else ordinary.img2img(*given, strength=strength, seed=each.seed, **options)
                )
                found.append(overlap(made[0], each.asked))
                if len(found) <= SHOWN:
                    sheet.append(framed(made[0], found[-1] >= ENOUGH))
            enough = np.mean(np.array(found) >= ENOUGH)
            rows.append(
                [kind, what, f"{strength:g}", str(len(found)), f"{np.mean(found):.3f}", f"{100 * enough:.0f} %"]
            )
    save_sheet(args.folder / "depth.png", sheet, min(SHOWN, args.count), optimize=True)
    table = markdown(["scenes", "task", "strength", "pictures", "mean IoU", f"at least {ENOUGH}"], rows)
    (args.folder / "depth.md").write_text(table)
    print(table, end="")


if __name__ == "__main__":
    main()
