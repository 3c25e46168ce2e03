"""The flags of every command that makes pictures."""

import argparse
from pathlib import Path

from sd.app.cli.flags import Parser, add_output_flags, add_schedule_flags, numbers
from sd.app.jobs.outputs import DEFAULT_OUT, PLACEHOLDERS
from sd.app.jobs.step_files import add_step_flags
from sd.pipeline.second_pass import UPSCALES
from sd.pipeline.settings import FIELDS, TILES

DEVICES = "auto, cuda, mps or cpu"


def add_making_flags(parser: Parser, *, size_default: str) -> None:
    """The flags of every command that makes picture files."""
    add = parser.add_argument
    add_prompt_flags(parser)
    add("--from-file", "--from_file", metavar="FILE", help="prompts from a file, one a line or one JSON object a line "
        '({"prompt": "...", "seed": 7}); - is standard input. The same command again makes the pictures that are '
        "missing")  # fmt: skip
    add("--like", type=Path, metavar="PICTURE", help="prompt and settings from a picture, made here or elsewhere; "
        "flags beside it win")  # fmt: skip
    add_compile_flag(add_model_flags(parser))
    picture = add_picture_flags(parser, size_default=size_default)
    picture.add_argument("--vary", "--variation-strength", type=float, metavar="X",
                         help="make variations of the seed's picture: 0 is that picture, 1 the variation seed's; 0.1 "
                         "changes details; all pictures then have the same seed (default: 0)")  # fmt: skip
    picture.add_argument("--vary-seed", "--variation-seed", "--subseed", type=int, metavar="N",
                         help="variation seed of the first picture; the next ones count on from it (default: drawn, "
                         "printed and stored)")  # fmt: skip
    picture.add_argument("--count", "--n_iter", type=int, default=1, metavar="N",
                         help="batches of the prompt, N x batch size pictures; with --from-file, pictures of each line "
                         "(default: 1)")  # fmt: skip
    picture.add_argument("-b", "--batch-size", "--n_samples", type=int, default=1, metavar="N",
                         help="pictures made at the same time; with --from-file, of lines that share size and "
                         "settings, wherever they stand (default: 1)")  # fmt: skip

    picture.add_argument("--tile", "--tiling", nargs="?", choices=TILES[1:], const="xy", default="", metavar="AXES",
                         help="the picture goes on at its other side, so that copies fit together: along x, y, or both "
                         "if no axis is named (then put it after the prompt)")  # fmt: skip
    add_sampling_flags(parser)
    output = add_output_flags(parser)
    output.add_argument("-o", "--out", "--outdir", default=DEFAULT_OUT, metavar="OUT",
                        help="a .png file, a folder, or a template for names with "
                        f"{', '.join(PLACEHOLDERS)} in braces (default: {DEFAULT_OUT})")  # fmt: skip
    output.add_argument("--grid", action="store_true", help="also write one sheet with all pictures")
    output.add_argument("--grid-columns", type=int, metavar="N", help="pictures in a row of that sheet; implies --grid")
    add_step_flags(parser)
    output.add_argument("--json", action="store_true", help="print one JSON object a picture instead of its path")


def add_prompt_flags(parser: Parser) -> None:
    """One prompt, and what goes with it."""
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help='what to show; "" gives what the model makes without a prompt')
    add("-p", "--prompt", dest="prompt_flag", metavar="PROMPT", help="PROMPT, given as a flag")
    add("--prompt-file", "--prompt_file", metavar="FILE", help="one prompt, all of a file's text; - is standard input")
    add("-n", "--negative-prompt", "--negative_prompt", default="", metavar="TEXT", help="what to move away from")

    add("--plain-prompts", "--plain_prompts", action="store_true", help="brackets and BREAK in prompts are text, not "
        "weights and the like; sd tokens shows how a prompt is read")  # fmt: skip


def add_model_flags(parser: Parser) -> argparse._ArgumentGroup:
    """Which weights, and how they are run."""
    model = parser.add_argument_group("model")
    model.add_argument("-m", "--model", "--ckpt", type=Path, metavar="FILE",
                       help="checkpoint: an original .ckpt or .safetensors, a diffusers folder, or what sd convert "
                       "wrote")  # fmt: skip
    model.add_argument("--weights", choices=["auto", "model", "ema"], default="auto",
                       help="which UNet weights, where the file has both (default: auto, the model's own)")  # fmt: skip
    model.add_argument("--device", default="auto", help=f"{DEVICES} (default: auto)")
    model.add_argument("--precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto",
                       help="of the networks (default: auto, the fastest that keeps the picture)")  # fmt: skip
    model.add_argument("--low-memory", action="store_true",
                       help="slower, in less memory: one network on the GPU at a time, and the predictions with and "
                       "without the prompt one after the other")  # fmt: skip
    model.add_argument("--tiled-vae", action="store_true",
                       help="take large pictures through the VAE in tiles, in the memory of one tile")  # fmt: skip
    return model


