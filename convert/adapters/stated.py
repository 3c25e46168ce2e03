"""What an adapter's settings say that its tensors do not: PEFT keeps alpha in a file of its own, or in the metadata."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from convert.errors import shown, shown_list
from convert.files.reader import CheckpointFile

IN_METADATA = "lora_adapter_metadata"  # of diffusers' files: JSON, each name with its component in front
ALPHAS = ("lora_alpha", "alpha")
LARGEST = 1e9  # alpha or scale; no adapter has more, and float32 could overflow
PATTERNS = "alpha_pattern"  # module -> alpha, where it differs


@dataclass(frozen=True)
class Stated:
    """The settings of one module."""

    alpha: float | None = None
    rank_stabilized: bool = False  # the product is divided by the square root of the rank
    rank: float | None = None  # where shapes do not show it


@dataclass(frozen=True)
class StatedSettings:
    """The settings of an adapter."""

    values: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, module: str) -> Stated:
        """For a module by diffusers' name, with its component in front: "unet.mid_block.attentions.0.proj_in"."""
        component, _, path = module.partition(".")

        def value(name: str) -> object:
            return self.values.get(f"{component}.{name}", self.values.get(name))

        alpha = next((number for name in ALPHAS if (number := _number(value(name))) is not None), None)
        if isinstance(patterns := value(PATTERNS), dict):
            pieces = path.split(".")
            ends = [".".join(pieces[start:]) for start in range(len(pieces))]  # the most specific first
            spelled = (f"{before}{end}{behind}" for end in ends for before in ("", "^") for behind in ("", "$"))
            found = (number for text in spelled if (number := _number(patterns.get(text))) is not None)
            alpha = next(found, alpha)
        return Stated(alpha, value("use_rslora") is True, _number(value("r")))


def stated_beside(file: CheckpointFile) -> StatedSettings:
    """What is stated in the file that PEFT writes beside the weights, or in their metadata."""
    if beside := file.configs.get("adapter"):
        return _with_notes(beside)
    text = file.metadata.get(IN_METADATA)
    if text is None:
        return StatedSettings()
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict):
        return _with_notes(values)
    return StatedSettings(notes=(f"has metadata that is not JSON, and is not read: {IN_METADATA} {shown(text, 60)}.",))


def _with_notes(values: Mapping[str, object]) -> StatedSettings:
    """The settings, and which of them are not read."""
    odd = [name for name, value in values.items() if name.rpartition(".")[2] in ALPHAS and value is not None]
    odd = [name for name in odd if _number(values[name]) is None]
    return StatedSettings(values, (f"states {shown_list(odd)}, not a usable number and not read.",) if odd else ())


def _number(value: object) -> float | None:
    """A setting that is a usable number: JSON also has 1e999, which is infinite."""
    return float(value) if type(value) in (int, float) and abs(value) <= LARGEST else None
