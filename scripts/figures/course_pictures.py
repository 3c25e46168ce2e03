"""The course's pictures, drawn with Pillow: each function returns the bytes of one PNG, always the same."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from course_plots import UNET_STAGES
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sd.pipeline.image.tensors import to_images, to_tensor
from sd.pipeline.settings import Settings
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.sampling.schedule import add_noise
from sd.study.explain.recording import explain
from sd.study.forward_process import channel_pictures
from sd.text.tokenizer import Tokenizer
from sd.training.shapes.drawing import ShapesDataset

PROMPT = "a red circle on a blue background"
SEED, STEPS = 7, 20
CELL, GAP, LETTERS = 128, 6, 17  # pixels; at most five cells a row, so that a phone shows letters of 9 pixels
PAPER, INK = (255, 255, 255), (36, 41, 47)
LARGEST = 120_000  # bytes; larger pictures are stored with 256 colours or fewer


def png(picture: Image.Image) -> bytes:
    def stored(picture: Image.Image) -> bytes:
        file = io.BytesIO()
        picture.save(file, "PNG", optimize=True)
        return file.getvalue()

    data, colours = stored(picture), 256
    while len(data) > LARGEST and colours > 16:
        data = stored(picture.quantize(colours, dither=Image.Dither.NONE))
        colours //= 2
    return data


def wrapped(text: str, width: int, font: ImageFont.ImageFont) -> str:
    """The text in lines that are at most so many pixels wide, as far as its words allow."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str] = (), names: Sequence[str] = ()) -> Image.Image:
    """Pictures in rows, with optional titles above columns and a name, for example the prompt, above each row.

    Latents are enlarged as squares, pictures smoothly.
    """
    font = ImageFont.load_default(LETTERS)
    width = max(map(len, rows)) * (CELL + GAP) - GAP
    titles = [wrapped(title, CELL, font) for title in titles]
    names = [wrapped(name, width, font) for name in names] or [""] * len(rows)
    heights = [height_of(name, font) for name in names]
    top = max((height_of(title, font) for title in titles), default=0)
    whole = Image.new("RGB", (width, top + sum(heights) + len(rows) * (CELL + GAP) - GAP), PAPER)
    pen = ImageDraw.Draw(whole)
    for i, title in enumerate(titles):
        pen.multiline_text((i * (CELL + GAP), top - GAP), title, fill=INK, font=font, anchor="ld")
    y = top
    for row, name, height in zip(rows, names, heights, strict=True):
        pen.multiline_text((0, y + height - GAP), name, fill=INK, font=font, anchor="ld")
        y += height
        for i, picture in enumerate(row):
            method = Image.Resampling.LANCZOS if picture.mode == "RGB" else Image.Resampling.NEAREST
            shown = picture if picture.size == (CELL, CELL) else picture.resize((CELL, CELL), method)
            whole.paste(shown.convert("RGB"), (i * (CELL + GAP), y))
        y += CELL + GAP
    return whole


def height_of(text: str, font: ImageFont.ImageFont) -> int:
    """Of the lines of a text and the gaps above and below; 0 without any."""
    if not text:
        return 0
    _, top, _, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font=font, anchor="la")
    return round(bottom - top) + 3 * GAP


def stacked(*sheets: Image.Image) -> Image.Image:
    """One above the other."""
    whole = Image.new(
        "RGB", (max(each.width for each in sheets), sum(each.height + GAP for each in sheets) - GAP), PAPER
    )
    y = 0
    for each in sheets:
        whole.paste(each, (0, y))
        y += each.height + GAP
    return whole


def drawn_pictures(model: StableDiffusion, count: int) -> list[Image.Image]:
    """Pictures of combinations that training never showed."""
    pictures, _ = ShapesDataset(0, model.config.native_size, held_out=True).batch(0, count)
    return to_images(pictures)


def latents_of(model: StableDiffusion, pictures: Sequence[Image.Image]) -> Tensor:
    return model.encode_image(torch.cat([to_tensor(picture) for picture in pictures]))


def picture_and_latents(model: StableDiffusion) -> bytes:
    """Chapter 1: pictures, the four channels of their latents, and the decoder's pictures."""
    pictures = drawn_pictures(model, 3)
    latents = latents_of(model, pictures)
    decoded = model.decode(latents)
    rows = [[pictures[i], *channel_pictures(latents[i : i + 1]), decoded[i]] for i in range(len(pictures))]
    return png(sheet(rows, ["picture", *(f"channel {i}" for i in range(1, 5)), "decoded"]))


