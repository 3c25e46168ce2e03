"""The course's pictures, drawn with Pillow: each function returns the bytes of one PNG, always the same."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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
CELL, GAP, LINE, LEFT = 128, 6, 20, 96
PAPER, INK, SOFT = (255, 255, 255), (36, 41, 47), (208, 215, 222)
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


def sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str] = (), names: Sequence[str] = ()) -> Image.Image:
    """Pictures in rows, with optional titles above columns and names before rows.

    Latents are enlarged as squares, pictures smoothly.
    """
    left, top = LEFT if names else 0, LINE if titles else 0
    columns = max(map(len, rows))
    whole = Image.new("RGB", (left + columns * (CELL + GAP) - GAP, top + len(rows) * (CELL + GAP) - GAP), PAPER)
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(12)
    for i, title in enumerate(titles):
        pen.text((left + i * (CELL + GAP), 2), title, fill=INK, font=font)
    for j, row in enumerate(rows):
        y = top + j * (CELL + GAP)
        if names:
            pen.multiline_text((0, y + CELL // 2), names[j], fill=INK, font=font, anchor="lm")
        for i, picture in enumerate(row):
            method = Image.Resampling.LANCZOS if picture.mode == "RGB" else Image.Resampling.NEAREST
            shown = picture if picture.size == (CELL, CELL) else picture.resize((CELL, CELL), method)
            whole.paste(shown.convert("RGB"), (left + i * (CELL + GAP), y))
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
    return png(sheet(rows, ["picture", *(f"latents, channel {i}" for i in range(1, 5)), "decoded"]))


def vae_round_trip(model: StableDiffusion) -> bytes:
    """Chapter 2: what the VAE keeps."""
    pictures = drawn_pictures(model, 6)
    decoded = model.decode(latents_of(model, pictures))
    differences = [
        Image.fromarray((5 * np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))).clip(0, 255).astype(np.uint8))
        for a, b in zip(pictures, decoded, strict=True)
    ]
    return png(sheet([pictures, decoded, differences], names=["picture", "decoded", "difference,\nfive times"]))


def vae_between(model: StableDiffusion) -> bytes:
    """Chapter 2: pictures along the straight line between two latents."""
    pictures = drawn_pictures(model, 4)
    latents = latents_of(model, pictures)
    rows = []
    for a, b in ((0, 2), (1, 3)):
        points = [latents[a : a + 1].lerp(latents[b : b + 1], share / 6) for share in range(7)]
        rows.append(model.decode(torch.cat(points)))
    return png(sheet(rows, [f"{share} / 6" for share in range(7)]))


def tokens() -> bytes:
    """Chapter 3: a prompt as the text encoder reads it."""
    tokenizer = Tokenizer()
    tokenized = tokenizer.tokenize(PROMPT)
    inner = tokenized.ids[1 : tokenized.length - 1]
    boxes = [("start", tokenized.ids[0])]
    boxes += [(text.strip(), token) for token, text in tokenizer.pieces_of(inner)]
    boxes.append(("end", tokenized.ids[tokenized.length - 1]))
    padding = len(tokenized.ids) - tokenized.length
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    whole = Image.new("RGB", (920, 124), PAPER)
    pen = ImageDraw.Draw(whole)
    x = 4.0
    for word, token in boxes:
        width = max(pen.textlength(word, font=font), pen.textlength(str(token), font=small)) + 22
        fill = "#c9ced6" if word in ("start", "end") else "#b7d8b0"
        pen.rounded_rectangle((x, 8, x + width, 62), 5, fill=fill, outline=INK)
        pen.text((x + width / 2, 27), word, fill=INK, font=font, anchor="mm")
        pen.text((x + width / 2, 48), str(token), fill=INK, font=small, anchor="mm")
        x += width + 5
    pen.text((x + 6, 35), f"= {len(boxes)} tokens,", fill=INK, font=small, anchor="lm")
    for i in range(padding):
        pen.rectangle((4 + 10 * i, 76, 11 + 10 * i, 98), fill="#eceef1", outline=INK)
    words = f"and {padding} times {tokenized.ids[-1]} as padding: {len(tokenized.ids)} in all"
    pen.text((4, 112), words, fill=INK, font=small, anchor="lm")
    return png(whole)


def run_settings(model: StableDiffusion, **options: object) -> Settings:
    side = model.config.native_size
    return Settings(**{"prompt": PROMPT, "width": side, "height": side, "seed": SEED, "steps": STEPS, **options})


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
    return png(sheet([[run.picture, *maps]], ["picture", *names]))


def denoising(model: StableDiffusion) -> bytes:
    """Chapter 5: noise added to a picture in training, and removed in sampling, at the same levels."""
    run = explain(model, run_settings(model, steps=10, sampler="ddim", schedule="trailing"), attention=False)
    (picture,) = drawn_pictures(model, 1)
    x_0 = latents_of(model, [picture])
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(SEED))
    steps = [run.steps[i] for i in (0, 2, 4, 6, 7, 8, 9)]
    noisy = [add_noise(x_0, noise, torch.tensor(step.alpha_bar)) for step in steps]
    rows = [
        [*model.decode(torch.cat(noisy)), picture],
        [*model.decode(torch.cat([step.x_t for step in steps])), run.picture],
        model.decode(torch.cat([step.x_0.float() for step in steps])),
    ]
    names = ["training:\na picture,\nnoise added", "sampling:\nx_t", "sampling:\nx_0, as\npredicted"]
    return png(sheet(rows, [*(f"t = {step.timestep:.0f}" for step in steps), "no noise"], names))


def guidance_scales(model: StableDiffusion) -> bytes:
    """Chapter 6: the same noise with increasing guidance."""
    scales = (1.0, 2.0, 4.0, 7.5, 15.0)
    rows = [
        [model.txt2img(prompt, seed=SEED, steps=STEPS, guidance_scale=scale)[0] for scale in scales]
        for prompt in (PROMPT, "a yellow star on a purple background")
    ]
    return png(sheet(rows, [f"s = {scale:g}" for scale in scales]))


def training_samples(folder: Path) -> bytes:
    """Chapter 7: the first row of some of the training's sample sheets. Raises FileNotFoundError without any."""
    paths = sorted(folder.glob("samples-*.png"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no samples-*.png, the sheets that training writes")
    most = 5
    if len(paths) > most:
        paths = [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]
    rows, names = [], []
    for path in paths:
        with Image.open(path) as file:
            picture = file.convert("RGB")
        side = picture.width // 4  # sheets are 4 x 4 pictures
        rows.append([picture.crop((i * side, 0, (i + 1) * side, side)) for i in range(4)])
        names.append(f"step {int(path.stem.removeprefix('samples-')):,}")
    return png(sheet(rows, names=names))


def strengths(model: StableDiffusion) -> bytes:
    """Chapter 8: image to image."""
    pictures = drawn_pictures(model, 4)
    shares = (0.2, 0.4, 0.6, 0.8, 1.0)
    rows = [
        [
            picture,
            *(model.img2img(prompt, picture, strength=share, seed=SEED, steps=STEPS)[0] for share in shares),
        ]
        for picture, prompt in (
            (pictures[0], "a green star on a white background"),
            (pictures[2], "a yellow heart on a purple background"),
        )
    ]
    return png(sheet(rows, ["picture", *(f"strength {share:g}" for share in shares)]))


def inpainting(model: StableDiffusion) -> bytes:
    """Chapter 8: the right half repainted."""
    picture = drawn_pictures(model, 2)[1]
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).rectangle((picture.width // 2, 0, *picture.size), fill=255)
    made = [
        model.inpaint("a green star on a yellow background", picture, mask, seed=seed, steps=STEPS)[0]
        for seed in (SEED, SEED + 1)
    ]
    return png(sheet([[picture, mask, *made]], ["picture", "mask", f"seed {SEED}", f"seed {SEED + 1}"]))
