"""Words of textual inversion from files, for a model that is loaded."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convert.adapters.embedding import Embedding, bundled, read_embedding, words_in, wrong_family
from convert.errors import WeightMismatchError, named, shown
from convert.files.hashing import file_sha256
from convert.files.reader import CheckpointFile
from convert.files.records import TensorRecord
from sd.config import ModelConfig
from sd.pipeline.errors import SettingError, shortened
from sd.pipeline.learning import teach
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.runtime.weights import Weights
from sd.text.learned_words import LearnedWord

if TYPE_CHECKING:
    import numpy as np


def learn(model: StableDiffusion, files: Sequence[str | os.PathLike], weights: Weights) -> None:
    """Teach a model the words in files, in place of those learned from files before; see `StableDiffusion.learn`.

    weights  the model's
    """
    if isinstance(files, str | os.PathLike):
        raise SettingError("embeddings", f"must be a list of paths; got {shortened(files)}.")
    words = read_words(files, model.config)
    with weights.lock:
        if weights.users:
            raise RuntimeError("words cannot change while a picture is being made. Learn them when it is done.")
        teach(model, [*words, *(word for word in model.words if word.bundled)])


def read_words(files: Sequence[str | os.PathLike], config: ModelConfig) -> list[LearnedWord]:
    """The words in files, and in folders: of a folder, those that are for models of this family.

    Raises CheckpointError.
    """
    return [learned_word(embedding, config) for place in files for embedding in _in_place(Path(place), config)]


def _in_place(place: Path, config: ModelConfig) -> Iterator[Embedding]:
    if not place.is_dir():
        yield read_embedding(place)
        return
    for _, path in words_in(place):
        embedding = read_embedding(path)
        if wrong_family(embedding, config) is None:
            yield embedding


def learned_word(embedding: Embedding, config: ModelConfig | None) -> LearnedWord:
    """An embedding as a word of a model; None: of any model.

    Raises WeightMismatchError, which names both families, if it is not for this one.
    """
    if config and (problem := wrong_family(embedding, config)):
        raise named(WeightMismatchError(problem), embedding.path.name)
    return LearnedWord(
        name=embedding.name,
        **_vectors(embedding, config),
        file=str(embedding.path),
        sha256=file_sha256(embedding.path),
    )


def _vectors(embedding: Embedding, config: ModelConfig | None) -> dict[str, "np.ndarray"]:
    """Those for the text encoders of a model, which are the last ones: the refiner of XL has only XL's second."""
    count = 2 if config and config.text_encoder_2 else 1
    mine = embedding.vectors[-count:] if config else embedding.vectors
    return dict(zip(("vectors", "vectors_2"), mine, strict=False))


def bundled_words(
    file: CheckpointFile, words: Mapping[str, Mapping[str, TensorRecord]], config: ModelConfig
) -> list[LearnedWord]:
    """The words that an adapter brings along, for `sd.pipeline.learning.teach_bundled`.

    file   the adapter's, open
    words  of `convert.adapters.adapter.Adapter`

    Raises CheckpointError.
    """
    found = []
    for embedding in bundled(file, words):
        if problem := wrong_family(embedding, config):
            fault = WeightMismatchError(f"brings the word {shown(embedding.name)}, which {problem}")
            raise named(fault, file.called)
        vectors = _vectors(embedding, config)
        found.append(LearnedWord(name=embedding.name, **vectors, file=str(file.path), bundled=True))
    return found
