"""What a run of pictures is asked to do, and what it reports: the same for a command line, a page and a worker.

Requests hold plain values and paths, so they can be pickled and sent to another process.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sd.pipeline.image.input_settings import MEGAPIXELS, InputSettings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """Which weights, and how to run them. Names of devices, precisions and so on as in `sd.load`."""

    file: Path
    weights: str = "auto"
    prediction: str = "auto"
    variant: str | None = None  # of a folder's weights
    vae: Path | None = None  # whose VAE is used instead of the model's own
    tiny_vae: Path | None = None  # that decodes in place of the VAE
    refiner: Path | None = None  # takes the last steps
    embeddings: tuple[Path, ...] = ()  # files of learned words, and folders of them, before the user's own folders
    device: str = "auto"
    precision: str = "auto"
    low_memory: bool = False
    tiled_vae: bool = False
    compile: bool = False
    like: str = ""  # name of the picture whose settings are used again
    made_with: Mapping[str, object] = field(default_factory=dict)  # what that picture notes of its model and device

    @property
    def int8(self) -> bool:
        return self.precision == "int8"


@dataclass(frozen=True)
class Line:
    """One prompt, with the settings that are only its own."""

    settings: Mapping[str, object]  # fields of `Settings`; at least the prompt
    where: str = ""  # before error messages: "jobs.txt, line 3: ", or empty

    def __post_init__(self):
        object.__setattr__(self, "settings", without_open_seeds(self.settings))


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """Everything that a run of pictures needs."""

    task: str  # a key of `convert.families.table.TASKS`
    model: ModelRequest

    lines: tuple[Line, ...]
    settings: Mapping[str, object] = field(default_factory=dict)  # of every line; no size: the model's; no seed: drawn
    count: int = 1  # pictures of each line
    batch_size: int = 1
    names_only: bool = False  # adapters are names in the user's folders, and never paths
    is_batch_file: bool = False  # the lines are a file's: a run with a drawn seed resumes the one that was stopped

    init: Path | None = None  # the picture to begin with
    mask: Path | None = None
    depth: Path | None = None  # a depth map of one's own
    max_megapixels: float = MEGAPIXELS  # the largest picture that is read
    inputs: InputSettings | None = None  # how they are prepared; None: the defaults

    out: str  # a .png file, a folder or a template such as "cat-{seed}.png"
    force: bool = False  # replace files that exist
    grid: bool = False  # also write one sheet with all pictures
    grid_columns: int | None = None
    save_steps: str | None = None  # also write the picture at each step: "fast" or "vae"
    save_steps_as: str | None = None  # "files", "webp" or "apng"

    def __post_init__(self):
        object.__setattr__(self, "settings", without_open_seeds(self.settings))


def without_open_seeds(settings: Mapping[str, object]) -> dict[str, object]:
    """The same settings; a seed of -1 or None is left out: it is drawn, or counts on from the run's."""
    open_seeds = [name for name in ("seed", "vary_seed") if settings.get(name) in (-1, None)]
    return {name: value for name, value in settings.items() if name not in open_seeds}


class SkippedError(Exception):
    """Raised by a function of `Events` while pictures are made: leave these out, and go on with the next ones."""


class Events:
    """What a run reports while it works. Silent; a face overrides what it shows.

    What a function raises ends the run; finished pictures are kept.
    """

    def note(self, text: str) -> None:
        """Something worth knowing: the seed, the precision, how many pictures exist already."""

    def warn(self, text: str) -> None:
        """Something that goes otherwise than asked."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[..., object]]:
        """A stage of work, such as "loading"; yields a function to call with each amount that is done (default: 1)."""
        yield lambda amount=1: None

    def batch(self, numbers: Sequence[int]) -> None:
        """The next pictures are begun, by their numbers in the run."""

    def predicted(self, clean: "Tensor") -> None:
        """A step is done, which predicts these clean latents (B, 4, H/8, W/8)."""

    def failed(self, numbers: Sequence[int], error: Exception) -> None:
        """These pictures, by their numbers in the run, could not be made; a warning has said so."""

    def written(self, event: str, path: Path, **facts: object) -> None:
        """A file is complete: event "picture", with its seed and milliseconds, "grid" or, with its hash, "shard"."""
