"""The flags of the commands: one table of spellings."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from sd.app.cli.parser import NUMBERS, Add, Parser
from sd.app.jobs.outputs import DEFAULT_OUT, PLACEHOLDERS
from sd.app.jobs.prompt_choices import MODES
from sd.app.jobs.step_files import FORMS
from sd.app.shards.request import DEFAULT_SIZE, PICTURES, TABLES
from sd.pipeline.second_pass import UPSCALES
from sd.pipeline.settings import DEFAULT_STEPS, DEFAULT_SWITCH, SWITCHES, TILES
from sd.sampling.names import SAMPLER_INFO, SCHEDULES

PACKAGED = "the small model of the package"
OF_LIKE = "that of --like"  # where the small model cannot do the task
GUIDANCE = "how much to follow the prompt; 1 turns guidance off and halves the work"


def numbers(text: str) -> tuple[float, ...]:
    """ "14.6, 7, 3" as numbers; one comma at the end is allowed."""
    try:
        return tuple(float(part) for part in text.strip().removesuffix(",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 14.6,7,3") from None


def whole_number(lowest: int, highest: float = math.inf, why: str = "") -> Callable[[str], int]:
    """The type of a flag that takes whole numbers of a range."""

    def read(text: str) -> int:
        if not lowest <= int(text) <= highest:
            limits = f"at least {lowest}" if highest == math.inf else f"{lowest} to {highest}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {limits}{why}")
        return int(text)

    NUMBERS[read] = NUMBERS[int]
    return read


# The help of a flag stands below its spellings:
# fmt: off


def add_schedule_flags(add: Add) -> None:
    """Which noise levels to visit."""
    add("--steps", "--ddim_steps", type=int, metavar="N", help=f"1 to 1000 (default: {DEFAULT_STEPS})")
    add("--sampler", "--sampling-method", metavar="NAME",
        help=f"{', '.join(SAMPLER_INFO)}, or the name in another program, such as \"DPM++ 2M Karras\" "
        "(default: dpmpp_2m)")
    add("--schedule", metavar="NAME", help=f"which noise levels: {', '.join(SCHEDULES)} (default: the sampler's own)")
    add("--sigmas", type=numbers, default=(), metavar="14.6,7,3,...",
        help="your own noise levels instead of steps and schedule, falling; a step to 0 is added")
    add("--discard-penultimate", action="store_true", default=None,
        help="choose one noise level more, and leave out the last before the end, as some programs do for dpm2, dpm2_a "
        "and unipc (default: if the sampler's name is theirs, such as DPM2)")
    add("--zero-terminal-snr", action="store_const", const=True,
        help="begin at pure noise: for v-prediction models trained for it (default: if the file says so)")
    add("--no-zero-terminal-snr", action="store_const", const=False, dest="zero_terminal_snr",
        help="begin with the usual noise levels, whatever the file says")


def add_output_flags(parser: Parser) -> Add:
    add = parser.group("output")
    add("--force", action="store_true", help="replace files that exist already")
    add("-q", "--quiet", action="store_true", help="no progress bar, only warnings and errors")
    return add


def add_making_flags(
    parser: Parser, prompt: tuple[str, str] = (), *, model: str = PACKAGED, guidance: str = GUIDANCE, **size: str
) -> None:
    """The flags of every command that makes picture files.

    prompt    what it is called, and its help, as in `add_prompt_flags`
    model     as in `add_model_flags`
    guidance  the help of --guidance-scale
    size      as in `add_picture_flags`
    """
    add_prompt_flags(parser, *prompt)
    parser.add_argument("--from-file", "--from_file", metavar="FILE",
        help="prompts from a file; - is standard input. Each line is a prompt; one that begins with {\" is JSON with "
        'settings of its own, {"prompt": "...", "seed": 7}; one that begins with -- has flags, as in the common web '
        "UI. A .csv, .tsv or .parquet file is a table, with a column prompt. The same command again resumes a stopped "
        "run")
    parser.add_argument("--choices", choices=MODES,
        help="read {red|blue} in prompts as a choice: all makes every combination, random draws one for each picture; "
        "\\{ is the brace itself (default: braces are text)")
    parser.add_argument("--wildcards", type=Path, metavar="FOLDER",
        help="with --choices: __animal__ in a prompt is a choice among the lines of FOLDER/animal.txt")
    parser.add_argument("--like", type=Path, metavar="PICTURE",
        help="prompt and settings from a picture, made here or elsewhere; explicit flags take precedence")
    add_compile_flag(add_model_flags(parser, model))
    add = add_picture_flags(parser, **size)
    add("--vary", "--variation-strength", type=float, metavar="X",
        help="make variations of the seed's picture: 0 is that picture, 1 the variation seed's, 0.1 changes details; "
        "all pictures then have the same seed (default: 0)")
    add("--vary-seed", "--variation-seed", "--subseed", type=int, metavar="N",
        help="variation seed of the first picture; the next ones count on from it (default: drawn, printed and stored)")
    add("--rng", default="cpu", metavar="NAME",
        help="how noise follows from the seed: cpu, or philox (also nv, gpu, cuda), as on an NVIDIA GPU and so "
        "in the web UI (default: cpu)")
    add("--seed-delta", "--ensd", type=int, default=0, metavar="N",
        help="added to the seed for the noise that samplers add on the way, as ENSD in the web UI (default: 0)")
    add("--count", type=whole_number(1), metavar="N",
        help="pictures in all; with --from-file, for each line (default: one batch; one for each line)")
    add("--n_iter", type=whole_number(1), metavar="N",
        help="the original script's way to say it: N batches; with --from-file, N pictures for each line")
    add("-b", "--batch-size", "--n_samples", type=whole_number(1), default=1, metavar="N",
        help="how many of them are made at the same time; lines of --from-file with the same size and settings are "
        "batched, wherever they are in the file (default: 1)")
    add("--tile", "--tiling", nargs="?", choices=TILES[1:], const="xy", default="", metavar="AXES",
        help="make the picture tile seamlessly along x, y or xy (the default)")
    add_sampling_flags(parser, guidance)
    add_xl_flags(parser)
    add = add_output_flags(parser)
    add("-o", "--out", "--outdir", default=DEFAULT_OUT, metavar="OUT",
        help=f"a .png file, a folder, or a template for names with {', '.join(PLACEHOLDERS)} in braces "
        f"(default: {DEFAULT_OUT})")
    add("--grid", action="store_true", help="also write one sheet with all pictures, labelled")
    add("--grid-columns", type=whole_number(1), metavar="N", help="pictures per row; implies --grid")
    add("--save-steps", nargs="?", choices=["fast", "vae"], const="fast", metavar="HOW",
        help="also write what each step predicts: fast, from the colours of the latents (the default), or decoded "
        "by the vae; with --tiny-vae, both are decoded by the tiny one")
    add("--save-steps-as", choices=FORMS,
        help="files NAME-step001.png and so on, or one animation, NAME-steps.webp or .png (default: files)")
    add("--json", action="store_true",
        help="print one JSON object per picture instead of its path: with prompt, size, seed, steps, model and hash")
    add_shard_flags(parser)


def add_shard_flags(parser: Parser) -> None:
    """Many pictures on many machines."""
    add = parser.group("many machines, with --from-file and -o FOLDER")
    add("--shard-size", type=whole_number(1), metavar="N",
        help="write shards of N prompts each: 00000.tar as WebDataset reads it, a table, and stats. The same command "
        f"again makes what is missing (default: {DEFAULT_SIZE}, if another flag asks for shards)")
    add("--shards", metavar="I/N",
        help="make every N-th shard from the I-th on, 1/N to N/N; auto: as Slurm, Kubernetes and others say in the "
        "environment (default: all that no other process makes)")
    add("--shard-table", choices=TABLES, help="the form of the table of settings beside each shard (default: jsonl)")
    add("--engine", choices=("ray",),
        help="have a Ray cluster make the shards: a model in each worker, and a shard anew if its worker is lost")
    add("--address", metavar="HOST:PORT",
        help="of the Ray cluster; auto is the one on this machine (default: start one here)")
    add("--workers", type=whole_number(1), metavar="N", help="how many (default: as many as there is room for)")
    add("--gpus-per-worker", type=float, metavar="X",
        help="0.5 lets two share one (default: 1 if the cluster has any, else 0)")
    add("--cpus-per-worker", type=float, metavar="X", help="CPUs, and so threads, of each worker (default: 1)")
    add("--shard-picture", choices=PICTURES, help="the form of the pictures in shards; both lossless (default: png)")


def add_prompt_flags(parser: Parser, name: str = "PROMPT", meaning: str = 'what to show; "" means no prompt') -> None:
    """One prompt, and how it is read."""
    add = parser.add_argument
    add("prompt", nargs="?", metavar=name, help=meaning)
    add("-p", "--prompt", dest="prompt_flag", metavar=name, help=f"{name}, given as a flag")
    add("--prompt-file", "--prompt_file", metavar="FILE", help="one prompt: a file's whole text; - is standard input")
    add("-n", "--negative-prompt", "--negative_prompt", default="", metavar="TEXT",
        help="what not to show; -n=-TEXT for one that begins with a dash")
    add("--plain-prompts", "--plain_prompts", action="store_true",
        help="take brackets and BREAK in prompts literally; sd tokens shows how a prompt is read")
    add_lora_flag(add)
    add_embeddings_flag(add)


def add_xl_flags(parser: Parser, *, refiner: bool = True) -> None:
    """What only Stable Diffusion XL reads; a flag that is absent leaves the default to `Settings`.

    refiner  whether a second model can take the last steps
    """
    add = parser.group("Stable Diffusion XL")
    add("--prompt-2", "--prompt_2", metavar="TEXT",
        help="what the second text encoder reads (default: the prompt)")
    add("--negative-prompt-2", "--negative_prompt_2", metavar="TEXT",
        help="likewise what not to show (default: the negative prompt). Where both are empty, the base model is given "
        "zeros, as in the web UI; its refiner reads the empty text")
    add("--original-size", "--original_size", metavar="WxH",
        help="draw like a training picture that had this size: a small one gives a blurred picture (default: the "
        "picture's size)")
    add("--crop", metavar="LEFT,TOP",
        help="draw like a training picture of which this much was cut off (default: 0,0)")
    if refiner:
        add("--refiner", type=Path, metavar="FILE", help="a refiner, which takes over for the last steps")
        add("--switch-at", "--refiner-switch-at", "--refiner_switch_at", type=float, metavar="X",
            help=f"when it does, 0 to 1 (default: {DEFAULT_SWITCH:g} of the time from noise to picture)")
        add("--switch-by", choices=SWITCHES,
            help="what --switch-at is a share of: the time, as in diffusers, or the steps, as in the web UI "
            "(default: time)")
    add("--aesthetic-score", "--aesthetic_score", type=float, metavar="X",
        help="of the refiner: how beautiful a picture to make, about 1 to 10 (default: 6)")
    add("--negative-aesthetic-score", "--negative_aesthetic_score", type=float, metavar="X",
        help="of the refiner: what to move away from (default: 2.5)")


def add_embeddings_flag(add: Add) -> None:
    """Where learned words are."""
    add("--embeddings", type=Path, action="append", default=[], metavar="PATH",
        help="a file of textual inversion, or a folder of them, beside your own folder of embeddings; can be given "
        "several times. A prompt uses one by its file's name")


def adapter(text: str) -> str:
    """The value of --lora. An existing file is one as a whole, also if its name ends like a strength."""
    return f"{text}:1:1" if Path(text).is_file() else text


def add_lora_flag(add: Add) -> None:
    """Adapters."""
    add("--lora", type=adapter, action="append", metavar="NAME[:S[:T]]",
        help="apply a LoRA, or a relative of it, by file or by name, at strength S, and T for the text encoder "
        "(default: 1; T as S); can be given several times. <lora:NAME:S> in a prompt works, too")


def add_model_flags(parser: Parser, default: str = PACKAGED, *, decodes: bool = True) -> Add:
    """Which weights to use, and how to run them.

    default  the model that is used if none is given
    decodes  whether the command makes pictures of latents
    """
    add = parser.group("model")
    add("-m", "--model", "--ckpt", type=Path, metavar="FILE",
        help="checkpoint: an original .ckpt or .safetensors, a diffusers folder, or a file that sd convert wrote; or "
        f"the name of one in your models folder (default: {default})")
    add("--weights", choices=["auto", "model", "ema"], default="auto",
        help="which UNet weights, if the file has both (default: auto, the model's own; the averaged ones if it edits)")
    add_reading_flags(add)
    add("--vae", type=Path, metavar="FILE", help="use the VAE of another file or folder, in place of the model's own")
    if decodes:
        add("--tiny-vae", type=Path, metavar="FILE",
            help="decode with a tiny VAE such as taesd_decoder, for XL taesdxl_decoder: ten times as fast, nearly the "
            "same picture. It also decodes what --save-steps and sd explain show of each step; input pictures are "
            "still encoded by the VAE")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    add("--precision", choices=["auto", "fp32", "fp16", "bf16", "int8"], default="auto",
        help="of the networks (default: auto, the fastest that keeps the picture). int8, for newer CPUs: the UNet "
        "multiplies in 8 bits, 1.5 times as fast as in bf16 and with half the memory; details of the picture change")
    add("--low-memory", action="store_true",
        help="use less memory, but more time: one network on the GPU at a time, and the predictions with and without "
        "the prompt one after the other")
    add("--tiled-vae", action="store_true", help="run the VAE on tiles of large pictures, using the memory of one tile")
    return add


def add_reading_flags(add: Add) -> None:
    """What a file or folder may leave open."""
    add("--prediction", choices=["auto", "eps", "v", "x0"], default="auto",
        help="what the UNet predicts: the noise, the velocity or the clean latents (default: auto, as the file, a "
        ".yaml beside it or its family says)")
    add("--variant", metavar="NAME",
        help="of the weights in a diffusers folder: fp16, non_ema, ... (default: the plain ones, or those that it has)")


def add_compile_flag(add: Add) -> None:
    """Only for commands that run the UNet often and do not look inside it."""
    add("--compile", action="store_true",
        help="compile the UNet, for many pictures of one size: takes minutes for each size and batch size. Needs an "
        "NVIDIA GPU, Triton and a C compiler; refused on a CPU")


def add_picture_flags(
    parser: Parser, *, size_default: str, size: str = "multiple of 8",
    seed: str = "of the first picture; the next ones count on from it",
) -> Add:
    """Size, seed and layer of the text encoder, and what the help says of the first two."""
    add = parser.group("picture")
    add("-W", "--width", "--W", type=int, metavar="PIXELS", help=f"{size} (default: {size_default})")
    add("-H", "--height", "--H", type=int, metavar="PIXELS", help="likewise")
    add("-s", "--seed", type=int, metavar="N", help=f"seed {seed}; -1 draws one (default: drawn, printed and stored)")
    add("--clip-skip", "--clip_skip", type=int, default=1, metavar="N",
        help="which layer of the text encoder to use: 1 the last, 2 the one before it, as some fine-tuned models "
        "expect (default: 1)")
    return add


def add_sampling_flags(parser: Parser, guidance: str = GUIDANCE) -> None:
    """Noise levels, sampler and guidance."""
    add = parser.group("sampling")
    add_schedule_flags(add)
    add("--plms", dest="sampler", action="store_const", const="plms", help="the same as --sampler plms")
    add("--eta", "--ddim_eta", type=float, metavar="X",
        help="share of fresh noise, for samplers with that setting: 0 none, 1 as much as ddpm (default: 0 for ddim, "
        "1 for others)")
    add("-g", "--guidance-scale", "--scale", "--cfg-scale", type=float, metavar="X",
        help=f"{guidance} (default: 7.5, unless the model says otherwise)")
    add("--guidance-rescale", type=float, default=0.0, metavar="X",
        help="undo the contrast that guidance adds: 0 none, 1 all of it (default: 0)")
    add("--guidance-interval", type=numbers, default=(), metavar="LOW,HIGH",
        help="guide only at noise levels (sigma) from LOW to HIGH, and halve the work at others "
        "(default: every noise level)")
    add("--reuse-features", type=int, default=1, metavar="N",
        help="faster, with a slightly different picture: run the inner blocks of the UNet only at every N-th "
        "prediction, and reuse their output (default: 1, every prediction)")
    add("--merge-tokens", type=float, default=0.0, metavar="SHARE",
        help="faster, with a slightly different picture: merge this share of similar tokens before self-attention at "
        "the largest resolution, such as 0.5, at most 0.75 (default: 0, none)")


def add_second_pass_flags(parser: Parser) -> None:
    """A second pass at a larger size."""
    add = parser.group("a second pass, for large pictures")
    add("--hires", metavar="X",
        help="make the picture, then enlarge it and add detail: a factor such as 2, or a size such as 1024x768")
    add("--hires-upscale", choices=sorted(UPSCALES), default="latent",
        help="what to enlarge between the passes: the latents, which leaves more to the second pass, or the image "
        "(default: latent)")
    add("--hires-strength", type=float, default=0.7, metavar="X",
        help="how much the second pass changes, above 0, up to 1 (default: 0.7)")
    add("--hires-steps", type=int, metavar="N",
        help="steps that the second pass runs (default: --steps times the strength)")
