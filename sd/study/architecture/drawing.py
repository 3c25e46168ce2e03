"""The whole model as one drawing, an SVG: from a prompt, noise and a timestep to a picture.

It is drawn from the config and the block plan, wide for a screen and tall for a phone. In a page, its parts are links.
"""

from dataclasses import dataclass

from sd.config import ModelConfig
from sd.networks.block_plan import block_plan
from sd.study.architecture.sheet import LINE, Sheet, Target
from sd.study.architecture.unet_drawing import Measures, legend, unet

PREDICTED = {"eps": "ε", "v": "v", "edm": "v", "x0": "x₀"}
MEANS = {"ε": "the predicted noise", "v": "the predicted velocity", "x₀": "the predicted clean latents"}
BESIDE = {1: "+ depth", 4: "+ picture", 5: "+ mask, picture"}  # what else the UNet reads, by its further channels
SAMPLER = ("Sampler", "one step to less noise")
TITLE = "From a prompt to a picture: text encoder, UNet with its {} blocks, guidance, sampler, VAE decoder"


def drawing(config: ModelConfig, *, tall: bool = False, target: Target = lambda path: None) -> str:
    """The model as an SVG, 1080 units wide, or 400 if tall."""
    sheet = Sheet(target, "tall" if tall else "wide")
    width, height = _tall(sheet, config) if tall else _wide(sheet, config)
    return sheet.svg(width, height, TITLE.format(len(block_plan(config.unet))))


@dataclass(frozen=True, kw_only=True)
class Words:
    """The lines of the boxes, as this model has them."""

    latents: list[str]
    timestep: list[str]
    prompt: list[str]
    tokenizer: list[str]
    encoder: list[str]
    unet: list[str]
    predictions: list[str]  # of one step
    predicted: str  # what the symbol stands for
    guidance: list[str]
    decoder: list[str]
    picture: list[str]


def words_for(config: ModelConfig) -> Words:
    side, channels = config.native_size // config.vae.factor, config.vae.latent_channels
    one, two, unet = config.text_encoder, config.text_encoder_2, config.unet
    beside, symbol = BESIDE.get(unet.in_channels - channels), PREDICTED[config.prediction]
    runs = "runs twice a step: with the prompt, and without"
    predictions = [f"{symbol} with prompt", f"{symbol} without"]
    guidance = [f"{symbol} without + 7.5 ×", f"({symbol} with − {symbol} without)"]
    if unet.in_channels == 2 * channels:  # a picture to edit
        runs, guidance = "runs three times a step", ["a scale for the prompt,", "another for the picture"]
        predictions = [f"{symbol} with both", f"{symbol} picture", f"{symbol} neither"]
    elif unet.guidance_width:
        runs, predictions = "runs once a step", [f"{symbol} guided"]
        guidance = ["its scale is told", "to the UNet"]
    return Words(
        latents=["Latents", f"{channels} × {side} × {side}", "first pure noise", *([beside] if beside else [])],
        timestep=["Timestep", f"{config.schedule.timesteps - 1} … 0", *["and sizes"] * bool(unet.vector_width)],
        prompt=["Prompt", "“a horse”"] if unet.guidance_width else ["Prompt", "“a horse”, “”"],
        tokenizer=["Tokenizer", f"{one.context_length} ids"],
        encoder=["Text encoders" if two else "Text encoder", f"{one.layers}{f' + {two.layers}' if two else ''} layers"],
        unet=[f"UNet: {len(block_plan(unet))} blocks", runs],
        predictions=predictions,
        predicted=f"{symbol}: {MEANS[symbol]}",
        guidance=["Guidance", *guidance],
        decoder=["VAE decoder", f"{config.vae.factor} × larger sides"],
        picture=["Picture", f"{config.vae.image_channels} × {config.native_size} × {config.native_size}"],
    )


