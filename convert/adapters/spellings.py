"""What the names of an adapter's tensors end in, behind the name of the module: read in any spelling, written in three.

lora_unet_mid_block_attentions_0_proj_in.lora_down.weight
module                                   the part "down" of a LoRA

kohya      as above, with .alpha beside it; read by most programs
diffusers  unet.mid_block.attentions.0.proj_in.lora_A.weight; alphas are settings, in the metadata
peft       base_model.model.mid_block.attentions.0.proj_in.lora_A.weight; a folder with the settings in a file, or with
           such a folder for each network, as PEFT's own examples write them
"""

from collections.abc import Iterator, Mapping

SPELLINGS = ("kohya", "diffusers", "peft")
KOHYA = {  # part -> what its name ends in, of each kind
    "lora": {"down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight"},
    "loha": {part: f".hada_{part}" for part in ("w1_a", "w1_b", "t1", "w2_a", "w2_b", "t2")},
    "lokr": {part: f".lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "glora": {part: f".{part}.weight" for part in ("a1", "a2", "b1", "b2", "bm")},
    "oft": {"blocks": ".oft_blocks", "rescale": ".rescale"},
    "ia3": {"weight": ".weight", "on_input": ".on_input"},
    "full": {"weight": ".diff"},
    "set": {"weight": ".set_weight"},
}
KOHYA["boft"] = KOHYA["oft"]  # which only the shape tells apart
BESIDE = {"bias": ".diff_b", "alpha": ".alpha", "scale": ".scale", "dora_scale": ".dora_scale"}  # with any kind
OF_NORMS = {"weight": ".w_norm", "bias": ".b_norm"}
PEFT = {"down": ".lora_A.weight", "up": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}

# What a name ends in, in any spelling -> kind and part; the kind is "" for parts that go with several.
SUFFIXES = {end: (kind, part) for kind, ends in KOHYA.items() if kind != "boft" for part, end in ends.items()}
SUFFIXES |= {end: ("", part) for part, end in BESIDE.items()}
SUFFIXES |= {OF_NORMS["weight"]: ("full", "weight"), OF_NORMS["bias"]: ("", "bias")}
SUFFIXES |= {
    f"{mark}{part}{end}": ("lora", part)
    for part in KOHYA["lora"]
    for mark, end in ((".lora.", ".weight"), ("_lora.", ".weight"), (".lora_linear_layer.", ".weight"), (".lora_", ""))
}
SUFFIXES |= {PEFT[part]: ("lora", part) for part in ("down", "up")}
SUFFIXES |= {PEFT[part].removesuffix(".weight"): ("lora", part) for part in ("down", "up")}
SUFFIXES |= {PEFT["magnitude"] + end: ("", "magnitude") for end in ("", ".weight")}
SUFFIXES[".ia3_l"] = ("ia3", "factor")  # PEFT's: what weights are multiplied by; LyCORIS keeps the difference from 1
MOST_DOTS = max(suffix.count(".") for suffix in SUFFIXES)
NAMED = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.", ".ia3_l.")  # PEFT may put an adapter's name behind these


def split(name: str, known: Mapping[str, object]) -> tuple[str, str, str] | None:
    """The module that a name begins with, one of those known, and the kind and the part that it ends in."""
    for mark in NAMED:
        before, found, rest = name.partition(mark)
        if found and rest.removesuffix("weight").count(".") <= 1 and before in known:
            name = before + mark.rstrip(".")  # without the adapter's name
    for suffix in _endings(name):  # the longest that is known counts
        if suffix in SUFFIXES and (module := name.removesuffix(suffix)) in known:
            return module, *SUFFIXES[suffix]
    return None


def _endings(name: str) -> Iterator[str]:
    """What a name may end in, the longest first: from "_lora." or one of the last dots on."""
    if (start := name.rfind("_lora.")) >= 0:
        yield name[start:]
    pieces = name.rsplit(".", MOST_DOTS)
    for count in range(1, len(pieces)):
        yield "." + ".".join(pieces[count:])
