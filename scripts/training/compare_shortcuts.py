"""Measure what `--reuse-features` and `--merge-tokens` save, and what they change.

    python scripts/training/compare_shortcuts.py                        # minutes, with the embedded model
    python scripts/training/compare_shortcuts.py --steps 20 --outer 1 2 3   # with more outer blocks
    python scripts/training/compare_shortcuts.py --merge 0.5 --reuse 2 --both --prompts 56
    python scripts/training/compare_shortcuts.py --model model.ckpt --steps 30 --reuse --merge 0.25 0.5 --prompts 56
    python scripts/training/compare_shortcuts.py --prompts 0            # only the operations

First the remaining operations of a prediction by the full-size v1 UNet: without its inner blocks, by the number of
outer blocks that run on each side; and with merged tokens. Then, for the model: the share of right pictures; the mean
and the smallest PSNR between them and the pictures of the same seeds without shortcuts; and processor seconds per
picture. Plain image analysis decides what is right, for pictures of drawn shapes only.
"""

import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from score_tiny import make
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training_command import parser_of

import sd
from sd.config import SD_V1
from sd.networks.build import build_networks
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.runtime.shortcuts import feature_reuse
from sd.runtime.shortcuts.feature_reuse import OUTER, ReusedFeatures
from sd.runtime.shortcuts.token_merging import tokens_merged
from sd.study.benchmark.table import markdown
from sd.study.forward_process import psnr
from sd.training.shapes.scoring import Request, one_thing, shares, verdicts

DEPTHS = (1, 2, 3, 4)


def context_for(x_t: Tensor) -> Tensor:
    return torch.empty(len(x_t), 77, SD_V1.unet.context_width, device=x_t.device)


def operations(unet: nn.Module, x_t: Tensor, changed: AbstractContextManager | None = None) -> int:
    """Operations of one prediction for x_t (B, 4, H, W) on the meta device, counted by PyTorch."""
    with FlopCounterMode(display=False) as counter, changed or nullcontext(), torch.no_grad():
        unet(x_t, torch.tensor(500.0, device="meta"), context_for(x_t))
    return counter.get_total_flops()


def without_inner_blocks(unet: nn.Module, x_t: Tensor, outer: int) -> int:
    """Operations of a prediction that reuses the inner blocks' features of the one before."""
    counts, reused, context = [], ReusedFeatures(2, outer), context_for(x_t)
    for _ in range(2):
        reused.begin(x_t, context)
        counts.append(operations(unet, x_t, reused.applied(unet)))
    return counts[1]


def depths(unet: nn.Module, x_t: Tensor, every: list[int]) -> str:
    whole, rows = operations(unet, x_t), []
    for outer in DEPTHS:
        left = without_inner_blocks(unet, x_t, outer)
        of_runs = [f"{100 * (whole + (n - 1) * left) / (n * whole):.1f} %" for n in every]
        rows.append([str(outer), f"{left / 1e9:.1f} G", f"{100 * left / whole:.1f} %", *of_runs])
    return markdown(
        ["outer blocks", "operations", "of a whole prediction", *(f"of a run, N = {n}" for n in every)], rows
    )


def merged(unet: nn.Module, sizes: list[Tensor], merge: list[float]) -> str:
    rows = []
    for x_t in sizes:
        whole = operations(unet, x_t)
        for share in merge:
            left = operations(unet, x_t, tokens_merged(unet, share, x_t))
            size = "×".join(str(8 * side) for side in reversed(x_t.shape[-2:]))
            rows.append([size, f"{share:g}", f"{left / 1e9:.1f} G", f"{100 * left / whole:.1f} %"])
    return markdown(["size", "tokens merged", "operations", "of a whole prediction"], rows)


def timed(model: StableDiffusion, requests: list[Request], options: dict) -> tuple[list[Image.Image], float]:
    """The pictures, and processor seconds per picture."""
    started = time.process_time()
    pictures = make(model, requests, options)
    return pictures, (time.process_time() - started) / len(requests)


def compared(
    model: StableDiffusion, requests: list[Request], steps: list[int], outer: list[int], shortcuts: list[dict]
) -> str:
    """A table: for each number of steps, a run without shortcuts, then one with each of them."""
    rows = []
    for count in steps:
        whole, seconds = timed(model, requests, {"steps": count})
        rows.append([str(count), "", "", "", right(whole, requests), "", "", f"{seconds:.2f} s"])
        for options in shortcuts:
            for depth in outer if "reuse_features" in options else [None]:
                class_of_it = partial(ReusedFeatures, outer=depth)
                with mock.patch.object(feature_reuse, "ReusedFeatures", class_of_it):
                    pictures, seconds = timed(model, requests, {"steps": count, **options})
                near = [psnr(*pair) for pair in zip(whole, pictures, strict=True)]
                values = [f"{value:.1f} dB" for value in (statistics.mean(near), min(near))]
                reuse, merge = (str(options.get(name, "")) for name in ("reuse_features", "merge_tokens"))
                shown = ["" if depth is None else str(depth), reuse, merge, right(pictures, requests)]
                rows.append([str(count), *shown, *values, f"{seconds:.2f} s"])
    head = ["steps", "outer blocks", "features kept, N", "tokens merged", "right", "PSNR", "the least", "a picture"]
    return markdown(head, rows)


def right(pictures: list[Image.Image], requests: list[Request]) -> str:
    return f"{100 * shares(list(verdicts(pictures, requests)))['all']:.1f} %"


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--model", type=Path, help="a checkpoint (default: the embedded model)")
    add("--steps", type=int, nargs="+", default=[20, 30], metavar="N", help="(default: 20 30)")
    add("--reuse", type=int, nargs="*", default=[2, 3, 5], metavar="N", help="(default: 2 3 5)")
    add("--merge", type=float, nargs="*", default=[0.25, 0.5, 0.75], metavar="SHARE", help="(default: 0.25 0.5 0.75)")
    add("--both", action="store_true", help="also each N with each SHARE")
    add("--outer", type=int, nargs="+", default=[OUTER], metavar="N", help="outer blocks (default: %(default)s)")
    add("--prompts", type=int, default=8, help="0 to 56 (default: %(default)s)")
    args = parser.parse_args(arguments)
    unet = build_networks(SD_V1)["unet"]
    small, large = (torch.empty(1, 4, side, side, device="meta") for side in (64, 128))
    if args.reuse:
        print(depths(unet, small, args.reuse))
    if args.merge:
        print(merged(unet, [small, large], args.merge))
    if args.prompts < 1:
        return
    model = sd.load(args.model, precision="fp32")
    requests = one_thing(1)
    requests = requests[:: max(1, len(requests) // args.prompts)][: args.prompts]
    shortcuts = [{"reuse_features": n} for n in args.reuse] + [{"merge_tokens": share} for share in args.merge]
    if args.both:
        pairs = product(args.reuse, args.merge)
        shortcuts += [{"reuse_features": n, "merge_tokens": share} for n, share in pairs]
    print(compared(model, requests, args.steps, args.outer, shortcuts), end="")


if __name__ == "__main__":
    main()
