"""`sd schedule`: which noise levels a sampler visits, as a table, as JSON, or as a plot."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sd.app.cli.flags import Parser, add_output_flags, add_schedule_flags
from sd.app.errors import UsageError
from sd.pipeline.settings import Settings, nearest
from sd.sampling.names import SCHEDULES, sampler_name, schedule_name

if TYPE_CHECKING:
    from sd.sampling.schedule import Step


def parser() -> Parser:
    parser = Parser(
        prog="sd schedule",
        description="Show the noise levels that a sampler visits. Needs no model: the noise schedule is\n"
        "that of Stable Diffusion 1 and 2.",
        epilog="examples:\n"
        "  sd schedule --sampler dpmpp_2m --steps 10\n"
        "  sd schedule --compare leading,karras,sgm_uniform -o schedules.png",
    )
    add_schedule_flags(parser.add_argument_group("sampling"))
    parser.add_argument("--compare", metavar="A,B,...", help="several schedules; a sampler's name means its own "
                        "schedule")  # fmt: skip
    output = add_output_flags(parser)
    output.add_argument("--json", action="store_true", help="print one JSON object per schedule instead of a table")
    output.add_argument("-o", "--out", type=Path, metavar="PLOT", help="also plot them to a .png file")
    return parser


def run(args: argparse.Namespace) -> int:
    asked = compared(args)
    if args.out is not None:
        require_plotting(args.out, force=args.force)
    from sd.config import SD_V1
    from sd.pipeline.latent_diffusion import table_and_steps

    found = [(settings, table_and_steps(SD_V1.schedule, settings)[1]) for settings in asked]
    for settings, steps in found:
        print(json.dumps(as_data(settings, steps)) if args.json else table(settings, steps, named=len(found) > 1))
    if args.out is not None:
        plot(found, args.out, force=args.force)
        if not args.json:
            print(args.out)
    return 0


def settings_of(args: argparse.Namespace, sampler: str, schedule: str | None) -> Settings:
    return Settings(
        prompt="",
        width=512,
        height=512,
        seed=0,
        steps=args.steps,
        sampler=sampler,
        schedule=schedule,
        sigmas=args.sigmas,
        zero_terminal_snr=args.zero_terminal_snr,
    )


def compared(args: argparse.Namespace) -> list[Settings]:
    """The settings to show, checked."""
    if args.compare is None:
        return [settings_of(args, args.sampler, args.schedule)]
    if args.schedule or args.sigmas:
        raise UsageError("--compare names the schedules; leave out --schedule and --sigmas.")
    asked = []
    for name in args.compare.split(","):
        if schedule_name(name):
            asked.append(settings_of(args, args.sampler, name))
        elif sampler_name(name):
            asked.append(settings_of(args, name, None))
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


def table(settings: Settings, steps: "list[Step]", *, named: bool) -> str:
    """One row per noise level; the last row is where the last step ends."""
    data = as_data(settings, steps)
    rows = [f"{'step':>4} {'timestep':>9} {'sigma':>9} {'alpha_bar':>10}"]
    timesteps = [f"{timestep:.6g}" for timestep in data["timesteps"]] + ["-"]
    for i, (timestep, sigma, alpha_bar) in enumerate(zip(timesteps, data["sigmas"], data["alpha_bars"], strict=True)):
        number = str(i + 1) if i < len(steps) else "end"
        rows.append(f"{number:>4} {timestep:>9} {sigma:>9.4f} {alpha_bar:>10.6f}")
    title = [f"{settings.sampler}, {settings.schedule}"] if named else []
    return "\n".join([*title, *rows, *([""] if named else [])])


def require_plotting(out: Path, *, force: bool) -> None:
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: plots are written as .png.")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}.")
    if out.exists() and not force:
        raise UsageError(f"{out} exists already. Give another --out, or --force to replace it.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--out needs matplotlib to draw. Install it: pip install 'sd-zoo[plots]'.") from None


def plot(found: "list[tuple[Settings, list[Step]]]", out: Path, *, force: bool) -> None:
    """Timestep and sigma over the steps, one line per schedule."""
    from matplotlib.figure import Figure

    from sd.files import written_whole

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for settings, steps in found:
        data = as_data(settings, steps)
        label = f"{settings.sampler}, {settings.schedule}"
        left.plot(range(1, len(steps) + 1), data["timesteps"], marker=".", label=label)
        visible = [sigma for sigma in data["sigmas"] if sigma > 0]
        right.plot(range(1, len(visible) + 1), visible, marker=".", label=label)
    left.set(xlabel="step", ylabel="timestep")
    right.set(xlabel="step", ylabel="sigma", yscale="log")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    with written_whole(out, force=force) as file:
        figure.savefig(file, format="png", dpi=120)
