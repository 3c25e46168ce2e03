"""What commands refuse: one sentence, exit code 2, and nothing is written."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from conftest import refused
from PIL import Image

from sd.app.cli import COMMANDS
from sd.app.cli.elsewhere import USE_INSTEAD
from sd.app.cli.parser import RARE

ALWAYS = {"txt2img": "-m tiny.ckpt", "explain": "a -m tiny.ckpt", "noise": "-m tiny.ckpt"}
REFUSED = {  # command -> arguments -> what is said; an ellipsis stands for anything
    "txt2img": {
        "a -W 500": "--width 500 is not a multiple of 8. Nearest: 496 or 504.",
        "a --sampler dimm": "--sampler dimm does not exist. Did you mean ddim? There are: ddim, ddpm, ",
        "a --sigmas 3,x": "--sigmas '3,x' is not a list of numbers such as 14.6,7,3.…sd txt2img --help",
        "a --clip-skip 3": "--clip-skip 3 is out of range: this checkpoint's text encoder has 2 layers.",
        "a --guidance-interval 0,inf": "--guidance-interval 0, inf is not an interval: give LOW,HIGH",
        f"a --seed {'9' * 400}": "--seed cannot be a number of about 400 digits.",
        f"a -W {'9' * 400}": "--width cannot be a number of about 400 digits.",
        f"a --hires 64x{'9' * 400}": "is neither a factor such as 2 nor a size such as 1024x768.",
        "a --sigmas 1e999,1": "--sigmas inf, 1 are out of range",
        "a --steps 0": "--steps 0 is out of range: 1 to 1000.",
        "a --steps many": "--steps 'many' is not a whole number. See sd txt2img --help.",
        "a --stepps 3": "--stepps is not a flag of sd txt2img. Did you mean --steps?",
        "a --precision fp61": "--precision fp61 does not exist. Did you mean fp16? There are: auto, bf16, ",
        "a --lora x": "the adapter x does not exist",
        "a --size=512": "--size=512 is not a flag of sd txt2img. Give --width and --height.",
        "a --upscale 2": "Use --hires 2.",
        "a --seed": "--seed needs a value. See sd txt2img --help.",
        "a --grid=3": "--grid takes no value, got '3'.",
        "a --grid --count 40 -W 4096 -H 4096": "a sheet of 40 pictures would have",
        "a --grid --grid-columns 0": "--grid-columns 0 is out of range",
        "a -g x": "--guidance-scale 'x' is not a number.",
        "a --count 0": "--count 0 is out of range: at least 1.",
        "a --save-steps all": "--save-steps all does not exist. There are: fast, vae.",
        "a -o x.png -b 2": "--out x.png names one file, but 2 pictures…x-{seed}.png",
        "a -o x.jpg": "--out x.jpg: only .png pictures are written",
        "a -o picture.pngx": "is neither a .png nor an existing folder…write picture.pngx/",
        "a -o {seed:2000}.png": "{seed:2000} cannot be used. A number may be padded: {index:05}.",
        "a -o {sead}.png": "{sead} is not a field. There are: index, seed",
        "a -o {seed.png": "is not a usable template",
        "a -o {steps}.png -b 2": "gives the same name to several pictures",
        "a -o /dev/null/x.png": "nothing can be written to /dev/null…Give another --out.",
        "a -n (b:99)": "--negative-prompt gives 'b' the weight 99",
        "--tile diagonal a": "--tile diagonal does not exist. There are: x, xy, y.",
        "a --tile=diagonal": "--tile diagonal does not exist. There are: x, xy, y.",
        "a --count 2 --n_iter 2": "--count is the number of pictures, --n_iter that of batches. Give only one",
        "a -s -2": "--seed -2 is out of range: 0 to",
        "a -n -blurry": "--negative-prompt needs a value. If -blurry is its value, write -n=-blurry.",
        "a --negative-prompt '-(red)'": "If -(red) is its value, write '--negative-prompt=-(red)'.",
        "a -o -x.png": "--out needs a value. If -x.png is its value, write -o=-x.png.",
        "-p -cat": "--prompt needs a value. If -cat is its value, write -p=-cat.",
        "a -steps 3": "-steps is not a flag of sd txt2img. Did you mean --steps?",
        "a --Guidance_Scale 3": "--Guidance_Scale is not a flag of sd txt2img. Did you mean --guidance-scale?",
        "a --cfg 7": "--cfg is not a flag of sd txt2img. Use --guidance-scale.",
        "a --ckpt-path x.ckpt": "Use --model.",
        "a --lora-model-dir x": "Give the file, --lora FOLDER/NAME.safetensors",
        "a --num_inference_steps=20": "Use --steps.",
        "a --scheduler karras": "Use --sampler; --schedule chooses its noise levels.",
        "a --fp16": "Use --precision fp16.",
        "a --medvram": "Use --low-memory.",
        "a --mode img_gen": "Each mode is a command: sd txt2img, sd img2img, sd inpaint, sd edit.",
        "a --xformers": "Leave it out: attention is computed the fast way.",
        "a --threads 4": "Set the environment variable OMP_NUM_THREADS instead.",
        "a --controlnet x": "ControlNet is not supported yet.",
        "a --denoising_strength 0.5": "--denoising_strength is not a flag of sd txt2img.",
        "a photo": "unexpected word 'photo'. Put text that has spaces in quotes.",
        "-- '-a cat' --steps 3": "--steps stands after --, where every word is text. Put flags before it.",
        "a \u2013steps 3": "\u2013steps begins with a long dash. Did you mean --steps?",
        "\u2014steps 3 a": "\u2014steps begins with a long dash. Did you mean --steps?",
        "a --init x.png": "--init is not a flag of sd txt2img. It is a flag of sd img2img, sd inpaint, "
        "sd depth2img and sd edit.",
        f"a --steps {'9' * 5000}": f"--steps '{'9' * 60}' is not a whole number.",
        "a -p b": "more than one of PROMPT, --prompt, --prompt-file and --from-file given",
        "": "no prompt given",
        "--prompt-file there.txt": "--prompt-file there.txt has no prompt.",
        "--from-file missing.txt": "missing.txt: No such file or directory.",
    },
    "img2img": {
        "a": "--init must be given. See sd img2img --help.",
        "a --image x.png": "--image is not a flag of sd img2img. Use --init.",
        "a -i x.png --mask x.png": "--mask is not a flag of sd img2img. It is a flag of sd inpaint.",
        "a -i x.png --hires 2": "--hires is not a flag of sd img2img. It is a flag of sd txt2img.",
        "a -i x.png --denoise 0.5": "--denoise is not a flag of sd img2img. Use --strength.",
    },
    "explain": {
        "--compare guidence=1,2": "--compare 'guidence' does not exist. Did you mean guidance?",
        "--compare guidance": "has no values…guidance=1,3,7.5",
        "--compare guidance=1,x": "takes numbers",
        "--compare sampler=ddim,oiler": "--compare sampler=oiler…Did you mean euler?",
        f"--compare seed={','.join(map(str, range(12)))}": "13 runs; a page has room for 12",
        "--compare steps=2,101": "a page has room for 100 steps",
        "-o page.png": "--out page.png is not a .html file",
        "-o there.html": "there.html exists already…--force",
        "--from-file x": "--from-file is not a flag of sd explain",
    },
    "noise": {
        "none.png": "none.png does not exist",
        "there.png --timesteps 5,1000": "out of range: at most 12",
        "there.png -o there.png": "there.png exists already…--force",
        "there.png -W 64": "--width and --height go together",
    },
    "tokens": {
        "": "give one of PROMPT and --prompt-file.",
        "a --prompt-file x": "give one of PROMPT and --prompt-file.",
        "(a:11)": "--prompt gives 'a' the weight 11; weights are -10 to 10.",
        "a --steps 0": "--steps 0 is out of range: 1 to 1000.",
        "a b": "unexpected word 'b'.",
    },
    "schedule": {
        "--compare karas": "--compare 'karas' does not exist. Did you mean karras?",
        "--compare karras --schedule beta": "--compare names the schedules; leave out --schedule",
        "-o there.png": "there.png exists already. Give another name, or --force",
        "--cfg 7": "--cfg is not a flag of sd schedule. See",
        "--sigmas ''": "--sigmas '' is not a list of numbers such as 14.6,7,3.",
    },
    "convert": {
        "tiny.ckpt there.safetensors": "there.safetensors exists already…--force",
        "tiny.ckpt x.bin": "x.bin must end in .safetensors, .ckpt or .pt; for a folder",
        "x.ckpt y.safetensors": "x.ckpt does not exist",
    },
    "bench": {
        "--sizes 512,big": "--sizes big…is not a size",
        "--sizes 512,512": "--sizes names '512' twice",
        "--batch-sizes 0": "--batch-sizes '0' is out of range…such as 1,2,4",
        "--steps 1": "--steps 1 is out of range: 2 to 1000; the first one is a warm-up.",
        "--repeat 0": "--repeat 0 is out of range",
        "-o there.json": "there.json exists already…--force",
        "-o x.txt": "--out x.txt is not a .json file",
        "-m there.txt": "there.txt",
        "--size 64": "--size is not a flag of sd bench. Did you mean --sizes?",
    },
    "arch": {
        "--size 500x512": "--size 500x512: width 500 is not a multiple of 8. Nearest: 496 or 504.",
        "--size big": "--size big is not a size…such as 768x512",
        "--html there.html": "--html there.html exists already…--force",
        "--html missing/x.html": "there is no folder missing…Give the name of a file",
        "--html .": "--html . is a folder",
        "--source-url https://example.org": "--source-url needs a page. Give --html FILE as well.",
        "--device cpu": "--device and --precision need measured times. Give --measure as well.",
        "--measure --device tpu": "--device: device 'tpu' is not available here. There are: auto, cpu",
        "-m there.html": "there.html",
        "--sise 64x64": "--sise is not a flag of sd arch. Did you mean --size?",
    },
    "models": {
        "get sd-v1-5.ckpt": "Did you mean sd-v1-",
        "fetch": "fetch does not exist. There are: get, list, verify.",
        "get": "NAME must be given.",
    },
    "": {
        "": "no command given. There are: txt2img, ",
        "txt2imgg a": "command 'txt2imgg' does not exist. Did you mean txt2img?",
        "help txt2imgg": "command 'txt2imgg' does not exist. Did you mean txt2img?",
        "dream a": "command 'dream' does not exist. Did you mean txt2img?",
        "-p 'a cat' --steps 3": "flags follow a command. Did you mean sd txt2img -p 'a cat' --steps 3?",
        "-s 3 img2img 'a cat'": "flags follow a command. Did you mean sd img2img -s 3 'a cat'?",
        "'a red circle'": "'a red circle' is not a command. Did you mean sd txt2img \"a red circle\"?",
    },
}


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [(command, arguments, said) for command, rows in REFUSED.items() for arguments, said in rows.items()],
)
def test_bad_use_gets_a_sentence_and_exit_code_2(run, tiny_ckpt, tmp_path, monkeypatch, command, arguments, said):
    monkeypatch.setattr("sd.runtime.loading.from_checkpoint", lambda *_: pytest.fail("weights are read"))
    for name in ("there.json", "there.html", "there.txt", "there.safetensors"):
        (tmp_path / name).write_text(" \n")
    Image.new("RGB", (64, 64)).save(tmp_path / "there.png")
    (tmp_path / "tiny.ckpt").symlink_to(tiny_ckpt)

    def there():
        return {path.name: path.is_symlink() or path.read_bytes() for path in tmp_path.iterdir()}

    before = there()
    words = shlex.split(f"{command} {arguments} {ALWAYS.get(command, '')}")
    refused(run(*words), *said.split("…"))
    assert there() == before


def test_without_the_model_of_the_package_one_must_be_given(run, monkeypatch):
    monkeypatch.setattr("sd.app.cli.make_pictures.embedded_model", lambda: Path("absent.ckpt"))
    refused(run("txt2img", "a"), "no model given. Give a checkpoint with -m FILE")


@pytest.mark.parametrize("page", ["txt2img", "img2img", "inpaint", "edit"])
def test_the_help_of_pictures_is_short_and_help_all_has_the_rest(call, page):
    _, short, _ = call(page, "--help")
    usage, _, rest = short.partition("\n")
    prompt = "INSTRUCTION" if page == "edit" else "PROMPT"
    assert usage == f"usage: sd {page} [{prompt}] {'' if page == 'txt2img' else '--init IMAGE '}[FLAGS]"
    assert rest.index("examples:") < rest.index("arguments:")
    assert 20 <= len(re.findall(r"^  -", short, re.M)) <= 30
    _, whole, _ = call(page, "--help-all")
    every = {flag for action in import_module(f"sd.app.cli.{page}").parser()._actions for flag in action.option_strings}
    assert all(re.search(rf"{re.escape(flag)}[ ,\n]", whole) for flag in every)
    assert call("help", page)[1] == short


def test_every_rare_flag_exists():
    parsers = [import_module(f"sd.app.cli.{name}").parser() for name in COMMANDS]
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    assert set(RARE.split()) - known <= {"--prediction", "--variant"}


def test_a_flag_of_another_program_leads_to_one_of_ours():
    parsers = [
        import_module(f"sd.app.cli.{name}").parser()
        for name in ("inpaint", "txt2img", "edit", "convert", "extract", "explain", "merge")
    ]
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    assert {ours for ours, _ in USE_INSTEAD.values() if ours} <= known


@pytest.mark.parametrize(
    ("words", "prompt", "tile", "save_steps"),
    [
        ("--tile cat", "cat", "xy", None),
        ("--tile x cat", "cat", "x", None),
        ("cat --tile", "cat", "xy", None),
        ("--steps 3 --tiling 'a cat' -g 1", "a cat", "xy", None),
        ("--save-steps cat", "cat", "", "fast"),
        ("--save-steps vae cat --tile y", "cat", "y", "vae"),
        ("--tile --save-steps cat", "cat", "xy", "fast"),
        ("--save-steps --tile -- -cat", "-cat", "xy", "fast"),
        ("--tile -p x", None, "xy", None),
        ("-- --tile", "--tile", "", None),
    ],
)
def test_a_word_that_is_no_choice_of_a_flag_is_the_prompt(words, prompt, tile, save_steps):
    args = import_module("sd.app.cli.txt2img").parser().parse_args(shlex.split(words))
    assert (args.prompt, args.tile, args.save_steps) == (prompt, tile, save_steps)


def test_force_is_never_suggested(run):
    for flag in ("--forse", "--forced", "--froce"):
        assert "--force?" not in refused(run("txt2img", "a", flag), f"{flag} is not a flag")
