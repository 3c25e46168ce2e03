"""Textual inversion: a file with the vectors of one new word, in every layout in which these are shared.

    {"string_to_param": {"*": (n, D)}, "string_to_token": ..., "name": ..., "step": ...}   the web UI and the original
                                        "string_to_param" may also be a torch.nn.ParameterDict
    {"<word>": (D,) or (n, D)}          diffusers
    {"emb_params": (n, D)}              kohya's scripts
    {"clip_l": (n, 768), "clip_g": (n, 1280)}   for the two text encoders of Stable Diffusion XL
    [{...: (n, D)}, ...]  or  (n, D)    rare ones
    a picture                           see `convert.adapters.image_card`

A word has n vectors and takes n places in a prompt. D is the width of the text encoder's token embedding.

Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion" (2022), 3.2.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Union

from convert.errors import CheckpointError, UnsupportedFileError, WeightMismatchError, joined, named, shown
from convert.files.folder_kinds import CHECKPOINTS
from convert.files.reader import CheckpointFile, errors_named, open_checkpoint
from convert.files.records import Inert, TensorRecord
from convert.layouts.adapter_names import FAMILIES as ADAPTED
from sd.config import ModelConfig

if TYPE_CHECKING:
    import numpy as np

Tensor = Union[TensorRecord, "np.ndarray"]  # in a file, or in a picture
MOST_VECTORS = 75  # a chunk of a prompt has room for as many tokens
WIDEST = 8192  # numbers of one vector; known text encoders have at most 1280
CARDS = (".png", ".webp", ".avif")  # pictures that may hold an embedding
SAVED_AS = "learned_embeds"  # what diffusers calls every file; the word is inside
XL = {"clip_l": 0, "text_encoders_0": 0, "clip_g": 1, "text_encoders_1": 1}  # key -> which of the two text encoders
FAMILIES = {  # widths of the vectors -> the models that they are for
    tuple(encoder.width for encoder in family.text_encoders): family for family in ADAPTED
}
FACTS = ("step", "sd_checkpoint", "sd_checkpoint_name")
PARAMETERS = "torch.nn.modules.container.ParameterDict"


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """The vectors of one word.

    vectors  float32 arrays (n, D), one for each text encoder that they are made for; all have the same n
    inside   what the file calls the word or the embedding; not what a prompt calls it
    """

    name: str  # in a prompt: the file's stem; of a picture, and of a file of diffusers with its usual name, `inside`
    path: Path
    vectors: tuple
    inside: str | None = None
    facts: Mapping[str, object] = field(default_factory=dict)  # "step", "sd_checkpoint_name", ... if the file says so

    @property
    def count(self) -> int:
        """How many places it takes in a prompt."""
        return len(self.vectors[0])

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(each.shape[1] for each in self.vectors)


def read_embedding(path: Path) -> Embedding:
    """Read a file: every number is checked. Nothing in it is executed.

    Raises CheckpointError, which names the file, for what is damaged, is no embedding, or cannot be one.
    """
    from convert.adapters.image_card import is_picture, read_card

    path = Path(path)
    if not is_picture(path):
        with open_checkpoint(path) as file:
            inside, tensors, facts = contents_of(file.root)
            vectors = vectors_of(tensors, file)
        name = inside if inside and path.name.startswith(SAVED_AS) else path.stem
        return Embedding(name=name, path=path, vectors=vectors, inside=inside, facts=facts)
    try:
        card = read_card(path)
        if card is None:
            raise UnsupportedFileError("is a picture without an embedding in it. Give the file of the embedding")
        inside, tensors, facts = contents_of(card)
        vectors = vectors_of(tensors)
    except CheckpointError as error:
        raise error if error.named else named(error, path.name) from None
    return Embedding(name=inside or path.stem, path=path, vectors=vectors, inside=inside, facts=facts)


def bundled(file: CheckpointFile, words: Mapping[str, Mapping[str, TensorRecord]]) -> list[Embedding]:
    """The embeddings in a LoRA's file.

    words  their tensors by word, and by the rest of the name: "clip_l", "string_to_param.*", "emb_params", ...
    """
    with errors_named(file):
        return [
            Embedding(name=name, path=file.path, vectors=vectors_of(by_encoder(tensors), file))
            for name, tensors in words.items()
        ]


def contents_of(root: object) -> tuple[str | None, list[list[Tensor]], dict[str, object]]:
    """What an embedding's file calls itself, its tensors for each text encoder, and what else it says."""
    inside, facts = None, {}
    if isinstance(root, dict):
        if {"optimizer_state_dict", "hash"} <= root.keys():
            raise UnsupportedFileError(
                "is the optimiser's state of a training run. Give the embedding beside it, without .optim"
            )
        facts = {key: root[key] for key in FACTS if type(root.get(key)) in (int, str)}
        inside = root["name"] if isinstance(root.get("name"), str) and root["name"].strip() else None
        if "string_to_param" in root:
            root = root["string_to_param"]
            if isinstance(root, Inert) and str(root.name) == PARAMETERS and isinstance(root.state, dict):
                root = root.state.get("_parameters")
        elif len(root) == 1 and isinstance(key := next(iter(root)), str) and key not in (*XL, "emb_params"):
            inside = key
    if is_tensor(root):
        return inside, [[root]], facts
    if isinstance(root, list | tuple) and root and all(isinstance(each, dict) for each in root):
        return inside, [[each for row in root for each in row.values() if is_tensor(each)]], facts
    tensors = root if isinstance(root, dict) else {}
    return inside, by_encoder({key: each for key, each in tensors.items() if is_tensor(each)}), facts


def is_tensor(value: object) -> bool:
    return hasattr(value, "shape")


