"""Which word of a prompt names what the picture shows: "circle" in "a red circle on blue". A good guess.

English puts the noun at the end of its phrase; a phrase ends before a preposition, an article, a verb or punctuation.
At its end, words are passed over that say how something looks or what kind of picture it is.
"""

import re
from collections.abc import Iterator, Sequence


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


BETWEEN = _words(  # no nouns; a phrase ends before each of them
    "a an the this that these those some any every each no my your his her its our their it he she they we you i",
    "him me them us and or but nor as than so if not then while when where who whose which what how why there",
    "here to of in on at by for from with without into onto inside outside over under above below left right",
    "behind beside besides between near next through across around round against along during before after until",
    "up down out off like via front back top is are was were be been being am has have had having do does did",
    "will would could can should may might must let lets make makes made making add adds turn put give take",
    "remove replace change swap show shows get gets want look looks sits sit stands stand holds hold walks walk",
    "runs run eats eat wears wear rides flies jumps plays lies swims dances reads drinks sleeps says very too",
    "also more most much many less least quite just only really super ultra highly one two three four five six",
    "seven eight nine ten several few lots lot both all",
)
LOOKS = _words(  # how something looks: before a noun, or after it
    "red orange yellow green blue purple violet pink brown black white grey gray golden turquoise cyan magenta",
    "beige crimson scarlet teal colourful colorful dark bright pale vivid vibrant big small large little tiny",
    "huge giant enormous tall short long wide narrow thick thin fat round square flat deep high low old new young",
    "ancient modern antique vintage retro medieval futuristic good bad best better nice beautiful pretty cute",
    "lovely handsome gorgeous ugly scary creepy happy sad angry calm wild free fresh dry wet hot cold warm cool",
    "soft hard sharp smooth rough clean dirty empty full open real realistic photorealistic hyperrealistic",
    "surreal abstract simple complex intricate elegant majestic epic dramatic cinematic volumetric isometric",
    "symmetrical aesthetic romantic gothic magical mystical mysterious digital analog natural single solo whole",
    "half other same different lone lonely wooden woolen metallic furry fluffy shiny glossy matte smiling alone",
    "together asleep sleeping winding glowing shining floating flying burning rotating hd uhd hdr sfw nsfw",
    "aerial overgrown worn torn hidden frozen broken seen drawn",
)
PICTURES = _words(  # what kind of picture, and how good: not what is in it
    "photo photos photograph photographs photography picture image images painting paintings drawing sketch",
    "illustration render rendering art artwork portrait portraits poster print logo icon icons wallpaper scene",
    "shot closeup close view style masterpiece quality resolution detail details lighting focus bokeh composition",
    "depth field oil watercolor watercolour acrylic gouache pencil ink charcoal crayon pastel pixel vector line",
    "concept fan stock film movie still screenshot snapshot selfie polaroid diagram doodle cartoon anime manga",
    "comic engraving studio artstation deviantart pixiv octane unreal engine trending",
)
ING_NOUNS = _words(
    "painting drawing building ring king wing string morning evening ceiling lightning spring thing something",
    "clothing wedding swing being railing pudding duckling sibling darling viking",
)
LY_NOUNS = _words("family butterfly dragonfly firefly fly lily jelly belly bully ally italy assembly")
ED_NOUNS = _words("bed seed reed weed speed shed sled moped steed breed deed feed")
ENDS_A_NAME = BETWEEN - {"of", "by", "and", "or", "up"}  # after an article and one word, that word is a noun
ADJECTIVE = re.compile(r".{3,}(istic|ful|less|ous|ish|esque|able|ible)")
ING = re.compile(r".{2,}ing")


def first_noun(texts: Sequence[str]) -> int:
    """The index of the word. `texts` are the words of a prompt in lower case, empty where there is none.

    The first word if no word is a noun, and 0 if there are no words.
    """
    fallback = None
    for phrase, before, after in _phrases(texts):
        heads = [i for i in phrase if texts[i] != "-"]
        while heads and _passed_over(texts[heads[-1]]):
            heads.pop()
        if heads:
            return heads[-1]
        if before in ("a", "an", "the") and after in ENDS_A_NAME:  # "an orange on a table"
            return phrase[-1]
        if fallback is None and texts[phrase[-1]] != "-":
            fallback = phrase[-1]
    if fallback is not None:
        return fallback
    return next((i for i, text in enumerate(texts) if text), 0)


def _phrases(texts: Sequence[str]) -> Iterator[tuple[list[int], str, str]]:
    """Runs of words that may belong to one noun, with the word before each and after it."""
    run: list[int] = []
    for i, text in enumerate([*texts, ""]):
        goes_on = (text.isalpha() or (text == "-" and run)) and text not in BETWEEN
        if goes_on and not (run and _verb(text, texts[run[-1]], texts[i + 1 : i + 2])):
            run.append(i)
            continue
        if run:
            yield run, texts[run[0] - 1] if run[0] else "", text
        run = []


def _verb(text: str, before: str, after: Sequence[str]) -> bool:
    """Whether a word is a verb after its noun, as "jumping" in "a fox jumping over a fence"."""
    follows = bool(after) and (after[0].isalpha() and after[0] != "of")
    return bool(ING.fullmatch(text)) and text not in ING_NOUNS and follows and not _passed_over(before)


def _passed_over(text: str) -> bool:
    """Whether a word at the end of a phrase says how something looks, or what kind of picture it is."""
    if len(text) == 1 or text in LOOKS or text in PICTURES or ADJECTIVE.fullmatch(text):
        return True
    if text.endswith("ly"):
        return text not in LY_NOUNS
    return len(text) > 4 and text.endswith("ed") and text not in ED_NOUNS
