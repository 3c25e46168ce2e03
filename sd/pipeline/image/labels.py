"""A line or two of text to put under a picture."""

from PIL import Image, ImageDraw, ImageFont

SMALLEST, LARGEST = 11, 20  # height of the letters in pixels
MOST_LINES, MOST_CHARACTERS = 2, 300


def label(text: str, width: int) -> Image.Image:
    """The text in white on a black strip of this width in pixels; what does not fit into two lines is cut off."""
    font = ImageFont.load_default(min(LARGEST, max(SMALLEST, width // 24)))
    margin = int(font.size) // 3
    lines = wrapped(" ".join(text[:MOST_CHARACTERS].split()), width - 2 * margin, font)
    pitch = sum(font.getmetrics())
    strip = Image.new("RGB", (width, pitch * len(lines) + margin))
    draw = ImageDraw.Draw(strip)
    for i, line in enumerate(lines):
        draw.text((margin, i * pitch), line, fill="white", font=font)
    return strip


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """The text in lines that fit into the width; the last one ends with three dots if there is more."""
    lines, words = [""], text.split(" ")
    while words:
        longer = f"{lines[-1]} {words[0]}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
            words.pop(0)
        elif len(lines) < MOST_LINES:
            lines.append("")
        else:
            lines[-1] += "..."
            break
    return [cut(line, width, font) for line in lines]


def cut(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """A line that fits into the width."""
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix("...")
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."
