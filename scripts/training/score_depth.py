"""Score depth to image, and image to image for comparison: are the asked colours where the depth map has its things?

    python scripts/training/train_depth.py runs/depth
    python scripts/training/score_depth.py runs/depth/model.ckpt scores/depth

Each scene has a picture and a depth map; the prompt asks for the same things in other colours. Plain image analysis
finds the region in each asked colour, and compares it with the thing's region: intersection over union (IoU), of two
things the lower one. Writes a table, `depth.md`, and a sheet, `depth.png`: one row each for the pictures, the maps,
image to image, and depth to image, at the first strength; results with an IoU below 0.8 have a red frame.
"""

from functools import partial
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from score_tiny import framed
from tqdm import tqdm
from training_command import parser_of, save_sheet

import sd
from sd.pipeline.image.depth_maps import colour_picture
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.study.benchmark.table import markdown
from sd.training.shapes.recolouring import Recolouring, overlap, recolourings
from sd.training.shapes.scenes import KINDS

SHOWN = 4  # columns of the sheet for each kind of scenes
ENOUGH = 0.8  # IoU of a right picture


def change(model: StableDiffusion, each: Recolouring, **options: object) -> Image.Image:
    return model.img2img(each.prompt, each.picture, seed=each.seed, **options)[0]


def change_with_depth(model: StableDiffusion, each: Recolouring, **options: object) -> Image.Image:
    return model.depth2img(each.prompt, each.picture, each.depth, seed=each.seed, **options)[0]


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
    tasks = {"image to image": partial(change, ordinary), "depth to image": partial(change_with_depth, model)}
    rows, sheet = [], {row: [] for row in ("pictures", "maps", *tasks)}
    for kind in args.kinds:
        scenes = recolourings(args.count, model.config.native_size, kind=kind)
        for each in scenes[:SHOWN]:
            sheet["pictures"].append(framed(each.picture, True))
            coloured = colour_picture(torch.from_numpy(each.depth)[None, None], each.picture.size)
            sheet["maps"].append(framed(coloured, True))
        for strength, task in product(args.strengths, tasks):
            found = []
            for each in tqdm(scenes, desc=f"{kind}, {task}, strength {strength:g}", leave=False):
                picture = tasks[task](each, strength=strength, **options)
                found.append(overlap(picture, each.asked))
                if len(found) <= SHOWN and strength == args.strengths[0]:
                    sheet[task].append(framed(picture, found[-1] >= ENOUGH))
            enough = np.mean(np.array(found) >= ENOUGH)
            rows.append(
                [kind, task, f"{strength:g}", str(len(found)), f"{np.mean(found):.3f}", f"{100 * enough:.0f} %"]
            )
    save_sheet(args.folder / "depth.png", list(chain(*sheet.values())), len(sheet["pictures"]), optimize=True)
    table = markdown(["scenes", "task", "strength", "pictures", "mean IoU", f"at least {ENOUGH}"], rows)
    (args.folder / "depth.md").write_text(table)
    print(table, end="")


if __name__ == "__main__":
    main()
