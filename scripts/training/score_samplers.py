"""Measure every sampler on the small model: the share of right pictures, by schedule and by number of steps.

    python scripts/training/score_samplers.py scores/samplers     # the embedded model; an hour or two
    python scripts/training/score_samplers.py scores/samplers --prompts 8 --steps 5,20 --samplers ddim,dpmpp_2m

Prompts ask for one thing on a background, in combinations that training never showed. First every sampler runs with its
own schedule at each number of steps, then with every schedule at one number. A picture is right if plain image analysis
finds the right shape and colours. Writes `samplers.md`, `samplers.json` and `samplers.png`; a stopped run resumes from
`samplers.json`.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure
from score_tiny import make
from tqdm import tqdm
from training_command import parser_of

import sd
from sd.files import written_whole
from sd.sampling.names import SAMPLER_INFO, SCHEDULES
from sd.study.benchmark.table import markdown
from sd.training.shapes.scoring import one_thing, shares, verdicts

STEPS = (5, 10, 20, 30, 50)
AT = 20  # steps at which the schedules are compared


def names(text: str) -> list[str]:
    return text.split(",")


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def page(found: dict[str, float], samplers: list[str], steps: list[int], schedules: list[str]) -> str:
    """Two tables: by steps, and by schedule."""
    by_steps = [
        [
            name,
            SAMPLER_INFO[name].schedule,
            *(percent(found.get(f"{name} {SAMPLER_INFO[name].schedule} {count}")) for count in steps),
        ]
        for name in samplers
    ]
    by_schedule = [[name, *(percent(found.get(f"{name} {each} {AT}")) for each in schedules)] for name in samplers]
    return (
        "Right pictures by number of steps, each sampler with its own schedule:\n\n"
        + markdown(["sampler", "schedule", *map(str, steps)], by_steps)
        + f"\nBy schedule, {AT} steps:\n\n"
        + markdown(["sampler", *schedules], by_schedule)
    )


def plot(found: dict[str, float], samplers: list[str], steps: list[int]) -> Figure:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    styles = ("-", "--", ":")
    for index, name in enumerate(samplers):
        points = [(count, found.get(f"{name} {SAMPLER_INFO[name].schedule} {count}")) for count in steps]
        points = [(count, 100 * share) for count, share in points if share is not None]
        axes.plot(*zip(*points, strict=True), styles[index // 10], marker=".", label=name)
    axes.set(xlabel="steps", ylabel="right pictures, %", xscale="log", xticks=steps, xticklabels=map(str, steps))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=8)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="output folder")
    add("--model", type=Path, help="a checkpoint (default: the embedded model)")
    add("--prompts", type=int, default=28, help="1 to 56 (default: %(default)s)")
    add("--samplers", type=names, default=list(SAMPLER_INFO), help="separated by commas (default: all)")
    add("--schedules", type=names, default=list(SCHEDULES), help="separated by commas (default: all)")
    add("--steps", type=names, default=list(map(str, STEPS)), help="separated by commas (default: 5,10,20,30,50)")
    args = parser.parse_args(arguments)
    steps = [int(count) for count in args.steps]
    model = sd.load(args.model)
    requests = one_thing(1)[:: max(1, 56 // args.prompts)][: args.prompts]
    args.folder.mkdir(parents=True, exist_ok=True)
    results = args.folder / "samplers.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    wanted = [(name, SAMPLER_INFO[name].schedule, count) for name in args.samplers for count in steps]
    wanted += [(name, schedule, AT) for name in args.samplers for schedule in args.schedules]
    for sampler, schedule, count in tqdm(list(dict.fromkeys(wanted)), unit="setting"):
        key = f"{sampler} {schedule} {count}"
        if key in found:
            continue
        pictures = make(model, requests, {"sampler": sampler, "schedule": schedule, "steps": count})
        found[key] = shares(list(verdicts(pictures, requests)))["all"]
        with written_whole(results, force=True) as file:
            file.write(json.dumps(found, indent=1).encode() + b"\n")
    text = page(found, args.samplers, steps, args.schedules)
    (args.folder / "samplers.md").write_text(text)
    with written_whole(args.folder / "samplers.png", force=True) as file:
        plot(found, args.samplers, steps).savefig(file, format="png", dpi=120)
    print(text, end="")


if __name__ == "__main__":
    main()
