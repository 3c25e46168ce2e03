"""Strings to compare tokenizers on: a list picked by hand, and as many generated ones as wanted."""

import random
import unicodedata

HAND_PICKED = {
    "nothing": ["", " ", "\n", "\t \r\n", "\u3000", "\u00a0", "\u200b", "\ufeff", "\x00", "\x1b[0m", "&nbsp;"],
    "prompts": [
        "a photograph of an astronaut riding a horse",
        "A high tech solarpunk utopia in the Amazon rainforest, 8k, trending on artstation",
        "portrait of a (((beautiful))) woman, f/1.4, 85mm, ISO-100, [masterpiece:1.2]",
        "cyberpunk cat :: 4k --ar 16:9 --v 5 <lora:detail:0.8>", "black & white photo, rock&roll, AT&T, R&D, Q&A; &",
        "an oil painting\nof the sea\n\nby Turner", "ALL CAPS AND MiXeD cAsE", "trailing spaces   ",
        "   leading spaces", "tabs\tand\u00a0no-break\u2003em spaces\u3000ideographic",
        "C:\\path\\to\\file.png, https://example.org/a?b=c&d=e#f, user@example.org",
    ],
    "contractions": [
        "it's we're they've I'm he'd she'll don't", "IT'S WE'RE THEY'VE I'M HE'D SHE'LL DON'T",
        "it’s we’re don’t rock ’n’ roll", "'s't're've'm'll'd", "y'all'd've 'tis o'clock ''s ''''t '",
        "'\u017f long s", "d's dog's'", "l’été qu'il aujourd'hui",
    ],
    "digits": [
        "0", "1234567890", "3.14159", "1,000,000", "2x4", "x264", "٣٤٥", "½ \u2167 ③ ²", "一二三", "1st 2nd 3rd",
        "x²+y³",
    ],
    "accents": [
        "café naïve résumé über Ångström", "cafe\u0301 nai\u0308ve", "İstanbul ışık I i", "\u1e9e straße STRASSE",
        "ΟΔΥΣΣΕΥΣ Σ ΣΣ AΣ. ΣB", "z\u0351\u0343a\u0334\u0321l\u0334g\u0331o\u0335", "Việt Nam Đặng",
        "\u212a \u212b \u2126 kelvin angstrom ohm", "\u01c4ǅǆ digraphs", "ﬁne ﬂoor ﬀﬃﬄ ﬆ Ĳ",
        "o\u0308\u0304 ṩ s\u0323\u0307 s\u0307\u0323",
    ],
    "emoji": [
        "😀", "👨\u200d👩\u200d👧\u200d👦 family", "👍🏽 thumbs", "🇨🇭 flag 🇺🇸", "❤\ufe0f heart ❤",
        "1\ufe0f\u20e3 keycap", "🏴\U000e0067\U000e0062\U000e0077\U000e006c\U000e0073\U000e007f wales", "©®™ ☀☁☂",
        "a🐎b🐪c", "🫠🫶🫃 recent",
    ],
    "scripts": [
        "馬に乗る宇宙飛行士の写真", "骑马的宇航员，照片。", "말을 타는 우주비행사",
        "\u110b\u116e\u110c\u116e decomposed hangul", "Ｗｉｄｅ ｱｲｳ ！", "パパ ハ\u309aハ\u309a",
        "رائد فضاء يركب حصان\u064bا", "אסטרונאוט רוכב על סוס", "\u202eright to left override\u202c \u200fmark",
        "घ\u094bड\u093c\u0947 पर सव\u093eर", "น\u0e31กบ\u0e34นอวกาศข\u0e35\u0e48ม\u0e49า", "космонавт НА ЛОШАДИ",
        "աստղ აბგ ᲐᲑ አባ ᎠᎡ ꭰ", "𐐀𐐨 deseret 𝕯 fraktur 𠀀 extension b",
    ],
    "entities": [
        "&lt;b&gt;bold&lt;/b&gt;", "<b>bold</b> &amp; <i>italic</i>", "a &amp;amp; b", "a &amp;amp;amp; b",
        "a &amp;amp;amp;amp; b", "caf&eacute; CAF&EACUTE; &eacute &Eacute", "&#39;s &#x27;t &#8217;s &rsquo;s",
        "this&not that &notit; &copy2024", "&#0; &#28; &#127; &#133; &#xD800; &#x110000; &#99999999999; &#xFEFF;",
        "&#x1F40E; &#128014; &hearts; &hellip;", "&lt;|endoftext|&gt;", "<&eacute;> then &eacute;\n&eacute;",
        "&; &# &#; &#x; &bogus; &amp", "&amp;#39;s &amp;lt;", "<b> caf&amp;eacute; &amp;amp;eacute;",
    ],
    "mojibake": [
        "âœ” No problems", "schÃ¶n cafÃ© naÃ¯ve voilÃ  le travail", "itâ€™s donâ€™t â€œquotedâ€\u009d",
        "Ã©lÃ¨ve, MÃ¼nchen, ÑÐ»Ð¾Ð½", "lâ€™humanitÃ©", "ÃƒÂ© twice", "ã\x83\x84 c1 \x85 \x92s", "Â\u00a0Â½ Â©",
        "ðŸ˜\u0080 smile", "� replacement ï¿½",
    ],
    "control": [
        "a\x00b", "a\x01b\x02c", "bell\x07", "back\x08space", "form\x0cfeed", "vertical\x0btab",
        "a\x1cb\x1db\x1eb\x1fb", "del\x7fete", "\x1b[31mred\x1b[0m", "a\x85b", "a\u2028b\u2029c", "soft\u00adhyphen",
        "a\u200bb\u200cc\u200dd", "\ufeffbom", "\ufff9anno\ufffatation\ufffb", "\ufffc object", "a\u206ab", "\r\n\r",
        "\u0080\u009f", "\ue000 private",
    ],
    "surrogates": ["\ud83d\ude00", "\ud83d", "a\ude00b", "\ude00\ud83d", "\udcff\udc80 surrogateescape"],
    "quotes": ["“quoted” ‘single’", "«guillemets» „low“ ‹x›", "ʼs modifier", "`backticks` ´acute´"],
    "special": [
        "<|startoftext|>", "<|endoftext|>", "a <|endoftext|> b", "a<|endoftext|>b", "<|STARTOFTEXT|>",
        "!!<|endoftext|>", "<|endoftext|><|endoftext|>", "<|endoftext|>!!", "<|startoftext|>'s", "<|endoftext|",
        "<|end oftext|>", "<|\u017ftartoftext|>", "</w>", "a</w>", "hor</w>se", "<w/>", "[PAD] [UNK] <s> </s>",
    ],
    "unicode": [
        "a\u0345b", "\u1fb3 \u03b1\u0345", "a\u1c89", "\ua7cb", "a\u209db", "<e&#x301;>", "<&#xFB01;>", "\U0010ffff",
    ],
    "long": [
        "a" * 500, "ab" * 400, "antidisestablishmentarianism" * 12, "!" * 300, "?!" * 200, "1" * 200, "馬" * 200,
        "🐎" * 100, "e\u0301" * 200, "horse " * 120, "." * 77+"x", "'" * 99, "ا" * 150, "-=" * 120, "x" * 77,
        "x" * 78, "pneumonoultramicroscopicsilicovolcanoconiosis", "Donaudampfschifffahrtsgesellschaftskapitänsmütze",
    ],
}  # fmt: skip

