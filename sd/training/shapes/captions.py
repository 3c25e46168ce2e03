"""Captions of scenes: always true, and worded differently each time."""

from collections.abc import Callable
from random import Random

from sd.training.shapes.scenes import COLOURS, PATTERNS, SHAPES, Background, Scene, Thing

SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium-sized",), "large": ("large", "big")}
RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below", "under"),
    "inside": ("inside", "in", "within"),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
ENDS = {  # where both things are, if they lie on different sides of the middle
    "left of": ("on the left", "on the right"),
    "right of": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
PATTERN_NOUNS = {"striped": "stripes", "dotted": "dots", "checkered": "a checkered pattern", "gradient": "a gradient"}
LEADS = ("a picture of ", "a drawing of ", "an image of ", "there is ")

JOINTS = "a an against and around at background front in middle of on plain the with"  # words that only functions hold


def vocabulary() -> frozenset[str]:
    """Every word that a caption may have, in small letters; a hyphen separates two."""
    tables = (SHAPES, COLOURS, PATTERNS, LEADS, PATTERN_NOUNS.values(), *SIZE_WORDS.values(), *RELATION_WORDS.values())
    texts = [text for table in (*tables, *ENDS.values()) for text in table]
    return frozenset(" ".join([*texts, JOINTS]).replace("-", " ").split())


def plain_caption(scene: Scene) -> str:
    """Shapes, colours and relation in one fixed wording, as in the prompts for scoring."""
    things = [with_article(f"{thing.colour} {thing.shape}") for thing in scene.things]
    between = f" {RELATION_WORDS[scene.relation][0]} " if scene.relation else ""
    return f"{between.join(things)} on {with_article(scene.background.colour)} background"


def caption(scene: Scene, generator: Random, *, sizes: bool = True) -> str:
    """A randomly worded caption. It always names the shape and colour of every thing, and mostly the background's.

    sizes  whether it may say how large things are
    """
    bare = generator.random() < 0.1  # "red circle on blue background"
    article = str if bare else with_article
    subject = describe(scene, generator, article, sizes)
    if not bare and generator.random() < 0.35:
        subject = generator.choice(LEADS) + subject
    ending = generator.random()
    if ending < 0.08:
        return subject
    if ending < 0.2 and not subject.startswith(LEADS):
        return f"{article(background_words(scene.background, generator))} with {subject}"
    words = background_words(scene.background, generator, after=True)
    if ending < 0.4:
        return f"{subject}, {words}"
    joint = generator.choice(("on", "on", "on", "in front of", "against"))
    return f"{subject} {joint} {article(words)}"


def describe(scene: Scene, generator: Random, article: Callable[[str], str], sizes: bool) -> str:
    """The thing and sometimes its position, or both things and mostly their relation."""
    if scene.relation is None:
        (thing,) = scene.things
        where = place_words(thing)
        words = article(thing_words(thing, generator, sizes=sizes))
        return f"{words} {where}" if where and generator.random() < 0.5 else words

    inside = scene.relation == "inside"
    first, second = (article(thing_words(thing, generator, inside=inside, sizes=sizes)) for thing in scene.things)
    form = generator.random()
    if form < 0.1:
        return f"{first} and {second}"
    if inside:
        if form < 0.3:
            return f"{second} with {first} inside"
        if form < 0.45:
            return f"{second} around {first}"
    elif form < 0.25 and stand_apart(scene):
        ends = ENDS[scene.relation]
        return f"{first} {ends[0]} and {second} {ends[1]}"
    elif form < 0.5:
        return f"{second} {generator.choice(RELATION_WORDS[OPPOSITE[scene.relation]])} {first}"
    return f"{first} {generator.choice(RELATION_WORDS[scene.relation])} {second}"


def thing_words(thing: Thing, generator: Random, *, inside: bool = False, sizes: bool = True) -> str:
    """Colour and shape, and sometimes the size: mostly for small things, unless they are inside another."""
    words = f"{thing.colour} {thing.shape}"
    said = 0.9 if thing.size == "small" and not inside else 0.35
    return f"{generator.choice(SIZE_WORDS[thing.size])} {words}" if sizes and generator.random() < said else words


def place_words(thing: Thing) -> str | None:
    """Where a thing is; None if that is unclear."""
    column = third(thing.x, "left", "right")
    row = third(thing.y, "top", "bottom")
    if column is None or row is None:
        return None
    if column == row == "middle":
        return "in the middle"
    if row == "middle":
        return f"on the {column}"
    return f"at the {row}" if column == "middle" else f"in the {row} {column}"


def third(position: float, low: str, high: str) -> str | None:
    if position < 0.4:
        return low
    if position > 0.6:
        return high
    return "middle" if 0.45 < position < 0.55 else None


def stand_apart(scene: Scene) -> bool:
    """Whether two neighbouring things are in different halves of the picture."""
    first, second = scene.things
    one, two = (first.x, second.x) if scene.relation in ("left of", "right of") else (first.y, second.y)
    return min(one, two) < 0.45 and max(one, two) > 0.55


def background_words(background: Background, generator: Random, *, after: bool = False) -> str:
    """after  nothing follows in the caption, so "with stripes" may end it"""
    colour, pattern = background.colour, background.pattern
    if pattern == "plain":
        return f"plain {colour} background" if generator.random() < 0.1 else f"{colour} background"
    form = generator.random()
    if form < 0.25:
        return f"{colour} background"
    if form < 0.4 and after:
        return f"{colour} background with {PATTERN_NOUNS[pattern]}"
    if form < 0.6 or pattern == "gradient":
        return f"{colour} {pattern} background"
    return f"{pattern} {colour} background"


def with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"
