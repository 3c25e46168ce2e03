"""Plot the cost of a picture over its pixels and over the batch size, from `sd bench`.

    sd bench -m model.ckpt --sizes 256,384,512,768,1024 --steps 2 --repeat 1 -o sizes.json
    sd bench -m model.ckpt --sizes 256 --batch-sizes 2,4,8 --steps 2 --repeat 1 -o batches.json
    python scripts/figures/draw_growth.py sizes.json batches.json growth.png

On the left a guided step by pixels, on the right by batch size; in seconds per picture. Dotted: its operations at the
best rate measured for matrix products on the same machine.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sd.files import written_whole


def lines(axes: Axes, results: dict, along: Callable[[dict], float], across: Callable[[dict], str]) -> None:
    """A line for each value of `across` that several cases have."""
    groups: dict[str, list[dict]] = {}
    for case in sorted(results["cases"], key=along):
        groups.setdefault(across(case), []).append(case)
    groups = {name: cases for name, cases in groups.items() if len(cases) > 1}
    for number, (name, cases) in enumerate(groups.items()):
        places = [along(case) for case in cases]
        taken = [case["step"]["median"] / case["batch_size"] for case in cases]
        least = [case["operations"] / results["rates"]["operations"] / case["batch_size"] for case in cases]
        axes.plot(places, taken, "o-", color=f"C{number}", label=name)
        axes.plot(places, least, ":", color=f"C{number}")


def growth(results: dict) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_pixels, by_batch = figure.subplots(1, 2)
    lines(
        by_pixels,
        results,
        lambda case: case["width"] * case["height"] / 1e6,
        lambda case: f"{case['batch_size']} at a time",
    )
    lines(by_batch, results, lambda case: case["batch_size"], lambda case: f"{case['width']}x{case['height']}")
    by_pixels.set(xlabel="megapixels", ylabel="a guided step, seconds for each picture", ylim=(0, None), xlim=(0, None))
    by_batch.set(
        xlabel="pictures at a time", ylim=(0, None), xticks=sorted({case["batch_size"] for case in results["cases"]})
    )
    for axes in (by_pixels, by_batch):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    model, machine = results["model"], results["machine"]
    figure.suptitle(f"{model['family']}, {model['precision']}; {machine['device_name']}, {machine['threads']} threads")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("measured", type=Path, nargs="+", help="files that `sd bench -o` wrote on one machine")
    parser.add_argument("picture", type=Path, help="a .png file, replaced if it exists")
    args = parser.parse_args(arguments)
    first, *others = (json.loads(path.read_text()) for path in args.measured)
    if any((results["model"], results["machine"]) != (first["model"], first["machine"]) for results in others):
        parser.error("the files are from different models or machines. Give files from one.")
    first["cases"] += [case for results in others for case in results["cases"]]
    first["rates"]["operations"] = max(results["rates"]["operations"] for results in (first, *others))
    figure = growth(first)
    with written_whole(args.picture, force=True) as file:
        figure.savefig(file, format="png", dpi=100)


if __name__ == "__main__":
    main()