WORDS = [
    "a", "an", "the", "of", "in", "on", "with", "and", "horse", "astronaut", "photograph", "painting", "castle",
    "dragon", "portrait", "cyberpunk", "neon", "forest", "sunset", "watercolour", "intricate", "detailed", "cinematic",
    "lighting", "unreal", "engine", "octane", "render", "artstation", "greg", "rutkowski", "beksinski", "hokusai",
    "steampunk", "bokeh", "4k", "8k", "hdr", "f/1.8", "35mm", "don't", "it's", "they're", "we've", "I'm", "you'll",
    "he'd", "Gogh's",
]  # fmt: skip

ENTITIES = [
    "&amp;", "&lt;", "&gt;", "&quot;", "&#39;", "&eacute;", "&EACUTE;", "&nbsp;", "&hellip;", "&rsquo;", "&amp;amp;",
    "&#x1F40E;", "&not", "&copy", "&",
]  # fmt: skip

CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "’s", "’t", "'S", "'LL", "'", "''", "'x"]

ALPHABETS = [  # ranges of Unicode, both ends included
    (0x20, 0x7E), (0xA0, 0xFF), (0x100, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF),
    (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1EFF), (0x2000, 0x206F),
    (0x20A0, 0x20C0), (0x2100, 0x218F), (0x2460, 0x24FF), (0x2600, 0x27BF), (0x3000, 0x30FF), (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3), (0xFB00, 0xFB06), (0xFE00, 0xFE0F), (0xFF00, 0xFFEF), (0x1D400, 0x1D7FF), (0x1F1E6, 0x1F1FF),
    (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0xE0020, 0xE007F),
]  # fmt: skip

