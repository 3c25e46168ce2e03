"""Draw the whole model as an SVG, from its config and block plan.

python scripts/figures/draw_architecture.py docs/architecture.svg
"""

import argparse
from html import escape
from pathlib import Path

from sd.config import SD_V1, ModelConfig
from sd.networks.block_plan import BlockRow, block_plan

WIDTH, HEIGHT = 1440, 680
COLOURS = {  # fill, by what a block does
    "attention": "#f2b866",
    "residual": "#8fb8de",
    "resample": "#c9ced6",
    "text": "#b7d8b0",
    "vae": "#d9b8dc",
    "loop": "#f6f3ea",
}
INK, FAINT = "#24292f", "#9aa4b0"
BOX, STEP = 38, 42  # width of a block, and from one to the next


def text(x: float, y: float, content: str, *, size: int = 13, anchor: str = "middle", weight: str = "normal") -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(content)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{fill}" stroke="{INK}"/>'


def arrow(*points: tuple[float, float]) -> str:
    path = " L ".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="M {path}" fill="none" stroke="{INK}" stroke-width="1.4" marker-end="url(#head)"/>'


def labelled(x: float, y: float, width: float, height: float, fill: str, lines: list[str]) -> str:
    top = y + height / 2 - 8 * (len(lines) - 1) + 5
    rows = [text(x + width / 2, top + 16 * i, line, weight="normal" if i else "bold") for i, line in enumerate(lines)]
    return "\n".join([box(x, y, width, height, fill), *rows])


def unet(config: ModelConfig, left: float, top: float) -> list[str]:
    """The blocks in the order they run, lower for smaller feature maps; skips as arcs."""
    plan = block_plan(config.unet)
    names = [row.name for row in plan]
    skips = {}  # block on the way down -> block on the way up; the last skip is used first
    waiting: list[int] = []
    for i, row in enumerate(plan):
        if row.name.startswith("input"):
            waiting.append(i)
        elif row.skip_channels:
            skips[waiting.pop()] = i
    scales = [row.scale for row in plan]
    for down, up in skips.items():
        scales[up] = plan[down].scale  # that of its input: the block may upsample afterwards
    rows = sorted(set(scales))

    def place(i: int) -> tuple[float, float]:
        return left + i * STEP, top + 100 + 78 * rows.index(scales[i])

    parts = []
    for down, up in skips.items():
        (x1, y1), (x2, _) = place(down), place(up)
        lift = y1 - 14 - 3.2 * (up - down)
        parts.append(
            f'<path d="M {x1 + BOX / 2:g} {y1:g} C {x1 + BOX / 2:g} {lift:g}, {x2 + BOX / 2:g} {lift:g}, '
            f'{x2 + BOX / 2:g} {y1:g}" fill="none" stroke="{FAINT}" stroke-width="1.1"/>'
        )
    for i in range(len(plan) - 1):
        (x1, y1), (x2, y2) = place(i), place(i + 1)
        parts.append(arrow((x1 + BOX, y1 + 24), (x2, y2 + 24)))
    for i, row in enumerate(plan):
        x, y = place(i)
        parts += [box(x, y, BOX, 48, COLOURS[kind(row)]), text(x + BOX / 2, y + 20, short(names[i]), size=11)]
        parts.append(text(x + BOX / 2, y + 37, str(row.out_channels), size=12, weight="bold"))
    for scale in rows:
        side = config.native_size // config.vae.factor // scale
        x, y = place(scales.index(scale))
        parts.append(text(x, y + 64, f"{side} x {side}", size=12, anchor="start"))
    return parts


def kind(row: BlockRow) -> str:
    if "attention" in row.layers:
        return "attention"
    return "residual" if row.layers[0].startswith("residual") else "resample"


def short(name: str) -> str:
    stage, _, number = name.partition(".")
    return {"input_blocks": "in ", "middle_block": "mid", "output_blocks": "out "}[stage] + number


def draw(config: ModelConfig) -> str:
    latent = config.native_size // config.vae.factor
    text_config = config.text_encoder
    left, top = 150, 196
    right = left + 24 * STEP + BOX
    parts = [
        f'<rect x="62" y="{top - 6}" width="{right - 62 + 24:g}" height="455" rx="12" fill="{COLOURS["loop"]}" '
        f'stroke="{FAINT}" stroke-dasharray="5 4"/>',
        text(100, top + 410, "UNet, once a step:", size=16, anchor="start", weight="bold"),
        text(100, top + 432, "predicts the noise in the latents", size=13, anchor="start"),
        *unet(config, left, top),
        labelled(24, 22, 170, 66, COLOURS["text"], ["Prompt", '"a horse"']),
        arrow((194, 55), (230, 55)),
        labelled(230, 22, 170, 66, COLOURS["text"], ["Tokenizer", f"{text_config.context_length} ids"]),
        arrow((400, 55), (436, 55)),
        labelled(
            436, 22, 210, 66, COLOURS["text"], ["CLIP text encoder", f"{text_config.layers} layers, causal attention"]
        ),
        arrow((541, 88), (541, top - 8)),
        text(551, 126, f"context: {text_config.context_length} x {text_config.width}", anchor="start"),
        text(551, 144, "to every block with attention", anchor="start", size=12),
        labelled(24, 112, 170, 62, COLOURS["loop"], ["Noise", f"{config.vae.latent_channels} x {latent} x {latent}"]),
        arrow((110, 174), (110, top + 116), (left - 2, top + 116)),
        labelled(right + 52, 372, 126, 84, COLOURS["loop"], ["Sampler", "one step", "to less noise"]),
        arrow((right, top + 124), (right + 90, top + 124), (right + 90, 370)),
        text(right + 96, top + 112, "predicted noise", size=12, anchor="end"),
        arrow((right + 115, 456), (right + 115, 664), (36, 664), (36, top + 134), (left - 2, top + 134)),
        text(left + 500, 658, "latents, a little less noisy: again, once for every step", size=13),
        arrow((right + 140, 372), (right + 140, 178)),
        text(right + 148, 270, "after the last", size=12, anchor="start"),
        text(right + 148, 286, "step", size=12, anchor="start"),
        labelled(
            right + 20, 110, 190, 66, COLOURS["vae"], ["VAE decoder", f"{config.vae.factor} times larger each way"]
        ),
        arrow((right + 140, 110), (right + 140, 90)),
        labelled(
            right + 20, 22, 190, 66, COLOURS["vae"], ["Picture", f"3 x {config.native_size} x {config.native_size}"]
        ),
    ]
    legend = [
        ("attention", "residual + attention"),
        ("residual", "residual"),
        ("resample", "convolution, down"),
    ]
    for i, (name, words) in enumerate(legend):
        x = 790
        parts += [box(x, 26 + 24 * i, 18, 16, COLOURS[name]), text(x + 26, 39 + 24 * i, words, size=12, anchor="start")]
    parts.append(text(790, 112, "number in a block: channels that leave it", size=12, anchor="start"))
    parts.append(text(790, 130, "grey arcs: skip connections", size=12, anchor="start"))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'font-family="Helvetica, Arial, sans-serif" fill="{INK}">',
            "<title>From a prompt to a picture: text encoder, UNet with its 25 blocks, sampler, VAE decoder</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M 0 0 L 8 4 L 0 8 z" fill="{INK}"/></marker></defs>',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            *parts,
            "</svg>",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.write_text(draw(SD_V1) + "\n", encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
