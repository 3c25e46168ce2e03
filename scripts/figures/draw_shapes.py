"""Draw a sheet of the training data, to look at it: pictures with their captions below.

python scripts/figures/draw_shapes.py shapes.png [--count 48] [--size 128] [--seed 0] [--held-out]
"""

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sd.files import written_whole
from sd.pipeline.image.tensors import contact_sheet, to_images
from sd.training.shapes.drawing import ShapesDataset


def with_caption(picture: Image.Image, caption: str, lines: int) -> Image.Image:
    font = ImageFont.load_default(11)
    tile = Image.new("RGB", (picture.width + 12, picture.height + 14 * lines + 12), "white")
    tile.paste(picture, (6, 6))
    for i, line in enumerate(wrap(caption, picture.width)):
        ImageDraw.Draw(tile).text((6, picture.height + 8 + 14 * i), line, fill="black", font=font)
    return tile


def wrap(caption: str, width: int) -> list[str]:
    return textwrap.wrap(caption, width // 6)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="only combinations that training never shows")
    args = parser.parse_args()
    images, captions = ShapesDataset(args.seed, args.size, held_out=args.held_out).batch(0, args.count)
    lines = max(len(wrap(caption, args.size)) for caption in captions)
    tiles = [with_caption(*pair, lines) for pair in zip(to_images(images), captions, strict=True)]
    with written_whole(args.out, force=True) as file:
        contact_sheet(tiles, columns=min(8, args.count)).save(file, "PNG")
    print(args.out)


if __name__ == "__main__":
    main()
