"""Measure what an adapter for the small model does: how often its subject is drawn, and whether all else stays right.

    python scripts/training/score_adapters.py scores/ --lora weights/crescent.safetensors --subject crescent
    python scripts/training/score_adapters.py scores/ --embedding weights/pinstripe.safetensors --subject pinstripe

Each set of prompts runs with the adapter and without: the subject in pairs of colours that its training never showed,
and for a LoRA the eight shapes, as in score_tiny.py. Plain image analysis judges the pictures. Writes a table,
`adapters.md`, and a contact sheet of each set, with red frames around wrong pictures.
"""

from pathlib import Path

from score_tiny import framed, make, table
from training_command import parser_of, run, save_sheet

import sd
from sd.training.shapes.scoring import LOOKS, MEASURES, one_thing, shares, subjects, verdicts


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="output folder")
    add("--model", type=Path, help="a checkpoint (default: the embedded model)")
    add("--lora", type=Path, help="the adapter")
    add("--embedding", type=Path, help="or the embedding")
    add("--subject", default="crescent", help="what it is for: a shape, or a look (default: %(default)s)")
    add("--strength", type=float, default=1.0, help="of the LoRA (default: %(default)s)")
    add("--count", type=int, default=50, help="pictures of the subject (default: %(default)s)")
    add("--repeats", type=int, default=1, help="pictures of each of the 56 other combinations (default: %(default)s)")
    add("--steps", type=int, metavar="N", help="(default: as in sd txt2img)")
    add("--precision", default="auto", help="of the networks (default: auto)")
    args = parser.parse_args(arguments)
    if bool(args.lora) == bool(args.embedding):
        raise ValueError("give either --lora or --embedding")
    model = sd.load(args.model, precision=args.precision)
    args.folder.mkdir(parents=True, exist_ok=True)
    sets = {args.subject: subjects(args.subject, args.count)}
    if args.lora and args.repeats:
        sets["one thing"] = one_thing(args.repeats)
    rows = []
    for adapted in (False, True):
        settings = "with" if adapted else "without"
        if args.lora:
            model.apply([(args.lora, args.strength)] if adapted else [])
        else:
            model.learn([args.embedding] if adapted else [])
        for name, requests in sets.items():
            pictures = make(model, requests, {"steps": args.steps})
            judged = list(verdicts(pictures, requests))
            right = [verdict.all for verdict in judged]
            found = shares(judged)
            if name in LOOKS:
                right = [LOOKS[name](picture) for picture in pictures]
                found["look"] = sum(right) / len(right)
            rows.append({"prompts": name, "settings": settings, "pictures": len(judged), "right": found})
            sheet = [framed(*each) for each in zip(pictures, right, strict=True)]
            save_sheet(args.folder / f"{name.replace(' ', '-')}-{settings}.png", sheet, 10, optimize=True)
    (args.folder / "adapters.md").write_text(table(rows, (*MEASURES, "look")))
    print(table(rows, (*MEASURES, "look")), end="")


if __name__ == "__main__":
    run(main)
