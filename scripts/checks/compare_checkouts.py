"""Make the same pictures with two checkouts of this project and compare them, for changes that must change nothing.

    python scripts/checks/compare_checkouts.py ../before .                    # minutes on two cores
    python scripts/checks/compare_checkouts.py ../before . --only inpaint nine-inpaint

Every command of `RUNS` is run with the code of each checkout, on this machine and with this Python. A line for each
picture says whether its file is the same to the byte, or else how far its pixels are apart, and which of its texts
differ: `parameters`, and the keys of the JSON in `sd`. A picture that only one checkout makes counts as different.

The pictures stay under the folder of --out, `old/` and `new/` beside the `inputs/` that both begin with. Those of the
old checkout are made once, and used again as long as its code, its weights and this file stay the same.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageSequence
from PIL.PngImagePlugin import PngInfo

# As many everywhere, since their number decides how sums are rounded; and they sleep while others need the processor.
THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}

RED = "'a red circle on a blue background' --steps 6 --seed 5"
STAR = "'a green star on a white background' --steps 6 --seed 5"
EARLIER = "--init inputs/earlier.png"  # 128x128, made by the old checkout
PHOTO = "--init inputs/photo.png"  # 200x150
MASKED = f"{EARLIER} --mask inputs/mask.png"

# The name of each run, and its command. Those in LINES get `--from-file` with the lines that stand there.
RUNS = {
    "samplers": "txt2img",
    "prompts": "txt2img",
    "settings": "txt2img",
    "mixed-batches": "txt2img --batch-size 4",
    "two-batches-of-four": f"txt2img {RED} --n_iter 2 --batch-size 4 --grid",
    "flags": f"txt2img {RED} --schedule karras --tile y --hires 1.5 --vary 0.1 --vary-seed 9 --guidance-interval 0.5,9",
    "bf16": f"txt2img {RED} --precision bf16 --width 256 --height 256",
    "low-memory": f"txt2img {RED} --low-memory --width 256 --height 256",
    "tiled-vae": f"img2img {STAR} {PHOTO} --tiled-vae --width 640 --height 128",
    "another-model": f"txt2img {RED} --model inputs/plain.safetensors --weights ema --width 128 --height 128",
    "like": "txt2img --like inputs/earlier.png",
    "like-with-flags": "txt2img --like inputs/earlier.png --sampler heun --guidance-scale 5 --count 2",
    "like-of-another-tool": "txt2img --like inputs/foreign.png",
    "steps": f"txt2img {RED} --save-steps",
    "steps-decoded": f"txt2img {RED} --batch-size 2 --grid-columns 1 --save-steps vae --save-steps-as apng",
    "strengths": f"img2img {EARLIER}",
    "exact-steps": f"img2img {STAR} {PHOTO} --strength 0.5 --exact-steps",
    "crop": f"img2img {STAR} {PHOTO} --width 128 --height 192",
    "pad": f"img2img {STAR} {PHOTO} --width 128 --height 192 --resize-mode pad",
    "stretch": f"img2img {STAR} {PHOTO} --width 128 --height 192 --resize-mode stretch",
    "inpaint": f"inpaint {STAR} {MASKED}",
    "inpaint-blur": f"inpaint {STAR} {MASKED} --strength 0.7 --mask-blur 12 --sampler euler_a --batch-size 2",
    "inpaint-inverted": f"inpaint {STAR} {MASKED} --invert-mask --mask-threshold 100 --mask-blur 0",
    "inpaint-only-masked": f"inpaint {STAR} {MASKED} --only-masked --mask-padding 16",
    "expand": f"inpaint {STAR} {EARLIER} --expand left=64,bottom=32 --overlap 16",
    "nine-inpaint": f"inpaint {STAR} {MASKED} --model inputs/nine.ckpt",
    "nine-only-masked": f"inpaint {STAR} {MASKED} --model inputs/nine.ckpt --only-masked --strength 0.8",
    "nine-expand": f"inpaint {STAR} {EARLIER} --model inputs/nine.ckpt --expand right=64 --guidance-scale 1",
}

# The pictures of the runs with `--from-file`: the name of each, and its settings beside or in place of the usual ones.
USUAL = {"prompt": "a red circle on a blue background", "steps": 6, "seed": 5}
LONG = "a large red circle to the left of a small yellow star, " * 8 + "on a blue background"  # more than 75 tokens
SAMPLERS = ["ddim", "DDIM trailing", "ddpm", "plms", "euler", "Euler a Karras", "heun simple", "LMS exponential"]
SAMPLERS += ["dpm2", "DPM2 a linspace", "dpmpp_2s_a", "dpmpp_2m", "DPM++ 2M beta", "dpmpp_sde", "DPM++ SDE leading"]
SAMPLERS += ["dpmpp_2m_sde", "DPM++ 2M SDE sgm_uniform", "unipc", "UniPC karras", "lcm"]
LINES = {
    "samplers": {name.replace(" ", "-"): {"sampler": name} for name in SAMPLERS}
    | {"ddim-eta": {"sampler": "ddim", "eta": 0.5}, "euler-a-eta": {"sampler": "euler_a", "eta": 0.6}}
    | {"euler-sigmas": {"sampler": "euler", "steps": None, "sigmas": [14.6, 6, 2.5, 1, 0.3]}},
    "prompts": {
        "weights": {"prompt": "a (red:1.3) ((circle)) on a [blue] background"},
        "edits": {"prompt": "a [red:green:0.5] circle on a [blue|white] background [:, striped:3]"},
        "break": {"prompt": "a red circle BREAK on a (blue:1.2) background"},
        "long": {"prompt": LONG},
        "long-negative": {"negative_prompt": f"a (square:1.2), [green:yellow:2], {LONG}"},
        "plain": {"prompt": "a (red:1.3) [circle:star:0.5] BREAK on a blue background", "plain_prompts": True},
        "empty": {"prompt": ""},
        "clip-skip": {"clip_skip": 2},
    },
    "settings": {"guidance-off": {"guidance_scale": 1}, "guidance-rescale": {"guidance_rescale": 0.7}}
    | {"guidance-interval": {"guidance_interval": [0.5, 8]}, "reuse-features": {"reuse_features": 2}}
    | {"merge-tokens": {"merge_tokens": 0.5}, "reuse-and-merge": {"reuse_features": 3, "merge_tokens": 0.25}}
    | {"zero-terminal-snr": {"zero_terminal_snr": True, "sampler": "DDIM trailing"}}
    | {"tile-x": {"tile": "x", "width": 192}, "tile-xy": {"tile": "xy"}, "large": {"width": 256, "height": 256}}
    | {"vary": {"vary": 0.2, "vary_seed": 11, "sampler": "euler_a"}, "hires-latent": {"hires": 2}}
    | {"hires-image": {"hires": 1.5, "hires_upscale": "image", "hires_strength": 0.5, "hires_steps": 5}},
    "mixed-batches": {"first": {}, "wide": {"width": 192}, "varied": {"vary": 0.3, "vary_seed": 2}}
    | {"long": {"prompt": LONG}, "edited": {"prompt": "a [green:red:2] (star:1.2) on a white background"}}
    | {"wide-again": {"width": 192, "seed": 3}, "negative": {"negative_prompt": "a star"}, "fifth": {"seed": 1000}},
    "strengths": {str(strength): {"strength": strength} for strength in (0, 0.3, 0.75, 1)}
    | {"0.6-vary-tile": {"strength": 0.6, "vary": 0.2, "vary_seed": 4, "tile": "x", "sampler": "dpmpp_2m_sde"}},
}


def fingerprint(checkout: Path) -> str:
    """Of what the old pictures depend on: the code, tables and weights of the checkout, and this file."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for file in sorted(file for name in ("sd", "convert", "weights") for file in (checkout / name).rglob("*")):
        if file.is_file() and file.suffix != ".pyc":
            digest.update(str(file.relative_to(checkout)).encode() + file.read_bytes())
    return digest.hexdigest()


