"""Which embeddings (textual inversion) the prompts of a run use: found by name, read before any weights are."""

import difflib
import filecmp
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from convert.adapters.embedding import Embedding, read_embedding, words_in, wrong_family
from convert.errors import CheckpointError, counted, shown
from convert.files.hashing import file_sha256
from sd.app.errors import UsageError
from sd.app.jobs.model_folder import folders
from sd.app.jobs.request import Events, ModelRequest
from sd.text.learned_words import LearnedTokenizer, LearnedWord, missing_words, words_used
from sd.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sd.config import ModelConfig
    from sd.pipeline.settings import Settings

LARGEST_HASHED = 64 << 20  # bytes; embeddings are smaller
NO_VECTORS = [0]  # of a word that is looked for: one, not read


@dataclass(frozen=True, eq=False)
class Found:
    """A word that prompts could use."""

    name: str  # in a prompt
    path: Path | None  # None: a picture notes it, and its file is gone
    given: bool = False  # --embeddings names this file
    bundled: bool = False  # in an adapter's file, and known while that is applied

    @property
    def key(self) -> tuple[int, ...]:
        """What it is recognised by: words with the same ids are the same in a prompt."""
        return tuple(Tokenizer().encode(self.name))


class Learned:
    """The words that the prompts of a run use."""

    def __init__(self, words: Sequence[LearnedWord] = ()):
        self.words = tuple(words)
        self.tokenizer = LearnedTokenizer(words=self.words)

    def noted(self, settings: "Settings") -> list[dict[str, object]]:
        """What a picture notes of the words in its prompts."""
        used = words_used(settings.all_texts(), self.tokenizer, plain=settings.plain_prompts) if self.words else ()
        return [{"name": word.name, "sha256": word.sha256} for word in used]


def find_words(
    request: ModelRequest,
    jobs: Sequence["Settings"],
    config: "ModelConfig",
    events: Events,
    bundled: Iterable[tuple[str, Path]] = (),
) -> Learned:
    """The words that these jobs' prompts use, from --embeddings and the user's folders of embeddings.

    bundled  words that come with the jobs' adapters, and the adapters' files: not found here, and not missing

    A file that --embeddings names is always read. A word of a folder for another family is passed over with a warning,
    as it may have the name of an ordinary word.

    Raises UsageError for folders without words; CheckpointError for what cannot be read.
    """
    texts = {False: {}, True: {}}
    for job in jobs:
        texts[job.plain_prompts] |= dict.fromkeys(job.all_texts())
    return find_words_of(texts, request, config, events, bundled)


def find_words_of(
    texts: Mapping[bool, Iterable[str]],
    request: ModelRequest,
    config: "ModelConfig | None",
    events: Events,
    bundled: Iterable[tuple[str, Path]] = (),
) -> Learned:
    """The same for texts, by whether they are plain; without a config, for any model."""
    found = [*_given(request.embeddings), *_in_folders(), *(Found(name, path, bundled=True) for name, path in bundled)]
    found = [*_noted(request, found), *found]
    named = {LearnedWord(name=each.name, vectors=NO_VECTORS): each for each in found}
    tokenizer = LearnedTokenizer(words=tuple(named)) if named else Tokenizer()
    used = dict.fromkeys(named[word] for plain in texts for word in words_used(texts[plain], tokenizer, plain=plain))
    words = [word for each in used if (word := _word(each, found, request, config, events))]
    keys = {each.key for each in used}
    for each in found:
        if each.given and each.key not in keys:
            _read(each, config)
            events.warn(f"no prompt uses the word {shown(each.name)} of --embeddings {shown(str(each.path))}.")
    for name in dict.fromkeys(name for plain in texts for name in missing_words(texts[plain], tokenizer, plain=plain)):
        events.warn(_missing(name, found))
    return Learned(words)


def known_words(request: ModelRequest) -> list[str]:
    """The names of all words that prompts can use, those of --embeddings first."""
    return list(dict.fromkeys(found.name for found in (*_given(request.embeddings), *_in_folders())))


def _given(places: Iterable[Path]) -> Iterator[Found]:
    """The words that --embeddings names: files, and what is in folders. Raises UsageError, CheckpointError."""
    for place in places:
        if not place.is_dir():
            yield Found(read_embedding(place).name, place, given=True)
            continue
        inside = [Found(name, path) for name, path in words_in(place)]
        if not inside:
            raise UsageError(f"--embeddings {shown(str(place))} holds no embeddings (.pt, .bin, .safetensors, .png).")
        yield from inside


