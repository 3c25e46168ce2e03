"""The tensors that adapters have for a module, by part: the kind, rank and shape of the change that they make."""

from collections.abc import Mapping
from math import prod

from convert.files.records import trimmed

Shape = tuple[int, ...]

KINDS = {  # as in `sd.networks.adapters`, for a reader
    "lora": "LoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "glora": "GLoRA",
    "oft": "OFT",
    "boft": "BOFT",
    "ia3": "(IA)³",
    "full": "full difference",
    "set": "replaced weight",
}
NUMBERS = ("alpha", "scale", "on_input")  # parts with one number, read with the names
WHOLE = {  # what is needed of each kind: one of these sets
    "lora": ({"down", "up"},),
    "loha": ({"w1_a", "w1_b", "w2_a", "w2_b"},),
    "lokr": tuple(a | b for a in ({"w1"}, {"w1_a", "w1_b"}) for b in ({"w2"}, {"w2_a", "w2_b"})),
    "glora": ({"a1", "a2", "b1", "b2"},),
    "oft": ({"blocks"},),
    "boft": ({"blocks"},),
    "ia3": ({"weight", "on_input"}, {"factor"}),
    "full": ({"weight"}, {"bias"}),
    "set": ({"weight"},),
}


def kind_of(parts: Mapping[str, tuple[str, Shape]]) -> str:
    """The kind of a module's change, from its parts: their kinds and shapes. "" if they are of several kinds."""
    kinds = {kind for kind, _ in parts.values()} - {""}
    if kinds == {"oft"} and "blocks" in parts and len(parts["blocks"][1]) == 4:
        return "boft"
    return next(iter(kinds), "full") if len(kinds) < 2 else ""


def rank_of(kind: str, shapes: Mapping[str, Shape]) -> int | None:
    """The rank of a change; None for kinds without one. The shapes are those that `result_shape` accepts."""
    if kind == "lora":
        return shapes["down"][0]
    if kind == "loha":
        return shapes["w1_b"][0]
    if kind == "lokr":
        split_factor = shapes.get("w1_b") or shapes.get("w2_b")
        return split_factor[0] if split_factor else None
    if kind == "glora":
        return _glora_in_order(shapes)[2][1]
    return None


def result_shape(kind: str, shapes: Mapping[str, Shape], weight: Shape) -> Shape | None:
    """The shape of the change that parts with these shapes make, (out, in) or (out, in, height, width).

    weight   the shape of the weight to change
    returns  None if the parts do not go together; the shape of the weight if the kind takes any
    """
    try:
        return _RESULTS[kind](shapes, weight)
    except (LookupError, ValueError):
        return None


def fits(result: Shape | None, weight: Shape) -> bool:
    """Whether a change of one shape can be added to a weight of the other: axes of length 1 at the end do not matter,
    and the inputs of a convolution may be flattened."""
    if result is None:
        return False
    flattened = len(result) == 2 and (*result[:1], result[1]) == (weight[0], prod(weight[1:]))
    return flattened or trimmed(result) == trimmed(weight)


def fits_beside(shapes: Mapping[str, Shape], weight: Shape, kind: str, on_input: bool) -> bool:
    """Whether the parts with a value per output, or per input, have the length of that axis of the weight."""
    lengths = {part: prod(shape) for part, shape in shapes.items()}
    outputs, inputs = weight[0], (*weight[1:2], 1)[0]
    if kind == "ia3" and lengths.get("weight", lengths.get("factor")) != (inputs if on_input else outputs):
        return False
    if {"dora_scale", "magnitude"} <= shapes.keys() or len(shapes.get("bias", (1,))) != 1:
        return False  # two lengths for one row; a bias with axes
    beside = [lengths[part] == outputs for part in ("bias", "magnitude", "rescale") if part in lengths]
    return all(beside) and lengths.get("dora_scale", outputs) in (outputs, inputs)


def _lora(shapes: Mapping[str, Shape], weight: Shape) -> Shape | None:
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    rank, inputs, *kernel = down
    outputs, inner, *one = up
    if mid is not None:
        if trimmed(tuple(kernel)) or len(mid) < 2 or mid[1] != rank:
            return None
        rank, kernel = mid[0], mid[2:]
    return None if inner != rank or trimmed(tuple(one)) else (outputs, inputs, *kernel)


