"""`sd schedule`: which noise levels a sampler visits, as a table, as JSON, or as a plot."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sd.app.cli.flags import add_output_flags, add_schedule_flags
from sd.app.cli.make_pictures import settings_of
from sd.app.cli.parser import Parser
from sd.app.errors import UsageError
from sd.app.jobs.outputs import require_free
from sd.pipeline.settings import Settings, nearest
from sd.sampling.names import SCHEDULES, meaning, schedule_name

if TYPE_CHECKING:
    from sd.sampling.schedule import Step


def parser() -> Parser:
    parser = Parser(
        prog="sd schedule",
        description="Show the noise levels that a sampler visits. Needs no model: the noise schedule is\n"
        "that of Stable Diffusion 1, 2 and XL.",
        epilog="examples:\n"
        "  sd schedule --sampler dpmpp_2m --steps 10\n"
        "  sd schedule --compare leading,karras,sgm_uniform -o schedules.png",
    )
    add_schedule_flags(parser.group("sampling"))
    parser.add_argument("--compare", metavar="A,B,...", help="several schedules; a sampler's name means its own")
    add = add_output_flags(parser)
    add("--json", action="store_true", help="print one JSON object per schedule instead of a table")
    add("-o", "--out", type=Path, metavar="PLOT", help="also plot them to a .png file")
    return parser


def run(args: argparse.Namespace) -> int:
    asked = compared(args)
    require_free(args.out, ".png", force=args.force)
    if args.out is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UsageError(
                "--out needs matplotlib to draw. Install it: pip install '.[plots]' in the checkout."
            ) from None
    from sd.config import SD_V1
    from sd.pipeline.latent_diffusion import table_and_steps

    found = [as_data(settings, table_and_steps(SD_V1.schedule, settings)[1]) for settings in asked]
    for data in found:
        print(json.dumps(data) if args.json else table(data, named=len(found) > 1))
    if args.out is not None:
        plot(found, args.out, force=args.force)
        if not args.json:
            print(args.out)
    return 0


def compared(args: argparse.Namespace) -> list[Settings]:
    """The settings to show, checked."""
    given = {"prompt": "", "width": 512, "height": 512, "seed": 0, **settings_of(args)}
    if args.compare is None:
        return [Settings(**given)]
    if args.schedule or args.sigmas:
        raise UsageError("--compare names the schedules; leave out --schedule and --sigmas.")
    asked = []
    for name in args.compare.split(","):
        if schedule_name(name):
            asked.append(Settings(**{**given, "schedule": name}))
        elif meaning(name):
            asked.append(Settings(**{**given, "sampler": name}))
        else:
            raise UsageError(f"--compare {name.strip()!r} {nearest(name.strip(), SCHEDULES)}")
    return asked


def as_data(settings: Settings, steps: "list[Step]") -> dict:
    """timesteps of the steps; sigmas and alpha_bars at the start of each step and at the end of the last."""
    from sd.sampling.schedule import sigma_of

    alpha_bars = [steps[0].alpha_bar, *(step.alpha_bar_prev for step in steps)]
    return {
        "event": "schedule",
        "sampler": settings.sampler,
        "schedule": settings.schedule,
        "steps": settings.steps,
        "timesteps": [step.timestep.item() for step in steps],
        "sigmas": [sigma_of(alpha_bar).item() for alpha_bar in alpha_bars],
        "alpha_bars": [alpha_bar.item() for alpha_bar in alpha_bars],
    }


def table(data: dict, *, named: bool) -> str:
    """One row per noise level; the last row is where the last step ends."""
    rows = [f"{'step':>4} {'timestep':>9} {'sigma':>9} {'alpha_bar':>10}"]
    names = [*range(1, len(data["timesteps"]) + 1), "end"]
    timesteps = [f"{timestep:.6g}" for timestep in data["timesteps"]] + ["-"]
    for name, timestep, sigma, alpha_bar in zip(names, timesteps, data["sigmas"], data["alpha_bars"], strict=True):
        rows.append(f"{name:>4} {timestep:>9} {sigma:>9.4f} {alpha_bar:>10.6f}")
    return "\n".join([f"{data['sampler']}, {data['schedule']}", *rows, ""] if named else rows)


def plot(found: list[dict], out: Path, *, force: bool) -> None:
    """Timestep and sigma over the steps, one line per schedule."""
    from matplotlib.figure import Figure

    from sd.files import written_whole

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for data in found:
        timesteps, sigmas = data["timesteps"], [sigma for sigma in data["sigmas"] if sigma > 0]
        label = f"{data['sampler']}, {data['schedule']}"
        left.plot(range(1, len(timesteps) + 1), timesteps, marker=".", label=label)
        right.plot(range(1, len(sigmas) + 1), sigmas, marker=".", label=label)
    left.set(xlabel="step", ylabel="timestep")
    right.set(xlabel="step", ylabel="sigma", yscale="log")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    with written_whole(out, force=force) as file:
        figure.savefig(file, format="png", dpi=120)
