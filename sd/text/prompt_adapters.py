"""Which adapters a prompt or a flag names, and how strongly each is applied.

    <lora:detail>                  both networks at strength 1
    <lora:detail:0.8>              both at 0.8
    <lora:detail:0.5:0.8>          the text encoder at 0.5, the UNet at 0.8
    <lora:detail:te=0.5:unet=0.8>  the same; `lyco` is another word for `lora`

    --lora detail:0.8:0.5          the same as a flag, where the UNet comes first

The brackets mean what they mean in AUTOMATIC1111's web UI, extensions-builtin/Lora/extra_networks_lora.py.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from sd.text.prompt_syntax import ADAPTER, PromptError

STRONGEST = 100
MOST = 100  # of one picture
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
THIRDS = ("in", "mid", "out")  # SD.Next's strengths for parts of the UNet
NAMED = ("te", "unet", "dyn", *THIRDS)


class AdapterUse(NamedTuple):
    """An adapter by name, and its strength for each network."""

    name: str
    unet: float
    text: float

    @property
    def as_flag(self) -> str:
        """As --lora takes it: "detail:0.8"."""
        needs_both = self.unet != self.text or NUMBER.fullmatch(self.name.rpartition(":")[2])
        return f"{self.name}:{_shortest(self.unet)}" + (f":{_shortest(self.text)}" if needs_both else "")

    @property
    def in_brackets(self) -> str:
        """As a prompt has it: "<lora:detail:0.8>"."""
        unet = "" if self.unet == self.text else f":{_shortest(self.unet)}"
        return f"<lora:{self.name}:{_shortest(self.text)}{unet}>"


def from_flag(text: str) -> AdapterUse:
    """NAME[:STRENGTH[:TEXT_STRENGTH]]; the name may have colons. Raises ValueError with a sentence."""
    name, numbers = text.strip(), []
    while len(numbers) < 2 and ":" in name and NUMBER.fullmatch(name.rpartition(":")[2].strip()):
        name, _, number = name.rpartition(":")
        numbers.insert(0, float(number))
    name = name.rstrip()
    if not name or name.endswith(":"):
        raise ValueError(f"{text[:120]!r} is not NAME, NAME:STRENGTH or NAME:STRENGTH:TEXT_STRENGTH.")
    if any("\ud800" <= character <= "\udfff" for character in name) or "\0" in name:
        raise ValueError(f"{text[:120]!r} holds bytes that are not UTF-8 text. Rename the file.")
    unet, text_encoder = (numbers * 2 or [1.0, 1.0])[:2]
    if max(abs(unet), abs(text_encoder)) > STRONGEST:
        raise ValueError(f"{text[:120]!r} has a strength out of range: {-STRONGEST} to {STRONGEST}.")
    return AdapterUse(name, unet, text_encoder)


def in_prompt(prompt: str) -> list[AdapterUse]:
    """The adapters that a prompt names, in order. Raises PromptError."""
    brackets = ADAPTER.findall(prompt)
    if len(brackets) > MOST:
        raise PromptError(f"names {len(brackets)} adapters; at most {MOST} are read.")
    return [_in_brackets(bracket) for bracket in brackets]


def _in_brackets(bracket: str) -> AdapterUse:
    positional, named = [], {}
    for part in bracket[1:-1].split(":")[1:]:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if equals and key in NAMED:
            named[key] = value
        else:
            positional.append(part.strip())
    name, *values = positional or [""]
    if not name:
        raise PromptError(f"has {bracket}, which names no adapter. Write <lora:NAME:STRENGTH>.")
    if thirds := [f"{third}=" for third in THIRDS if third in named]:
        raise PromptError(f"has {bracket}, but {', '.join(thirds)} is not supported: the UNet has one strength, unet=.")
    if len(values) > 2 or "dyn" in named:
        raise PromptError(
            f"has {bracket}, but ranks cannot be cut here. Give two strengths at most: for the text encoder, then for "
            "the UNet."
        )
    named = dict(zip(("te", "unet"), values, strict=False)) | named
    for value in named.values():
        if not NUMBER.fullmatch(value) or abs(float(value)) > STRONGEST:
            raise PromptError(
                f"has {bracket}, whose strength {value!r} is not a number from {-STRONGEST} to {STRONGEST}."
            )
    text = float(named.get("te", 1))
    return AdapterUse(name, float(named.get("unet", text)), text)


def name_beside(name: str) -> str:
    """The name in `Lora hashes`, where commas and colons separate."""
    return name.replace(":", "").replace(",", "")


def merged(uses: Iterable[AdapterUse]) -> tuple[AdapterUse, ...]:
    """Each adapter once: the strengths of one that is named several times add up."""
    found: dict[str, AdapterUse] = {}
    for use in uses:
        before = found.get(use.name, AdapterUse(use.name, 0, 0))
        found[use.name] = AdapterUse(use.name, before.unet + use.unet, before.text + use.text)
    return tuple(found.values())


def renamed(prompt: str, name: Callable[[str], str | None]) -> str:
    """The prompt with other names for its adapters; those for which `name` gives None are taken out.

    Raises PromptError.
    """
    in_prompt(prompt)

    def replaced(bracket: re.Match) -> str:
        use = _in_brackets(bracket[0])
        new = name(use.name)
        return "" if new is None else bracket[0] if new == use.name else use._replace(name=new).in_brackets

    return ADAPTER.sub(replaced, prompt)


def _shortest(number: float) -> str:
    return next(text for text in (f"{number:g}", repr(number)) if float(text) == number)