def _in_folders() -> Iterator[Found]:
    for folder in folders("embeddings"):
        yield from (Found(name, path) for name, path in words_in(folder))


def _noted(request: ModelRequest, found: Sequence[Found]) -> Iterator[Found]:
    """The words that the picture of --like notes and that would be another file, or none, by their names alone."""
    for name, sha256 in noted_words(request.made_with):
        here = [each for each in found if each.key == Found(name, None).key]
        if here and (sha256 is None or _has_hash(here[0], sha256)):
            continue
        again = next((each for each in found if sha256 and _has_hash(each, sha256)), None)
        if again:
            yield replace(again, name=name, given=False)
        elif not here:
            yield Found(name, None)


def noted_words(made_with: Mapping[str, object]) -> Iterator[tuple[str, str | None]]:
    """The words that a picture notes, and their hashes, or the first digits of these."""
    noted = made_with.get("embeddings")
    for entry in noted if isinstance(noted, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and entry["name"].strip():
            sha256 = entry.get("sha256")
            yield entry["name"], sha256.casefold() if isinstance(sha256, str) and len(sha256) >= 8 else None


def _has_hash(found: Found, sha256: str) -> bool:
    with suppress(OSError):
        if found.path and found.path.stat().st_size <= LARGEST_HASHED:
            return file_sha256(found.path).startswith(sha256)
    return False


def _word(
    wanted: Found, found: Sequence[Found], request: ModelRequest, config: "ModelConfig | None", events: Events
) -> LearnedWord | None:
    """The word of that name for this model: the first file's that fits. None, with a warning, if there is none."""
    same = [each for each in found if each.key == wanted.key and not each.bundled]
    others = [each for each in found if each.key == wanted.key and each.bundled]
    if others and not (same and wanted.path):
        return None
    if wanted.path is None:
        events.warn(
            f"{request.like} was made with the embedding {shown(wanted.name)}, which is not in your folders of "
            "embeddings: its name is read as ordinary words."
        )
        return None
    fitting = [each for each in same if each.given or not _passed_over(each, config)]
    if not fitting:
        events.warn(f"{shown(str(wanted.path))} {_passed_over(wanted, config)}. Its name is read as ordinary words.")
        return None
    word = _read(fitting[0], config)
    for other in [*fitting[1:], *others]:
        if not filecmp.cmp(fitting[0].path, other.path, shallow=False):
            events.warn(
                f"two embeddings are called {shown(wanted.name)}: {shown(str(fitting[0].path))}, which is used, and "
                f"{shown(str(other.path))}, which is not."
            )
    for name, sha256 in noted_words(request.made_with):
        if Found(name, None).key == wanted.key and sha256 and not word.sha256.startswith(sha256):
            events.warn(
                f"{request.like} was made with another embedding {shown(name)} ({shown(sha256[:12])}), now using "
                f"{shown(str(fitting[0].path))} ({word.sha256[:12]}): expect another picture"
            )
    events.note(f"embedding {shown(word.name)}: {counted(len(word.vectors), 'vector')}, from {shown(word.file)}")
    return word


def _passed_over(found: Found, config: "ModelConfig | None") -> str | None:
    """Why a word of a folder is not for this model; None if it is."""
    return config and wrong_family(_embedding(found), config)


def _read(found: Found, config: "ModelConfig | None") -> LearnedWord:
    """The word in a file. Raises CheckpointError, which names both families if it is for another."""
    from sd.runtime.learned_words import learned_word

    return replace(learned_word(_embedding(found), config), name=found.name)


def _embedding(found: Found) -> Embedding:
    try:
        return read_embedding(found.path)
    except CheckpointError as error:
        if found.given:
            raise
        where = shown(str(found.path.parent))
        raise UsageError(f"the prompt's word {shown(found.name)} is an embedding in {where}: {error}") from None


def _missing(name: str, found: Sequence[Found]) -> str:
    names = {each.name.casefold(): each.name for each in found}
    near = difflib.get_close_matches(name.casefold().rpartition("/")[2], names, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(shown(names[each]) for each in near)}?" if near else ""
    places = " or ".join(shown(str(place)) for place in folders("embeddings"))
    return (
        f"embedding:{shown(name, 60)} does not exist: no embedding of that name is in {places}, or given with "
        f"--embeddings. It is read as ordinary words.{hint}"
    )
