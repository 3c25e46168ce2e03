"""Measure how well the small model follows prompts that were held out of its training.

    python scripts/training/score_tiny.py scores/                         # the embedded model
    python scripts/training/score_tiny.py scores/ --model runs/tiny/model.ckpt --relations 0

Two sets of prompts: one thing on a background, and two things in a relation. Each also runs with guidance 1 and, as a
control, with the words' vectors shuffled. Plain image analysis judges the pictures. Writes a table, `scores.md`,
`scores.json`, and a contact sheet of each set, with red frames around wrong pictures.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm
from training_command import parser_of, save_sheet

import sd
from sd.pipeline.settings import Settings
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.study.benchmark.table import markdown
from sd.training.shapes.scoring import MEASURES, Request, one_thing, shares, shuffle_words, two_things, verdicts

BATCH = 32


def make(model: StableDiffusion, requests: list[Request], common: dict) -> list[Image.Image]:
    given = {name: value for name, value in common.items() if value is not None}
    jobs = [model.settings_for(each.prompt, seed=each.seed, **given) for each in requests]
    pictures = []
    for start in tqdm(range(0, len(jobs), BATCH), unit="batch", leave=False):
        pictures += model.make(jobs[start : start + BATCH])
    return pictures


def framed(picture: Image.Image, right: bool) -> Image.Image:
    return ImageOps.expand(picture, 2, "white" if right else "#d00000")


def table(rows: list[dict], measures: Sequence[str] = MEASURES) -> str:
    lines = []
    for row in rows:
        values = [f"{100 * row['right'][name]:.1f} %" if name in row["right"] else "" for name in measures]
        lines.append([row["prompts"], row["settings"], str(row["pictures"]), *values])
    return markdown(["prompts", "settings", "pictures", *measures], lines)


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="output folder")
    add("--model", type=Path, help="a checkpoint (default: the embedded model)")
    add("--lora", type=Path, help="an adapter, such as one for few steps")
    add("--repeats", type=int, default=4, help="pictures of each of the 56 combinations (default: %(default)s)")
    add("--relations", type=int, default=20, help="pictures of each of the 5 relations (default: %(default)s)")
    add("--sampler", default=Settings.sampler, metavar="NAME", help="(default: %(default)s)")
    add("--schedule", metavar="NAME", help="(default: the sampler's own)")
    add("--steps", type=int, metavar="N", help="(default: as in sd txt2img)")
    add("--guidance-scale", type=float, metavar="SCALE", help="(default: as in sd txt2img)")
    add("--precision", default="auto", help="of the networks (default: auto)")
    add("--intervals", default="", metavar="A-B,...", help="also with guidance only at noise levels from A to B")
    add("--plain", action="store_true", help="skip the controls")
    args = parser.parse_args(arguments)
    model = sd.load(args.model, precision=args.precision)
    model.apply([args.lora] if args.lora else [])
    args.folder.mkdir(parents=True, exist_ok=True)
    sets = {"one thing": one_thing(args.repeats), "two things": two_things(args.relations)}
    given = {"sampler": args.sampler, "schedule": args.schedule, "steps": args.steps}
    if args.guidance_scale is not None:
        given["guidance_scale"] = args.guidance_scale
    runs = {"default": given}
    for interval in args.intervals.split(",") if args.intervals else ():
        levels = tuple(float(level) for level in interval.split("-"))
        runs[f"guided at sigma {interval}"] = {**given, "guidance_interval": levels}

    if not args.plain:
        runs |= {"guidance 1": {**given, "guidance_scale": 1.0}, "shuffled words": given}
    rows = []
    for settings, common in runs.items():
        if settings == "shuffled words":
            for text_encoder in filter(None, (model.text_encoder, model.text_encoder_2)):
                shuffle_words(text_encoder, seed=0)  # in the same order
        for name, requests in sets.items():
            if not requests:
                continue
            pictures = make(model, requests, common)
            judged = list(verdicts(pictures, requests))
            rows.append({"prompts": name, "settings": settings, "pictures": len(judged), "right": shares(judged)})
            if settings == "default":
                right = [verdict.all for verdict in judged]
                sheet = [framed(*each) for each in zip(pictures, right, strict=True)]
                save_sheet(args.folder / f"{name.replace(' ', '-')}.png", sheet, 16, optimize=True)
                wrong = [each.prompt for each, good in zip(requests, right, strict=True) if not good]
                (args.folder / f"{name.replace(' ', '-')}-wrong.txt").write_text("".join(f"{each}\n" for each in wrong))
    (args.folder / "scores.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.folder / "scores.md").write_text(table(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