def vae_round_trip(model: StableDiffusion) -> bytes:
    """Chapter 2: what the VAE keeps."""
    pictures = drawn_pictures(model, 5)
    decoded = model.decode(latents_of(model, pictures))
    differences = [
        Image.fromarray((5 * np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))).clip(0, 255).astype(np.uint8))
        for a, b in zip(pictures, decoded, strict=True)
    ]
    return png(sheet([pictures, decoded, differences], names=["picture", "decoded", "difference, five times"]))


def vae_between(model: StableDiffusion) -> bytes:
    """Chapter 2: pictures along the straight line between two latents."""
    pictures = drawn_pictures(model, 4)
    latents = latents_of(model, pictures)
    rows = []
    for a, b in ((0, 2), (1, 3)):
        points = [latents[a : a + 1].lerp(latents[b : b + 1], share / 4) for share in range(5)]
        rows.append(model.decode(torch.cat(points)))
    return png(sheet(rows, ["one picture", "1/4", "1/2", "3/4", "the other"]))


def tokens() -> bytes:
    """Chapter 3: a prompt as the text encoder reads it."""
    tokenizer = Tokenizer()
    tokenized = tokenizer.tokenize(PROMPT)
    inner = tokenized.ids[1 : tokenized.length - 1]
    boxes = [("start", tokenized.ids[0])]
    boxes += [(text.strip(), token) for token, text in tokenizer.pieces_of(inner)]
    boxes.append(("end", tokenized.ids[tokenized.length - 1]))
    padding = len(tokenized.ids) - tokenized.length
    font, small = ImageFont.load_default(19), ImageFont.load_default(16)
    whole = Image.new("RGB", (620, 200), PAPER)
    pen = ImageDraw.Draw(whole)
    x = y = 4.0
    for word, token in boxes:
        width = max(pen.textlength(word, font=font), pen.textlength(str(token), font=small)) + 22
        if x + width > whole.width:
            x, y = 4.0, y + 62
        fill = "#c9ced6" if word in ("start", "end") else "#b7d8b0"
        pen.rounded_rectangle((x, y, x + width, y + 56), 5, fill=fill, outline=INK)
        pen.text((x + width / 2, y + 19), word, fill=INK, font=font, anchor="mm")
        pen.text((x + width / 2, y + 41), str(token), fill=INK, font=small, anchor="mm")
        x += width + 5
    pen.text((x + 6, y + 28), f"= {len(boxes)} tokens,", fill=INK, font=small, anchor="lm")
    for i in range(padding):
        pen.rectangle((4 + 9 * i, y + 72, 10 + 9 * i, y + 94), fill="#eceef1", outline=INK)
    words = f"and {padding} times {tokenized.ids[-1]} as padding: {len(tokenized.ids)} in all"
    pen.text((4, y + 114), words, fill=INK, font=small, anchor="lm")
    return png(whole.crop((0, 0, whole.width, round(y) + 128)))


def run_settings(model: StableDiffusion, **options: object) -> Settings:
    return model.settings_for(**{"prompt": PROMPT, "seed": SEED, "steps": STEPS, **options})


def word_attention(model: StableDiffusion) -> bytes:
    """Chapter 4: which positions attend to each word, the mean over steps, layers and heads."""
    run = explain(model, run_settings(model))
    strip = run.strips[0]
    maps, names = [], []
    for word in strip.words:
        columns = [strip.columns[i] for i in word]
        if columns[0].kind != "token":
            continue
        weights = [
            F.interpolate(
                heat.weights[:, list(word)].sum(dim=1).mean(dim=0)[None, None], size=(16, 16), mode="bilinear"
            )
            for step in run.steps
            for heat in step.heats
        ]
        mean = torch.cat(weights).mean(dim=0)[0]
        grey = 255 * (mean - mean.min()) / (mean.max() - mean.min())
        maps.append(Image.fromarray(grey.round().to(torch.uint8).numpy()))
        names.append("".join(column.text for column in columns).strip())
    cells, titles = [run.picture, *maps], ["picture", *names]
    return png(stacked(*(sheet([cells[i : i + 4]], titles[i : i + 4]) for i in range(0, len(cells), 4))))