def add_compile_flag(model: argparse._ArgumentGroup) -> None:
    """Only for commands that leave the UNet's inside alone and run it often."""
    model.add_argument("--compile", action="store_true",
                       help="for many pictures of one size: have the UNet compiled, once for each size and batch "
                       "size, which takes minutes; needs a C++ compiler")  # fmt: skip


def add_picture_flags(parser: Parser, *, size_default: str) -> argparse._ArgumentGroup:
    """Size, seed and layer of the text encoder."""
    picture = parser.add_argument_group("picture")
    picture.add_argument("-W", "--width", "--W", type=int, metavar="PIXELS",
                         help=f"multiple of 8 (default: {size_default})")  # fmt: skip
    picture.add_argument("-H", "--height", "--H", type=int, metavar="PIXELS",
                         help=f"multiple of 8 (default: {size_default})")  # fmt: skip
    picture.add_argument("-s", "--seed", type=int, help="seed of the first picture; the next ones count on from it "
                         "(default: drawn, printed and stored)")  # fmt: skip
    picture.add_argument("--clip-skip", "--clip_skip", type=int, default=1, metavar="N",
                         help="which of the text encoder's layers is used: 1 the last, 2 the one before it, as some "
                         "fine-tuned models expect (default: 1)")  # fmt: skip

    return picture


def add_sampling_flags(parser: Parser) -> None:
    """Noise levels, sampler and guidance."""
    sampling = parser.add_argument_group("sampling")
    add_schedule_flags(sampling)
    sampling.add_argument(
        "--plms", dest="sampler", action="store_const", const="plms", help="the same as --sampler plms"
    )
    sampling.add_argument("--eta", "--ddim_eta", type=float, metavar="X",
                          help="share of fresh noise, where the sampler has a choice: 0 none, 1 as much as ddpm "
                          "(default: 0 in ddim, 1 in others)")  # fmt: skip
    sampling.add_argument("-g", "--guidance-scale", "--scale", "--cfg-scale", type=float, default=7.5, metavar="X",
                          help="how much to follow the prompt; 1 turns guidance off and saves half the work "
                          "(default: 7.5)")  # fmt: skip
    sampling.add_argument("--guidance-rescale", type=float, default=0.0, metavar="X",
                          help="take back contrast that guidance adds: 0 none, 1 all of it (default: 0)")  # fmt: skip
    sampling.add_argument("--guidance-interval", type=numbers, default=(), metavar="LOW,HIGH",
                          help="guide only at noise levels (sigma) from LOW to HIGH, and save half the work at others "
                          "(default: at all)")  # fmt: skip
    sampling.add_argument("--reuse-features", type=int, default=1, metavar="N",
                          help="faster, with a picture that is a little different: run the inner blocks of the UNet at "
                          "every N-th prediction only, and keep what they found (default: 1, at all)")  # fmt: skip
    sampling.add_argument("--merge-tokens", type=float, default=0.0, metavar="SHARE",
                          help="faster, with a picture that is a little different: merge that share of tokens with "
                          "others like them before self-attention at the largest resolution, such as 0.5, at most 0.75 "
                          "(default: 0, none)")  # fmt: skip


def add_second_pass_flags(parser: Parser) -> None:
    """The flags of pictures that are made in two passes."""
    group = parser.add_argument_group("a second pass, for large pictures")
    group.add_argument("--hires", metavar="X",
                       help="make the picture at its size, and then larger with details: a factor such as 2, or a size "
                       "such as 1024x768")  # fmt: skip
    group.add_argument("--hires-upscale", choices=sorted(UPSCALES), default="latent",
                       help="what is enlarged in between: latents, which leaves more to the second pass, or the image "
                       "(default: latent)")  # fmt: skip
    group.add_argument("--hires-strength", type=float, default=0.7, metavar="X",
                       help="how much the second pass changes, above 0, up to 1 (default: 0.7)")  # fmt: skip
    group.add_argument("--hires-steps", type=int, metavar="N",
                       help="steps that the second pass runs (default: --steps times the strength)")  # fmt: skip


def setting_spellings(parser: Parser) -> dict[str, str]:
    """Every spelling of a flag that is a setting of a picture, without its hyphens: what JSON lines may say."""
    return {
        spelling: action.dest
        for action in parser._actions
        if action.dest in FIELDS
        for flag in action.option_strings
        for spelling in (flag.lstrip("-"), flag.lstrip("-").replace("-", "_"))
    }
