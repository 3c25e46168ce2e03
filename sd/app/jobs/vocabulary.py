"""Words of prompts that the embedded model was never trained on."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from convert.errors import counted
from sd.files import embedded_model
from sd.pipeline.settings import Settings
from sd.text.prompt_syntax import BREAK

WORD = re.compile(r"[^\s!-/:-@\[-`{-~\u2010-\u205e\u3000-\u3003\uff01-\uff0f]+")  # up to a space or a punctuation mark
SMALL_WORDS = frozenset(  # of no meaning to a picture; and what follows an apostrophe
    """a an the and or of on in at to from with by for as is are was were be being it its this that these those there
    here which who while into onto over up out off than then so very some any each both
    also just s t re ve d ll m""".split()  # noqa: SIM905
)
MOST = 8  # words that are named


def unknown_words(prompts: Iterable[str], known: frozenset[str]) -> list[str]:
    """The words that are not known, once each, in their order. Numbers and small words pass."""
    texts = (BREAK.sub(" ", prompt).lower() for prompt in prompts)
    words = dict.fromkeys(word for text in texts for word in WORD.findall(text))
    return [word for word in words if word not in known and word not in SMALL_WORDS and not word.isdecimal()]


def embedded_model_knows(file: Path, jobs: Sequence[Settings], learned: Iterable[str] = ()) -> str | None:
    """What to say where these prompts have words that the embedded model does not know; None for other models.

    learned  the names of embeddings, which it knows; what adapters teach it, nobody knows
    """
    if file.resolve() != embedded_model().resolve():
        return None
    from sd.training.shapes.captions import vocabulary
    from sd.training.shapes.scenes import COLOURS, SHAPES

    names = {word for name in learned for word in WORD.findall(f"embedding:{name.lower()}")}
    unknown = unknown_words(dict.fromkeys(job.prompt for job in jobs if not job.adapters), vocabulary() | names)
    if not unknown:
        return None
    more = f" and {counted(len(unknown) - MOST, 'other word')}" if len(unknown) > MOST else ""
    return (
        f"the embedded model does not know: {', '.join(word[:40] for word in unknown[:MOST])}{more}. "
        f"It knows {', '.join(SHAPES)}, in {', '.join(COLOURS)}; -m FILE for anything else."
    )