def denoising(model: StableDiffusion) -> bytes:
    """Chapter 5: noise added to a picture in training, and removed in sampling, at the same levels."""
    run = explain(model, run_settings(model, steps=10, sampler="ddim", schedule="trailing"), attention=False)
    (picture,) = drawn_pictures(model, 1)
    x_0 = latents_of(model, [picture])
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(SEED))
    steps = [run.steps[i] for i in (0, 4, 7, 9)]
    noisy = [add_noise(x_0, noise, torch.tensor(step.alpha_bar)) for step in steps]
    rows = [
        [*model.decode(torch.cat(noisy)), picture],
        [*model.decode(torch.cat([step.x_t for step in steps])), run.picture],
        model.decode(torch.cat([step.x_0.float() for step in steps])),
    ]
    names = ["training: noise is added to a picture", "sampling: x_t, decoded", "sampling: x_0, as predicted from x_t"]
    return png(sheet(rows, [*(f"t = {step.timestep:.0f}" for step in steps), "no noise"], names))


def guidance_scales(model: StableDiffusion) -> bytes:
    """Chapter 6: the same noise with increasing guidance."""
    scales = (1.0, 3.0, 7.5, 15.0, 30.0)
    prompts = (
        "a red circle to the left of a white star on a blue background",
        "a green square above a yellow heart on a purple background",
        "a blue star on a striped orange background",
    )
    rows = [
        [model.txt2img(prompt, seed=1, steps=STEPS, guidance_scale=scale)[0] for scale in scales] for prompt in prompts
    ]
    return png(sheet(rows, [f"s = {scale:g}" for scale in scales], prompts))


def training_samples(folder: Path) -> bytes:
    """Chapter 7: the first row of the sample sheets of the UNet's training, below their prompts.

    Raises FileNotFoundError without any sheets or prompts.
    """
    paths = [path for stage in UNET_STAGES for path in sorted((folder / stage).glob("samples-*.png"))]
    if not paths:
        raise FileNotFoundError(f"{folder} has no {UNET_STAGES[0]}/samples-*.png, the sheets that training writes")
    if not (prompts := folder / UNET_STAGES[0] / "prompts.txt").exists():
        raise FileNotFoundError(f"{prompts} does not exist; training writes it beside the sheets")
    most = 6
    if len(paths) > most:
        paths = [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]
    rows, names = [], []
    for path in paths:
        with Image.open(path) as file:
            picture = file.convert("RGB")
        side = picture.width // 4  # sheets have four columns
        rows.append([picture.crop((i * side, 0, (i + 1) * side, side)) for i in range(4)])
        names.append(f"{path.parent.name.replace('-', ' ')}, step {int(path.stem.removeprefix('samples-')):,}")
    return png(sheet(rows, prompts.read_text(encoding="utf-8").splitlines()[:4], names))


def strengths(model: StableDiffusion) -> bytes:
    """Chapter 8: image to image."""
    pictures = drawn_pictures(model, 4)
    prompts = {"a green star on a white background": pictures[0], "a yellow heart on a purple background": pictures[2]}
    shares = (0.2, 0.4, 0.6, 1.0)
    rows = [
        [picture, *(model.img2img(prompt, picture, strength=share, seed=SEED, steps=STEPS)[0] for share in shares)]
        for prompt, picture in prompts.items()
    ]
    return png(sheet(rows, ["picture", *(f"strength {share:g}" for share in shares)], list(prompts)))


def inpainting(model: StableDiffusion) -> bytes:
    """Chapter 8: the right half repainted."""
    picture = drawn_pictures(model, 2)[1]
    prompt = "a black diamond to the left of a green star on a yellow background"
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).rectangle((picture.width // 2, 0, *picture.size), fill=255)
    made = [model.inpaint(prompt, picture, mask, seed=seed, steps=STEPS)[0] for seed in (SEED, SEED + 1)]
    titles = ["picture", "mask, hatched", f"seed {SEED}", f"seed {SEED + 1}"]
    return png(sheet([[picture, hatched(picture, mask), *made]], titles, [prompt]))


def hatched(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture in pale colours, with diagonal lines and a frame where the mask is white."""
    pale = Image.blend(picture, Image.new("RGB", picture.size, PAPER), 0.4)
    lines = Image.new("RGB", picture.size, PAPER)
    pen = ImageDraw.Draw(lines)
    for x in range(-picture.height, picture.width, 10):
        pen.line((x, picture.height, x + picture.height, 0), fill=INK, width=2)
    shown = Image.composite(Image.blend(pale, lines, 0.6), pale, mask)
    ImageDraw.Draw(shown).rectangle(mask.getbbox(alpha_only=False), outline=INK, width=2)
    return shown
