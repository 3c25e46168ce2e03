"""The command line of the original `scripts/txt2img.py`, for people and scripts that use it.

    python scripts/txt2img.py --prompt "a photograph of an astronaut riding a horse" --ckpt model.ckpt

It calls `sd txt2img`, which has better names and more options: see `sd txt2img --help`. Defaults are the original's:
DDIM with 50 steps, seed 42, two batches of three pictures, and a grid. --plms and --dpm_solver choose the original's
other two samplers; here, the last step of the latter ends without any noise.
"""

import argparse
import sys

from sd.app.cli import main as sd_main

UNSUPPORTED = {  # flags of the original that are refused rather than ignored
    "--skip_save": "every picture is written",
    "--fixed_code": "every picture has its own seed",
    "--laion400m": "this is a different model",
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--prompt", default="a painting of a virus monster playing guitar")
    add("--from-file", metavar="FILE", help="prompts, one per line; n_iter pictures of each")
    add("--outdir", default="outputs/txt2img-samples", help="(default: %(default)s)")
    add("--ckpt", default="models/ldm/stable-diffusion-v1/model.ckpt", help="(default: %(default)s)")
    add("--config", metavar="FILE", help="ignored: the checkpoint says what it is")
    add("--ddim_steps", type=int, default=50, help="(default: %(default)s)")
    add("--ddim_eta", type=float, default=0.0, help="(default: %(default)s)")
    add("--scale", type=float, default=7.5, help="(default: %(default)s)")
    add("--n_iter", type=int, default=2, help="batches (default: %(default)s)")
    add("--n_samples", type=int, default=3, help="pictures per batch (default: %(default)s)")
    add("--n_rows", type=int, default=0, help="pictures per row of the grid (default: n_samples)")
    add("--H", type=int, default=512, help="(default: %(default)s)")
    add("--W", type=int, default=512, help="(default: %(default)s)")
    add("--seed", type=int, default=42, help="(default: %(default)s)")
    add("--precision", choices=["full", "autocast"], default="autocast", help="(default: %(default)s)")
    add("--skip_grid", action="store_true", help="do not write a grid of all pictures")
    add("--C", type=int, choices=[4], default=4, help="latent channels")
    add("--f", type=int, choices=[8], default=8, help="pixels per latent")
    add("--plms", action="store_true", help="sample with PLMS")
    add("--dpm_solver", action="store_true", help="sample with DPM-Solver++(2M)")
    for flag in UNSUPPORTED:
        add(flag, action="store_true", help=argparse.SUPPRESS)
    return parser


def translated(argv: list[str] | None = None) -> list[str]:
    """The arguments of `sd` that do the same."""
    commands = parser()
    args = commands.parse_args(argv)
    for flag, reason in UNSUPPORTED.items():
        if getattr(args, flag.removeprefix("--")):
            commands.error(f"{flag} is not supported: {reason}")
    if args.from_file:
        source = [f"--from-file={args.from_file}", "--count", str(args.n_iter)]
    else:
        source = [f"--prompt={args.prompt}", "--n_iter", str(args.n_iter), "--batch-size", str(args.n_samples)]
    source.append("--plain-prompts")  # the original has no weights in prompts
    if args.plms and args.dpm_solver:
        commands.error("--plms and --dpm_solver are two samplers; give only one")
    if args.ddim_eta and (args.plms or args.dpm_solver):
        commands.error(f"--ddim_eta {args.ddim_eta:g} has no effect without DDIM; leave it out")
    if args.plms:
        sampling = ["--sampler", "plms"]
    elif args.dpm_solver:
        sampling = ["--sampler", "dpmpp_2m", "--schedule", "sgm_uniform"]
    else:
        sampling = ["--sampler", "ddim", "--eta", str(args.ddim_eta)]
    grid = ["--grid", "--grid-columns", str(args.n_rows or args.n_samples)]
    return [
        "txt2img",
        *source,
        f"--model={args.ckpt}",
        f"--out={args.outdir}/samples/{{index:05}}.png",
        *("--steps", str(args.ddim_steps)),
        *sampling,
        *("--guidance-scale", str(args.scale)),
        *("--height", str(args.H)),
        *("--width", str(args.W)),
        *("--seed", str(args.seed)),
        *("--precision", "fp32" if args.precision == "full" else "auto"),
        *([] if args.skip_grid else grid),
    ]


if __name__ == "__main__":
    sys.exit(sd_main(translated()))