UNUSUAL = [chr(i) for i in range(0x10000) if unicodedata.category(chr(i)) in {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}]


def hand_picked() -> list[str]:
    return [text for texts in HAND_PICKED.values() for text in texts]


def generated(count: int, seed: int = 0) -> list[str]:
    """`count` strings, every kind in turn; the same seed gives the same strings."""
    rng = random.Random(seed)
    kinds = [
        prompt,
        from_one_alphabet,
        from_all_alphabets,
        mojibake,
        entities,
        controls,
        punctuation,
        digits,
        long_word,
    ]
    return [kinds[i % len(kinds)](rng) for i in range(count)]


def prompt(rng: random.Random) -> str:
    words = rng.choices(WORDS, k=rng.randint(1, 25))
    return rng.choice([" ", ", ", "  ", "\n", "-"]).join(
        rng.choice([str, str.upper, str.title])(word) for word in words
    )


def from_one_alphabet(rng: random.Random) -> str:
    alphabet = rng.choice(ALPHABETS)
    return " ".join(letters(rng, alphabet, rng.randint(1, 9)) for _ in range(rng.randint(1, 6)))


def from_all_alphabets(rng: random.Random) -> str:
    return "".join(letters(rng, rng.choice(ALPHABETS), rng.randint(1, 3)) for _ in range(rng.randint(1, 12)))


def letters(rng: random.Random, alphabet: tuple[int, int], count: int) -> str:
    return "".join(chr(rng.randint(*alphabet)) for _ in range(count))


def mojibake(rng: random.Random) -> str:
    """UTF-8 read as an old one-byte encoding, once or twice."""
    text = rng.choice(WORDS) + " " + from_one_alphabet(rng)
    for _ in range(rng.randint(1, 2)):
        text = text.encode("utf-8").decode(rng.choice(["latin-1", "cp1252", "cp1251", "mac_roman"]), "replace")
    return text


def entities(rng: random.Random) -> str:
    parts = [*rng.choices(ENTITIES + WORDS, k=rng.randint(1, 10)), f"&#{rng.randint(0, 0x2FFF)};"]
    rng.shuffle(parts)
    return rng.choice(["", " "]).join(parts)


def controls(rng: random.Random) -> str:
    """Control and format characters, unusual spaces and lone surrogates between words."""
    return "".join(rng.choice([rng.choice(WORDS), rng.choice(UNUSUAL), chr(rng.randint(0, 0x9F))]) for _ in range(9))


def punctuation(rng: random.Random) -> str:
    parts = [rng.choice([letters(rng, (0x21, 0x40), 3), rng.choice(CONTRACTIONS), rng.choice(WORDS)]) for _ in range(8)]
    return "".join(parts)


def digits(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789٣४五Ⅷ½²., xX") for _ in range(rng.randint(1, 30)))


def long_word(rng: random.Random) -> str:
    alphabet = rng.choice(["abcdefghijklmnopqrstuvwxyz", "aeiourst", "äöüéèñß", "абвгд", "!?.-", "あいうえお"])
    return "".join(rng.choices(alphabet, k=rng.randint(20, 200)))