def _loha(shapes: Mapping[str, Shape], weight: Shape) -> Shape | None:
    results = []
    for index in (1, 2):
        a, b, core = shapes[f"w{index}_a"], shapes[f"w{index}_b"], shapes.get(f"t{index}")
        if core is None:
            results.append(_product(a, b))
        elif len(a) == len(b) == 2 and core[:2] == (a[0], b[0]):
            results.append((a[1], b[1], *core[2:]))
    return results[0] if len(results) == 2 and results[0] == results[1] else None


def _lokr(shapes: Mapping[str, Shape], weight: Shape) -> Shape | None:
    for whole, split in (("w1", {"w1_a", "w1_b"}), ("w2", {"w2_a", "w2_b", "t2"})):
        if whole in shapes and split & shapes.keys():  # both ways at once
            return None
    first = shapes["w1"] if "w1" in shapes else _product(shapes["w1_a"], shapes["w1_b"])
    second = shapes.get("w2")
    if second is None:
        a, b, core = shapes["w2_a"], shapes["w2_b"], shapes.get("t2")
        if core is None:
            second = _product(a, b)
        elif len(a) == len(b) == 2 and core[:2] == (a[0], b[0]):
            second = a[1], b[1], *core[2:]
    if first is None or second is None or len(first) != 2 or len(second) < 2:
        return None
    return first[0] * second[0], first[1] * second[1], *second[2:]


def _glora(shapes: Mapping[str, Shape], weight: Shape) -> Shape | None:
    a1, a2, b1, b2 = _glora_in_order(shapes)
    a1, a2, b1 = trimmed_to_two(a1), trimmed_to_two(a2), trimmed_to_two(b1)
    kernel, core = b2[2:], shapes.get("bm")
    if core is not None:
        b2, kernel = trimmed_to_two(b2), core[2:]
        if core[:2] != (b1[1], b2[0]):
            return None
    return (b1[0], b2[1], *kernel) if a1[0] == a2[1] == b2[1] else None


def _glora_in_order(shapes: Mapping[str, Shape]) -> tuple[Shape, Shape, Shape, Shape]:
    """a1 (i, r), a2 (r, i), b1 (o, r) and b2 (r, i, ...), which files of older versions have as a2, a1, b2 and b1.

    For a square weight both orders go together, and the smaller number is the rank. Raises ValueError for neither.
    """
    a1, a2, b1, b2 = (shapes[name] for name in ("a1", "a2", "b1", "b2"))
    orders = ((a1, a2, b1, b2), (a2, a1, b2, b1))
    return min((x for x in orders if x[0][1] == x[1][0] == x[2][1] == x[3][0]), key=lambda x: x[2][1])


def _oft(shapes: Mapping[str, Shape], weight: Shape) -> Shape | None:
    *stages, blocks, height, width = shapes["blocks"]
    if height != width or blocks * height != weight[0] or len(stages) > 1:
        return None
    butterfly = all(0 < m <= blocks.bit_length() and height % 2 == 0 == blocks % 2 ** (m - 1) for m in stages)
    return weight if butterfly else None  # each stage joins rows twice as far apart


def _ia3(shapes: Mapping[str, Shape], weight: Shape) -> Shape | None:
    length = prod(shapes["weight" if "weight" in shapes else "factor"])
    return weight if length == weight[0] else (weight[0], length, *weight[2:])


def _whole(shapes: Mapping[str, Shape], weight: Shape) -> Shape | None:
    return shapes.get("weight", weight)


def _product(a: Shape, b: Shape) -> Shape | None:
    """Of two matrices; the axes behind the second of b stay."""
    return (a[0], *b[1:]) if len(a) == 2 and len(b) >= 2 and a[1] == b[0] else None


def trimmed_to_two(shape: Shape) -> Shape:
    """A matrix stored with further axes of length 1. Raises ValueError for others."""
    if prod(shape[2:]) != 1 or len(shape) < 2:
        raise ValueError(f"not a matrix: {shape}")
    return shape[:2]


_RESULTS = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "glora": _glora,
    "oft": _oft,
    "boft": _oft,
    "ia3": _ia3,
    "full": _whole,
    "set": _whole,
}