def python(checkout: Path, words: list[str], folder: Path, *, must: bool = True) -> subprocess.CompletedProcess:
    """Run Python with the code of that checkout, which it leaves as it is. What must not fail ends this script."""
    environment = {**os.environ, **THREADS, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    if must and done.returncode:
        sys.exit(f"failed: {shlex.join(done.args)}\n{done.stderr}")
    return done


def make_inputs(old: Path, folder: Path) -> None:
    """What all runs begin with: pictures, a mask, two models with made-up weights, and files of prompts."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    photo = Image.linear_gradient("L").resize((200, 150)).convert("RGB")
    ImageDraw.Draw(photo).ellipse((40, 30, 120, 110), fill="orange")
    photo.save(folder / "photo.png")
    mask = Image.new("L", (128, 128))
    ImageDraw.Draw(mask).rectangle((40, 32, 100, 90), fill="white", outline=128, width=6)
    mask.save(folder / "mask.png")
    foreign = PngInfo()
    settings = "Steps: 7, Sampler: DPM++ 2M SDE Karras, CFG scale: 6, Seed: 33, Size: 128x128, Clip skip: 2"
    foreign.add_text("parameters", f"a (black:1.2) heart on a red background\nNegative prompt: a star\n{settings}")
    photo.save(folder / "foreign.png", pnginfo=foreign)
    for run, lines in LINES.items():
        texts = [json.dumps({**USUAL, **settings}) + "\n" for settings in lines.values()]
        (folder / f"{run}.jsonl").write_text("".join(texts))
    earlier = f"{RED} --sampler dpmpp_2s_a --schedule beta --clip-skip 2 --negative-prompt 'a (star:1.1)'"
    python(old, ["-m", "sd", "txt2img", *shlex.split(earlier), "--out", "earlier.png"], folder)
    script = str(next((old / "scripts").rglob("make_checkpoint.py")))
    python(old, [script, "nine.ckpt", "--size", "tiny", "--family", "sd-v1-inpainting"], folder)
    python(old, [script, "plain.safetensors", "--size", "tiny", "--ema"], folder)


def make(run: str, checkout: Path, folder: Path, *, must: bool) -> str:
    """Make the pictures of a run in `folder/run`; returns what the command complained of where it failed."""
    shutil.rmtree(folder / run, ignore_errors=True)
    words = ["-m", "sd", *shlex.split(RUNS[run]), "--out", f"{folder.name}/{run}/{{index:02}}.png"]
    words += ["--from-file", f"inputs/{run}.jsonl"] if run in LINES else []
    done = python(checkout, words, folder.parent, must=must)
    for number, name in enumerate(LINES.get(run, ()), 1):
        if (made := folder / run / f"{number:02}.png").exists():
            made.rename(made.with_name(f"{name}.png"))
    return done.stderr if done.returncode else ""


def read(path: Path) -> tuple[np.ndarray, dict[str, object]]:
    """The pixels of a picture's frames (F, H, W, 4), 0 to 255, and its texts; what is JSON in them by its keys."""
    with Image.open(path) as picture:
        texts = {key: text for key, text in picture.info.items() if isinstance(text, str)}
        frames = [np.asarray(frame.convert("RGBA"), dtype=int) for frame in ImageSequence.Iterator(picture)]
    exact = json.loads(texts.pop("sd", "{}"))
    return np.stack(frames), texts | {f"sd.{key}": value for key, value in exact.items()}


def compare(old: Path, new: Path) -> tuple[str, int, str]:
    """How the files compare, in words; the largest difference of their pixels; and which of their texts differ."""
    if not (old.exists() and new.exists()):
        return f"only in {'old' if old.exists() else 'new'}", 255, ""
    if old.read_bytes() == new.read_bytes():
        return "same bytes", 0, "same texts"
    (pixels, texts), (new_pixels, new_texts) = read(old), read(new)
    differ = sorted(key for key in {*texts, *new_texts} if texts.get(key, ...) != new_texts.get(key, ...))
    shown = f"other texts: {', '.join(differ)}" if differ else "same texts"
    if pixels.shape != new_pixels.shape:
        return f"size {new_pixels.shape[:3]}, was {pixels.shape[:3]}", 255, shown
    largest = int(abs(pixels - new_pixels).max())
    return f"up to {largest} of 255" if largest else "same pixels", largest, shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("old", type=Path, help="the checkout whose pictures are right")
    add("new", type=Path, help="the one that should make the same")
    add("--out", type=Path, default=Path("outputs/compared"), help="folder for the pictures (default: %(default)s)")
    add("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help="these runs alone: see RUNS")
    add("--tolerance", type=int, default=1, metavar="N", help="of 255; more is an error (default: %(default)s)")
    args = parser.parse_args()
    old, new = args.old.resolve(), args.new.resolve()
    folder = args.out.resolve() / f"of-{fingerprint(old)[:12]}"
    (folder / "old").mkdir(parents=True, exist_ok=True)
    for checkout in (old, new):
        found = python(checkout, ["-c", "import sd; print(sd.__file__)"], folder).stdout.strip()
        if not Path(found).is_relative_to(checkout):
            sys.exit(f"{found} would be run, and not the code in {checkout}.")
    if not (folder / "inputs").exists():
        make_inputs(old, folder / "making")
        (folder / "making").rename(folder / "inputs")
    results = []
    for run in args.only:
        if not (folder / "old" / run).exists():
            make(run, old, folder / "making", must=True)
            (folder / "making" / run).rename(folder / "old" / run)
        print(make(run, new, folder / "new", must=False), end="")
        for name in sorted({file.name for side in ("old", "new") for file in (folder / side / run).glob("*")}):
            results.append(compare(folder / "old" / run / name, folder / "new" / run / name))
            print(f"{run + '/' + name:48} {results[-1][0]:16} {results[-1][2]}", flush=True)
    wrong = sum(largest > args.tolerance for _, largest, _ in results)
    equal = [sum(words in result for result in results) for words in ("same bytes", "same pixels", "same texts")]
    print(f"{len(results)} pictures: {equal[0]} of the same bytes, {equal[1]} more of the same pixels, {equal[2]} with "
          f"the same texts; {wrong} with pixels more than {args.tolerance} of 255 apart")  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
