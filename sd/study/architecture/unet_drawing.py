"""The blocks of a UNet, drawn as a U: down on the left, up on the right, skip connections between."""

from dataclasses import dataclass

from sd.config import ModelConfig
from sd.networks.block_plan import BlockRow, block_plan
from sd.study.architecture.sheet import Point, Sheet

LEGEND = (("attention", "residual + attention"), ("residual", "residual"), ("plain", "convolution"))


@dataclass(frozen=True, kw_only=True)
class Measures:
    width: float  # of the U
    tile: float  # width of a block
    height: float  # of a block
    pitch: float  # from a block to the one below
    indent: float  # how much further in the blocks of the next smaller feature maps are

    def depth(self, plan: list[BlockRow]) -> float:
        """The height of the U."""
        return self.pitch * (len(skips(plan)) + 1) + 6


def unet(sheet: Sheet, config: ModelConfig, x: float, y: float, by: Measures) -> tuple[Point, Point]:
    """Draw the blocks. Returns the points where the first one is entered and the last one is left."""
    plan = block_plan(config.unet)
    pairs, middle = skips(plan), next(i for i, row in enumerate(plan) if row.name == "middle_block")
    scales = sorted({plan[down].scale for down in pairs})
    places: dict[int, Point] = {middle: (x + (by.width - by.tile) / 2, y + by.pitch * len(pairs) + 6)}
    for row, (down, up) in enumerate(pairs.items()):
        inset = by.indent * scales.index(plan[down].scale)
        places[down] = x + inset, y + by.pitch * row
        places[up] = x + by.width - inset - by.tile, y + by.pitch * row
        level = y + by.pitch * row + by.height / 2
        sheet.arrow((places[down][0] + by.tile, level), (places[up][0], level), stroke="faint", dotted=True)
    for scale in scales:
        rows = [down for down in pairs if plan[down].scale == scale]
        side = config.native_size // config.vae.factor // scale
        size(sheet, f"{side} × {side}", x + by.width / 2, places[rows[len(rows) // 2]][1] + by.height / 2)
    for i in range(len(plan) - 1):
        sheet.arrow(*way(places[i], places[i + 1], by, down=i < middle, turns=middle in (i, i + 1)))
    for i, row in enumerate(plan):
        block(sheet, row, *places[i], by)
    (x1, y1), (x2, y2) = places[0], places[len(plan) - 1]
    return (x1, y1 + by.height / 2), (x2 + by.tile, y2 + by.height / 2)


def way(start: Point, end: Point, by: Measures, *, down: bool, turns: bool) -> list[Point]:
    """From one block to the next."""
    (x1, y1), (x2, y2) = start, end
    if turns and down:  # into the middle block, from the left
        corner = x1 + by.tile / 4, y2 + by.height / 2
        return [(corner[0], y1 + by.height), corner, (x2, corner[1])]
    if turns:
        corner = x2 + 3 * by.tile / 4, y1 + by.height / 2
        return [(x1 + by.tile, corner[1]), corner, (corner[0], y2 + by.height)]
    across = (x1 + x2 + by.tile) / 2
    return [(across, y1 + by.height), (across, y2)] if down else [(across, y1), (across, y2 + by.height)]


def size(sheet: Sheet, words: str, x: float, y: float) -> None:
    """The size of a level's feature maps, over its skip connections."""
    width = 8 * len(words)
    sheet.rectangle(x - width / 2, y - 9, width, 18, "loop", stroke="none")
    sheet.note(x, y + 4, words)


def block(sheet: Sheet, row: BlockRow, x: float, y: float, by: Measures) -> None:
    stage, _, number = row.name.partition(".")
    name = {"input_blocks": "input ", "middle_block": "middle", "output_blocks": "output "}[stage] + number
    end = sheet.begin(f"unet.{row.name}")
    sheet.rectangle(x, y, by.tile, by.height, kind(row))
    sheet.text(x + 8, y + by.height / 2 + 4.5, name, size=12, anchor="start")
    sheet.text(x + by.tile - 8, y + by.height / 2 + 4.5, str(row.out_channels), size=12, anchor="end", bold=True)
    sheet.parts.append(end)


def kind(row: BlockRow) -> str:
    """What a block does, by which it is coloured."""
    if "attention" in row.layers:
        return "attention"
    return "residual" if row.layers[0].startswith("residual") else "plain"


def skips(plan: list[BlockRow]) -> dict[int, int]:
    """Which block on the way up takes the output of which block on the way down: the last one made is used first."""
    found, waiting = {}, []
    for i, row in enumerate(plan):
        if row.name.startswith("input"):
            waiting.append(i)
        elif row.skip_channels:
            found[waiting.pop()] = i
    return dict(sorted(found.items()))


def legend(sheet: Sheet, x: float, y: float, predicted: str) -> None:
    """What colours, lines and numbers mean, and what the UNet predicts; 110 high."""
    for i, (name, words) in enumerate(LEGEND):
        sheet.rectangle(x, y + 20 * i, 18, 14, name)
        sheet.note(x + 26, y + 11 + 20 * i, words, anchor="start")
    sheet.arrow((x, y + 67), (x + 18, y + 67), stroke="faint", dotted=True)
    sheet.note(x + 26, y + 71, "skip connection", anchor="start")
    sheet.note(x, y + 92, "bold: channels that leave a block", anchor="start")
    sheet.note(x, y + 110, predicted, anchor="start")