def _wide(sheet: Sheet, config: ModelConfig) -> tuple[float, float]:
    """Draw it for a screen: what goes in on the left, the UNet, what comes out on the right."""
    words, context = words_for(config), f"{config.text_encoder.context_length} × {config.unet.context_width}"
    left, wide, x, y, width, right, room = 34, 170, 314, 34, 430, 872, 188
    by = Measures(width=width - 44, tile=130, height=27, pitch=36, indent=13)
    bottom = y + 84 + by.depth(block_plan(config.unet)) + 18
    for shift in (8, 0):  # a copy behind, for the other prediction
        sheet.rectangle(x + shift, y + shift, width, bottom - y, "loop", stroke="faint")
    end = sheet.begin("unet")
    sheet.text(x + width / 2, y + 28, words.unet[0], size=16, bold=True)
    sheet.parts.append(end)
    sheet.text(x + width / 2, y + 50, words.unet[1])
    first, last = unet(sheet, config, x + 22, y + 84, by)

    boxes = [
        ("loop", words.latents, "latents"),
        ("loop", words.timestep, "unet.time_embed"),
        ("text", words.prompt, ""),
    ]
    boxes += [
        ("text", words.tokenizer, "tokenizer"),
        ("text", [*words.encoder, f"{'give' if config.text_encoder_2 else 'gives'} {context}"], "text_encoder"),
    ]
    heights = [26 + LINE * len(lines) for _, lines, _ in boxes]
    gap, top, middle = (bottom - first[1] + 40 - sum(heights)) / 4, first[1] - 40, left + wide / 2
    beside = {1: ("t", "to residuals"), 4: ("context", "to attention")}
    for i, ((fill, lines, path), height) in enumerate(zip(boxes, heights, strict=True)):
        sheet.box(left, top, wide, height, fill, lines, path)
        level = top + height / 2
        if i == 0:
            sheet.arrow((left + wide, first[1]), first)
            entry = level
        elif i in beside:
            sheet.arrow((left + wide, level), (x, level))
            sheet.note((left + wide + x) / 2 - 3, level - 8, beside[i][0])
            sheet.note((left + wide + x) / 2 - 3, level + 17, beside[i][1])
        else:
            sheet.arrow((middle, top + height), (middle, top + height + gap))
        top += height + gap

    for i, prediction in enumerate(words.predictions):
        level = last[1] + 24 * i
        sheet.arrow(last if i == 0 else (x + width + 8, level), (right, level))
        sheet.note((x + width + 8 + right) / 2 - 3, level - 7, prediction)
    boxes = [("loop", words.guidance, "guidance"), ("loop", SAMPLER, "sampler")]
    boxes += [("vae", words.decoder, "vae.decoder"), ("vae", words.picture, "")]
    top, middle, far = last[1] - 30, right + room / 2, right + room + 12
    for i, (fill, lines, path) in enumerate(boxes):
        height = 28 + LINE * len(lines)
        sheet.box(right, top, room, height, fill, lines, path)
        level, rise = top + height / 2, 52 if i == 1 else 30
        if i == 1:
            sheet.arrow((right + room, level), (far, level), (far, 16), (12, 16), (12, entry), (left, entry))
            sheet.note(right + room, 34, "a little less noisy: the next step", anchor="end")
            sheet.note(middle + 9, top + height + 22, "after the", anchor="start")
            sheet.note(middle + 9, top + height + 38, "last step", anchor="start")
        if i < 3:
            sheet.arrow((middle, top + height), (middle, top + height + rise))
            top += height + rise
    below = max(bottom - 102, top + height + 20)
    legend(sheet, right, below, words.predicted)
    return far + 12, max(bottom + 24, below + 122)


def _tall(sheet: Sheet, config: ModelConfig) -> tuple[float, float]:
    """Draw it for a phone, from top to bottom."""
    words, context = words_for(config), f"{config.text_encoder.context_length} × {config.unet.context_width}"
    left, wide = 28, 110
    first_column, second_column, third_column = (left + i * (wide + 15) for i in range(3))
    right = third_column + wide
    for column, lines, path in (
        (first_column, words.prompt, ""),
        (second_column, words.tokenizer, "tokenizer"),
        (third_column, words.encoder, "text_encoder"),
    ):
        sheet.box(column, 12, wide, 56, "text", lines, path)
        if column < third_column:
            sheet.arrow((column + wide, 40), (column + wide + 15, 40))
    heights = [22 + LINE * len(lines) for lines in (words.latents, words.timestep)]
    y = 98 + max(heights) + 46
    by = Measures(width=right - left - 20, tile=118, height=25, pitch=32, indent=7)
    bottom = y + 62 + by.depth(block_plan(config.unet)) + 14
    for shift in (6, 0):
        sheet.rectangle(left + shift, y + shift, right - left, bottom - y, "loop", stroke="faint")
    end = sheet.begin("unet")
    sheet.text((left + right) / 2, y + 23, words.unet[0], size=15, bold=True)
    sheet.parts.append(end)
    sheet.note((left + right) / 2, y + 42, words.unet[1])
    first, last = unet(sheet, config, left + 10, y + 62, by)
    sheet.box(first_column, 98, wide, heights[0], "loop", words.latents, "latents")
    sheet.arrow((left + 4, 98 + heights[0]), (left + 4, first[1]), first)
    sheet.box(second_column, 98, wide, heights[1], "loop", words.timestep, "unet.time_embed")
    middle = second_column + wide / 2
    sheet.arrow((middle, 98 + heights[1]), (middle, y))
    sheet.note(middle + 7, y - 25, "t", anchor="start")
    sheet.note(middle + 7, y - 9, "to residuals", anchor="start")
    sheet.arrow((right - 16, 68), (right - 16, y))
    sheet.note(right - 23, 118, "context", anchor="end")
    sheet.note(right - 23, 134, "to attention", anchor="end")
    sheet.note(right - 23, 150, context, anchor="end")

    sheet.arrow(last, (right - 5, last[1]), (right - 5, bottom), head=False)
    top = bottom + 44
    for i, prediction in enumerate(words.predictions):
        x = left + 15 + i * (right - left - 40) / len(words.predictions)
        sheet.arrow((x, bottom + 6 * (i > 0)), (x, top))
        sheet.note(x + 7, top - 14, prediction, anchor="start")
    sheet.box(left, top, right - left, 52, "loop", [words.guidance[0], " ".join(words.guidance[1:])], "guidance")
    sheet.arrow(((left + right) / 2, top + 52), ((left + right) / 2, top + 76))
    top += 76
    sheet.box(left, top, right - left, 52, "loop", SAMPLER, "sampler")
    sheet.arrow((left, top + 26), (16, top + 26), (16, 114), (left, 114))
    turned = f'transform="translate(11 {top}) rotate(-90)" font-size="12"'
    sheet.parts.append(f"<text {turned}>a little less noisy: the next step</text>")
    sheet.arrow((left + 80, top + 52), (left + 80, top + 92))
    sheet.note(left + 89, top + 77, "after the last step", anchor="start")
    top += 92
    half = (right - left - 30) / 2
    sheet.box(left, top, half, 52, "vae", words.decoder, "vae.decoder")
    sheet.arrow((left + half, top + 26), (right - half, top + 26))
    sheet.box(right - half, top, half, 52, "vae", words.picture)
    legend(sheet, left, top + 74, words.predicted)
    return 400, top + 200
