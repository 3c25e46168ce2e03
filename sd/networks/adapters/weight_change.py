"""What one adapter adds to one weight, for every kind of adapter that files contain."""

from collections.abc import Mapping
from math import prod

import torch.nn.functional as F
from torch import Tensor

from sd.networks.adapters.lora import dora, lora
from sd.networks.adapters.lycoris import boft, full, glora, ia3, loha, lokr, oft, replacement

KINDS = {
    "lora": lora,
    "loha": loha,
    "lokr": lokr,
    "glora": glora,
    "oft": oft,
    "boft": boft,
    "ia3": ia3,
    "full": full,
    "set": replacement,
}
LATENT_CHANNELS = 4


def weight_change(
    kind: str,
    parts: Mapping[str, Tensor],
    weight: Tensor,
    *,
    scale: float = 1.0,
    strength: float = 1.0,
    on_input: bool = False,
    constraint: float | None = None,
) -> Tensor:
    """ΔW, to be added to a weight: strength · (W' - W), where W' is the weight that the adapter was trained to make.

    kind        a key of KINDS
    parts       the tensors of the file by their short names ("up", "w1_a", "dora_scale"), in any float type; "bias" is
                for `bias_change` and ignored here
    weight      the base W, (o, i) or (o, i, k, k), or (o,) of a norm; any float type. Files may have (o, i, 1, 1) for
                (o, i), and the reverse
    scale       alpha / rank or what the file has in its place; 1 for kinds without a rank
    strength    what a user chooses, of any sign. The change is proportional to it, with every kind
    on_input    (IA)³ only: whether it scales inputs
    constraint  OFT and BOFT only: the largest norm of the rotations' generators; None: any
    returns     fp32, the shape of `weight`; a new tensor

    A change for the 4 channels of latents fits a first convolution that reads more, as an inpainting model's: what it
    does not know of gets zeros. Raises ValueError if the change has another size than the weight.
    """
    named = {name: part for name, part in parts.items() if name not in ("bias", "dora_scale", "magnitude")}
    lengths = {name: parts[name] for name in ("dora_scale", "magnitude") if name in parts}
    if kind == "ia3":
        named["on_input"] = on_input
    elif kind in ("oft", "boft"):
        named["constraint"] = constraint
    base = weight if weight.ndim > 1 else weight[:, None]
    change = _shaped(KINDS[kind](base, scale if lengths else scale * strength, **named), base, kind)
    unknown = base.shape[1] - change.shape[1]
    if lengths:
        change = dora(base[:, :LATENT_CHANNELS] if unknown else base, change, **lengths).mul_(strength)
    if unknown:
        change = F.pad(change, (0, 0, 0, 0, 0, unknown))
    return change.reshape(weight.shape).float()


def bias_change(parts: Mapping[str, Tensor], *, strength: float = 1.0) -> Tensor:
    """What to add to the bias, or to zeros where there is none, if `parts` has a "bias". fp32, of the stored shape.

    It is a stored difference, so neither alpha nor rank scales it.
    """
    return strength * parts["bias"].float()


def _shaped(change: Tensor, weight: Tensor, kind: str) -> Tensor:
    """A change with the axes of the weight, possibly for the first 4 input channels only."""
    shape = weight.shape
    if len(shape) == 4 and shape[1] > LATENT_CHANNELS and change.numel() < weight.numel():
        shape = (shape[0], LATENT_CHANNELS, *shape[2:])
    if change.numel() != prod(shape) or len(change) != shape[0]:
        raise ValueError(f"a {kind} change of {tuple(change.shape)} does not fit a weight of {tuple(weight.shape)}")
    return change.reshape(shape)
