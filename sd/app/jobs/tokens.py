"""How a prompt is read: its texts, their chunks, and the tokens in them with their weights. Needs no model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sd.app.jobs.embeddings import find_words_of
from sd.app.jobs.request import Events, ModelRequest
from sd.pipeline.settings import Settings

if TYPE_CHECKING:
    from sd.text.learned_words import LearnedTokenizer


def texts_of(
    prompt: str, request: ModelRequest, events: Events, *, steps: int, plain: bool
) -> tuple[Settings, list[dict]]:
    """The settings of a picture with this prompt, and each text that it stands for at some step, as data.

    request  says where learned words are
    plain    brackets and BREAK are text

    Raises SettingError for a prompt that cannot be read.
    """
    reading = {"steps": steps, "plain_prompts": plain, "guidance_scale": 1}
    job = Settings(prompt=prompt, width=512, height=512, seed=0, **reading)
    (by_step,) = job.texts_by_step()
    tokenizer = find_words_of({plain: by_step}, request, None, events).tokenizer
    return job, [as_data(text, by_step, tokenizer, plain=plain) for text in dict.fromkeys(by_step)]


def as_data(text: str, by_step: Sequence[str], tokenizer: "LearnedTokenizer", *, plain: bool) -> dict:
    """One text that the prompt stands for, the steps at which it does, and its chunks."""
    from sd.text.chunks import chunks_of

    chunks = chunks_of(text, tokenizer, plain=plain)
    pieces = iter(tokenizer.pieces_of(token for chunk in chunks for token, _ in chunk.tokens))
    return {
        "text": text,
        "steps": [i for i, now in enumerate(by_step, 1) if now == text],
        "chunks": [
            {
                "tokens": [
                    {"id": token, "text": next(pieces)[1], "weight": weight, **learned_at(token, tokenizer)}
                    for token, weight in chunk.tokens
                ],
                "ids": list(chunk.ids),
            }
            for chunk in chunks
        ],
    }


def learned_at(token: int, tokenizer: "LearnedTokenizer") -> dict[str, object]:
    """The learned word that a token belongs to, which of its vectors it is, and how many there are; {} without one."""
    word = tokenizer.word_of(token)
    if word is None:
        return {}
    return {"embedding": word.name, "vector": tokenizer.place_in_word(token) + 1, "vectors": len(word.vectors)}
