"""Training pictures from a folder, with their captions: for fine-tuning.

photos/cat.jpg  photos/cat.txt            a caption beside each picture, or
photos/metadata.jsonl                     {"file_name": "cat.jpg", "text": "a cat"} a line, for all of them
"""

import json
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from sd.pipeline.image.reading import PictureError, read_picture
from sd.pipeline.image.tensors import to_tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class PictureFolder:
    """The pictures of a folder, each cropped to its central square and resized to `size`; in a new order every epoch.

    Raises ValueError if there are none, one has no caption, or one cannot be read.
    """

    def __init__(self, folder: Path, size: int, seed: int = 0):
        self.folder, self.size, self.seed = folder, size, seed
        self.captions = read_captions(folder)
        self.names = sorted(self.captions)
        for name in self.names:
            self.open(name)  # an unreadable picture fails now, not hours later

    def batch(self, step: int, batch_size: int, share: slice) -> tuple[Tensor, list[str]]:
        """(b, 3, size, size) in [-1, 1] and captions: one process's share of a global batch."""
        names = [self.name(number) for number in range(step * batch_size, (step + 1) * batch_size)[share]]
        return torch.stack([self.open(name) for name in names]), [self.captions[name] for name in names]

    def name(self, number: int) -> str:
        """The name of picture `number` of the training: every epoch shows each picture once."""
        epoch, place = divmod(number, len(self.names))
        generator = torch.Generator("cpu").manual_seed(self.seed * 2**31 + epoch)
        return self.names[torch.randperm(len(self.names), generator=generator, dtype=torch.int64, device="cpu")[place]]

    def open(self, name: str) -> Tensor:
        """(3, size, size) in [-1, 1]; resized so that the shorter side fits, then cropped."""
        try:
            picture, _ = read_picture(self.folder / name)
        except PictureError as error:
            raise ValueError(f"{self.folder / name} cannot be read as a picture: {error}") from None
        return to_tensor(ImageOps.fit(picture, (self.size, self.size), Image.Resampling.LANCZOS))[0]


def read_captions(folder: Path) -> dict[str, str]:
    """File name -> caption."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Give one with pictures and their captions.")
    listed = folder / "metadata.jsonl"
    if listed.exists():
        captions = {}
        for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                captions[row["file_name"]] = str(row["text"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f'{listed}, line {number}: expected {{"file_name": "cat.jpg", "text": "a cat"}}, got {line[:80]!r}.'
                ) from None
        missing = [name for name in captions if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{listed} names {len(missing)} files that do not exist, {missing[0]!r} among them.")
    else:
        pictures = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
        bare = sorted(path.name for path in pictures if not path.with_suffix(".txt").exists())
        if bare:
            raise ValueError(
                f"{len(bare)} of {len(pictures)} pictures in {folder} have no caption, {bare[0]!r} among them. "
                "Put each into a .txt file of the same name, or all into metadata.jsonl."
            )
        captions = {path.name: path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in pictures}
    if not captions:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}).")
    return captions