def by_encoder(tensors: Mapping[object, Tensor]) -> list[list[Tensor]]:
    """The tensors of one word for each text encoder. Raises UnsupportedFileError if there are others."""
    if len(tensors) <= 1:
        return [list(tensors.values())]
    encoders = {XL[key]: tensor for key, tensor in tensors.items() if key in XL}
    if len(encoders) == len(tensors) == 2:
        return [[encoders[0]], [encoders[1]]]
    from convert.families.recognition import describe

    kind = describe({str(key): tensor.shape for key, tensor in tensors.items()}).name
    if kind.startswith(("unknown", "textual inversion")):
        raise UnsupportedFileError(f"holds {len(tensors)} tensors; an embedding has one, for one word")
    raise UnsupportedFileError(f"holds a {shown(kind)}, not an embedding. Give a file of textual inversion")


def vectors_of(encoders: list[list[Tensor]], file: CheckpointFile | None = None) -> tuple:
    """The vectors for each text encoder: (n, D) float32. Raises CheckpointError if these are not those of one word.

    encoders  for each, the tensors whose vectors follow one another
    file      that they are in, unless they are arrays
    """
    import numpy as np

    counts = [count_of(tensors) for tensors in encoders]
    if len(set(counts)) > 1:
        raise WeightMismatchError(
            f"has {counts[0]} and {counts[1]} vectors for the two text encoders; both need the same number"
        )
    if counts[0] > MOST_VECTORS:
        raise WeightMismatchError(f"has {counts[0]} vectors; a chunk of a prompt has room for {MOST_VECTORS}")
    arrays = tuple(np.concatenate([numbers_of(tensor, file) for tensor in tensors]) for tensors in encoders)
    if not all(np.isfinite(array).all() for array in arrays):
        raise WeightMismatchError("holds numbers that are NaN or infinite. It is damaged: get it again")
    return arrays


def count_of(tensors: list[Tensor]) -> int:
    """How many vectors they have for one text encoder. Raises CheckpointError for tensors that hold none."""
    if not tensors:
        raise UnsupportedFileError("holds no embedding. Give a file of textual inversion")
    for shape, dtype in ((tensor.shape, str(tensor.dtype)) for tensor in tensors):
        if len(shape) not in (1, 2):
            raise WeightMismatchError(
                f"holds a tensor of the shape {list(shape)}; the vectors of a word have the shape [n, width]"
            )
        if 0 in shape:
            raise WeightMismatchError(f"is empty: its tensor has the shape {list(shape)}")
        if shape[-1] > WIDEST:
            raise WeightMismatchError(f"has vectors of {shape[-1]} numbers; text encoders have at most {WIDEST}")
        if not dtype.startswith(("float", "bfloat")):
            raise WeightMismatchError(f"holds {dtype} numbers; the vectors of a word are floating-point numbers")
    if len({tensor.shape[-1] for tensor in tensors}) > 1:
        raise WeightMismatchError("holds vectors of different widths for one text encoder")
    return sum(tensor.shape[0] if len(tensor.shape) == 2 else 1 for tensor in tensors)


def numbers_of(tensor: Tensor, file: CheckpointFile | None) -> "np.ndarray":
    """(n, D) float32"""
    import numpy as np

    if file is None:
        return tensor.reshape(-1, tensor.shape[-1])
    from convert.files.arrays import decoded, raw_pieces

    file.verify(tensor)
    with np.errstate(over="ignore"):  # infinite, which is reported
        pieces = [decoded(piece, tensor.dtype).astype("f4") for piece in raw_pieces(file, tensor)]
    return np.concatenate(pieces).reshape(-1, tensor.shape[-1])


def wrong_family(embedding: Embedding, config: ModelConfig) -> str | None:
    """Why a word does not fit a model, as the predicate of a sentence; None if it does.

    A word of XL fits the refiner, too, which has the second of the two text encoders.
    """
    own = tuple(encoder.width for encoder in (config.text_encoder, config.text_encoder_2) if encoder)
    if embedding.widths == own or (config.unet.vector_width and embedding.widths[1:] == own):
        return None
    made_for, model = (FAMILIES[each].title if each in FAMILIES else None for each in (embedding.widths, own))
    theirs, ours = (joined([str(width) for width in each]) for each in (embedding.widths, own))
    return (
        f"is for {made_for or 'an unknown text encoder'} (vectors of {theirs} numbers); this model is "
        f"{model or config.family} ({ours} numbers). Give a word or a model of the same family"
    )


def embedding_files(place: Path) -> Iterator[Path]:
    """The files in a folder, and in the folders in it, that may be embeddings; in order.

    A picture beside a file of the same name is its preview, as is one called NAME.preview.png.
    """
    seen = set()
    for folder, inner, names in os.walk(place, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # behind a link
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        visible = [Path(name) for name in sorted(names) if not name.startswith(".")]
        files = [path for path in visible if path.suffix.lower() in CHECKPOINTS]
        stems = {path.stem.casefold() for path in files}
        cards = [path for path in visible if path.suffix.lower() in CARDS and path.stem.casefold() not in stems]
        for path in [*files, *(card for card in cards if not card.stem.endswith(".preview"))]:
            yield Path(folder) / path


def words_in(place: Path) -> Iterator[tuple[str, Path]]:
    """Each word in a folder, as a prompt calls it, and its file. Most files are not opened for that."""
    from convert.adapters.image_card import read_card

    for path in embedding_files(place):
        name = path.stem
        try:
            if path.suffix.lower() in CARDS:
                card = read_card(path)
                if card is None:
                    continue
                name = contents_of(card)[0] or name
            elif name.startswith(SAVED_AS):
                with open_checkpoint(path) as file:
                    name = contents_of(file.root)[0] or name
        except CheckpointError:
            pass  # reported if a prompt uses the word, which is then the stem
        yield name, path
