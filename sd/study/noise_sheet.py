"""One sheet that shows what noise and the VAE do to a picture, drawn with Pillow alone."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from sd.study.forward_process import NoiseLevel, RoundTrip, channel_pictures

PAPER, INK, SOFT = (251, 250, 247), (36, 41, 47), (91, 101, 112)
CELL, GAP, MARGIN, LINE, TITLE = 176, 14, 24, 17, 34


def sheet(levels: Sequence[NoiseLevel], trip: RoundTrip) -> Image.Image:
    """The strip from x_0 to x_T with its latents below it, then the round trip through the VAE."""
    shape = trip.picture.size
    scale = CELL / max(shape)
    cell = tuple(max(1, round(scale * side)) for side in shape)
    columns = max(len(levels), 6)
    width = 2 * MARGIN + columns * (CELL + GAP) - GAP
    latent_rows = [(level, four(level.latents, cell)) for level in levels]
    height = 2 * MARGIN + 3 * (TITLE + cell[1]) + 6 * LINE + 2 * GAP + GAP // 2 + 10
    picture = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(picture)

    def place(column: int) -> int:
        return MARGIN + column * (CELL + GAP)

    def write(x: int, y: int, lines: Sequence[str]) -> int:
        for i, line in enumerate(lines):
            pen.text((x, y), line, fill=SOFT if i else INK, font=ImageFont.load_default(13))
            y += LINE
        return y

    def title(y: int, text: str) -> int:
        pen.text((MARGIN, y), text, fill=INK, font=ImageFont.load_default(19))
        return y + TITLE

    y = title(MARGIN, "The forward process: sqrt(alpha_bar) * x_0 + sqrt(1 - alpha_bar) * noise, decoded")
    for column, level in enumerate(levels):
        picture.paste(fitted(level.picture, cell), (place(column), y))
        write(place(column), y + cell[1] + 5, level_lines(level))
    y = title(y + cell[1] + 5 + 3 * LINE + GAP, "The same latents, as the network sees them: four channels")
    for column, (_, latents) in enumerate(latent_rows):
        picture.paste(latents, (place(column), y))
    y = title(y + cell[1] + GAP, "The VAE: picture, four latent channels, reconstruction")
    row = [trip.picture, *channel_pictures(trip.latents), trip.reconstruction]
    names = [
        ["picture"],
        *[[f"channel {i + 1}"] for i in range(len(row) - 2)],
        ["reconstruction", f"PSNR {trip.psnr:.2f} dB"],
    ]
    for column, (shown, lines) in enumerate(zip(row, names, strict=True)):
        picture.paste(fitted(shown, cell), (place(column), y))
        write(place(column), y + cell[1] + 5, lines)
    write(MARGIN, y + cell[1] + 5 + 2 * LINE + GAP // 2, [arithmetic(trip)])
    return picture


def level_lines(level: NoiseLevel) -> list[str]:
    name = "x_0" if level.timestep is None else f"x_t, t = {level.timestep}"
    ratio = f"signal to noise {level.signal_to_noise:.4g}" if level.alpha_bar < 1 else "no noise"
    return [name, f"alpha_bar {level.alpha_bar:.5f}", ratio]


def arithmetic(trip: RoundTrip) -> str:
    (numbers, latent_numbers), (places, latent_places) = trip.numbers, trip.positions
    width, height = trip.picture.size
    _, channels, rows, columns = trip.latents.shape
    return (
        f"{width} x {height} x 3 = {numbers:,} numbers become {columns} x {rows} x {channels} = {latent_numbers:,}: "
        f"{numbers / latent_numbers:g} times fewer; {places / latent_places:g} times fewer positions."
    )


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize pictures smoothly, latents as squares."""
    smooth = picture.mode == "RGB"
    return picture.resize(size, Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST).convert("RGB")


def four(latents, size: tuple[int, int]) -> Image.Image:
    """The four channels of latents, two by two."""
    quarter = tuple(side // 2 for side in size)
    whole = Image.new("RGB", size, PAPER)
    for i, channel in enumerate(channel_pictures(latents)[:4]):
        whole.paste(fitted(channel, quarter), (i % 2 * quarter[0], i // 2 * quarter[1]))
    return whole
