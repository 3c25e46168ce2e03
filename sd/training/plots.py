"""Draw a curve with Pillow alone."""

import math
from collections.abc import Sequence
from itertools import groupby

from PIL import Image, ImageDraw

INK, LINE, FAINT = (36, 41, 47), (31, 111, 178), (220, 224, 228)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 800, 420, 70, 20, 20, 40


def draw_curve(points: Sequence[tuple[float, float]], *, label: str = "loss") -> Image.Image:
    """points (x, y), y > 0, in the order of x -> a line over linear x and logarithmic y.

    With more points than pixels, each pixel shows the mean of its points.
    """
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    if not points:
        return picture
    last = max(points[-1][0], 1)
    means = []
    for column, group in groupby(points, key=lambda point: round(point[0] / last * inner_width)):
        values = [y for _, y in group]
        means.append((column, sum(values) / len(values)))
    low, high = (math.log10(bound(y for _, y in means)) for bound in (min, max))
    low, high = low - 0.02, high + 0.02

    def height(y: float) -> float:
        return TOP + inner_height * (high - math.log10(y)) / (high - low)

    for mark in ticks(low, high):
        pen.line([(LEFT, height(mark)), (WIDTH - RIGHT, height(mark))], fill=FAINT)
        pen.text((LEFT - 8, height(mark)), f"{mark:g}", fill=INK, anchor="rm")
    for i in range(6):
        x = LEFT + inner_width * i / 5
        pen.text((x, HEIGHT - BOTTOM + 8), f"{last * i / 5:,.0f}", fill=INK, anchor="mt")
    pen.line([(LEFT + column, height(y)) for column, y in means], fill=LINE, width=2)
    pen.text((WIDTH - RIGHT, TOP), label, fill=INK, anchor="rt")
    return picture


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two logarithms."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    return [
        digit * 10.0**power for power in powers for digit in (1, 2, 5) if low <= math.log10(digit * 10.0**power) <= high
    ]
