"""From a request of OpenAI's images API to the fields of a job, and how its pictures are to be sent.

{"prompt": "a horse", "n": 2, "size": "512x768", "quality": "high", "seed": 7, "output_format": "webp"}
-> {"task": "txt2img", "prompt": "a horse", "count": 2, "width": 512, "height": 768, "steps": 60, "seed": 7}
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sd.app.errors import UsageError
from sd.app.web.a1111_values import like_type
from sd.pipeline.errors import nearest, shortened
from sd.pipeline.image.input_settings import InputSettings
from sd.pipeline.settings import FIELDS

Fields = dict[str, Any]

FORMATS = ("png", "jpeg", "webp")
STEPS = {
    "auto": 1,
    "standard": 1,
    "medium": 1,
    "low": 0.5,
    "high": 2,
    "hd": 2,
    "xhigh": 3,
    "max": 4,
}  # times the default
STRENGTHS = {"low": 0.75, "high": 0.5}  # of input_fidelity: how much of the picture changes
FILES = ("image", "image[]", "mask", "markup")  # which come as such, not as texts
OWN = {  # of our fields, those that a client can give besides OpenAI's
    **{name: kind for name, kind in FIELDS.items() if name not in ("width", "height")},
    **{
        name: InputSettings.__annotations__[name]
        for name in ("mask_blur", "only_masked", "mask_padding", "resize_mode")
    },
    "batch_size": int,
}
WITHOUT_EFFECT = (
    "user",
    "safety_identifier",
    "moderation",
    "style",
    "complexity",
    "frame_count",
    "frame_duration_ms",
    "svg",
)
CHOICES = {  # the values of a field, the default first
    "quality": tuple(STEPS),
    "output_format": FORMATS,
    "response_format": ("", "b64_json", "url"),
    "background": ("auto", "opaque"),
    "input_fidelity": tuple(STRENGTHS),
}
CANNOT = {("background", "transparent"): "pictures are opaque here", ("output_format", "gif"): "no animations are made"}
CANNOT[("output_format", "svg")] = "pictures are made of pixels here"
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
KINDS = {"n": int, "size": str, "stream": bool, "partial_images": int, "output_compression": int, "model": str}


class FieldError(UsageError):
    """What is wrong with one field, whose name is told apart from the sentence. whole: it is one without the name."""

    def __init__(self, field: str, problem: str, *, whole: bool = False):
        super().__init__(problem if whole else f"{field} {problem}")
        self.field = field


@dataclass
class Wanted:
    """The fields of a job, and how its pictures are sent; what is named but without effect."""

    fields: Fields
    model: str = ""
    size: str = "auto"
    quality: str = "auto"
    output_format: str = "png"
    output_compression: int = 100
    response_format: str = ""  # both the bytes and an address
    background: str = "auto"
    stream: bool = False
    partial_images: int = 0
    ignored: list[str] = field(default_factory=list)


def wanted_from(given: Mapping[str, object], *, steps: int) -> Wanted:
    """What a request asks for, but for its pictures.

    given  the fields of its JSON, or of its form, where all are texts
    steps  the model's default

    Raises FieldError.
    """
    found: Fields = {}
    for name, value in given.items():
        if name not in {*OWN, *KINDS, *CHOICES, *WITHOUT_EFFECT, *FILES}:
            raise FieldError(shortened(name)[:60], nearest(name, [*OWN, *KINDS, *CHOICES]))
        if value is not None and name not in FILES:
            found[name] = value
    chosen = {name: choice(name, found.pop(name, values[0])) for name, values in CHOICES.items()}
    numbers = {name: typed(name, found.pop(name), kind) for name, kind in KINDS.items() if name in found}
    ignored = [name for name in WITHOUT_EFFECT if found.pop(name, None) is not None]
    fields = {name: typed(name, value, OWN[name]) for name, value in found.items()}
    fields["count"] = in_range("n", numbers.pop("n", 1), 1, 1000)
    fields.setdefault("batch_size", 1)
    if STEPS[chosen["quality"]] != 1:
        fields.setdefault("steps", min(1000, max(1, round(STEPS[chosen["quality"]] * steps))))
    if "input_fidelity" in given:
        fields.setdefault("strength", STRENGTHS[chosen["input_fidelity"]])
    del chosen["input_fidelity"]
    fields |= size_of(numbers.get("size", "auto"))
    in_range("partial_images", numbers.get("partial_images", 0), 0, 3)
    in_range("output_compression", numbers.get("output_compression", 100), 0, 100)
    return Wanted(fields, ignored=ignored, **chosen, **numbers)


def choice(name: str, value: object) -> str:
    """One of a field's values; "" and null are the default."""
    if isinstance(value, str) and (name, value) in CANNOT:
        raise FieldError(name, f"{value} cannot be used: {CANNOT[name, value]}.")
    if not isinstance(value, str) or (value and value not in CHOICES[name]):
        raise FieldError(name, f"{shortened(value)} {nearest(str(value), filter(None, CHOICES[name]))}")
    return value or CHOICES[name][0]


def typed(name: str, value: object, kind: Any) -> Any:
    """The value of a field, which may be a text.."""
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return like_type(name, value, kind)
    except UsageError as error:
        raise FieldError(name, str(error).removeprefix(f"{name} ")) from None


def in_range(name: str, number: int, low: int, high: int) -> int:
    if not low <= number <= high:
        raise FieldError(name, f"{number} is out of range: {low} to {high}.")
    return number


def size_of(size: str) -> dict[str, int]:
    """Width and height of "512x768"; none of "auto", which is the model's, or that of the picture to begin with."""
    if size in ("auto", ""):
        return {}
    sides = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", size)
    if not sides:
        raise FieldError("size", f'{size[:40]!r} is not a size. Give one such as "512x512", or "auto".')
    return {"width": int(sides[1]), "height": int(sides[2])}


def error_of(status: int, sentence: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """An error as these clients know it."""
    usual = "invalid_request_error" if status < 500 else "server_error"
    return {"message": sentence, "type": TYPES.get(status, usual), "param": param, "code": code}
