"""What is trained beside frozen networks: low-rank adapters (LoRA, LoCon), and words that are new to the text encoder.

Both act on the networks from outside, and are all that is trained, averaged and saved.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import sqrt

import torch
from torch import Tensor, nn

from sd.networks.learned_rows import with_rows
from sd.networks.text_encoder import TextEncoder
from sd.text.learned_words import LearnedTokenizer, LearnedWord
from sd.text.tokenizer import Tokenizer


class LowRank(nn.Module):
    """What an adapter adds to the output of one layer: alpha / rank * up(down(x)). Nothing at first, since up is zero.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), eq. 3. For a convolution, down has its
    kernel, stride and padding, and up is 1x1, as in LyCORIS's LoCon: Yeh et al. (2023), section 3.1.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.alpha, self.scale = alpha, alpha / rank
        if isinstance(layer, nn.Conv2d):
            sizes = layer.kernel_size, layer.stride, layer.padding
            self.down = nn.Conv2d(layer.in_channels, rank, *sizes, bias=False)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=sqrt(5), generator=generator)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., inputs) -> (B, ..., outputs), or (B, inputs, H, W) -> (B, outputs, H', W')"""
        return self.scale * self.up(self.down(x))


def adapted_layers(
    networks: Mapping[str, nn.Module], *, convolutions: bool, text_encoder: bool
) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that adapters usually change, by their names: `unet.… text_encoder.…`.

    All linear layers of the UNet's attention blocks; with convolutions, also every layer of the residual blocks and of
    down- and upsampling; with the text encoder, all of its linear layers.
    """
    found = {}
    for name, layer in networks["unet"].named_modules():
        inner = name.startswith(("input_blocks", "middle_block", "output_blocks")) and name != "input_blocks.0.conv"
        if isinstance(layer, nn.Linear | nn.Conv2d) and (".attention." in name or (convolutions and inner)):
            found[f"unet.{name}"] = layer
    if text_encoder:
        layers = networks["text_encoder"].named_modules()
        found |= {f"text_encoder.{name}": layer for name, layer in layers if isinstance(layer, nn.Linear)}
    return found


class LowRankAdapter(nn.Module):
    """An adapter on layers from `adapted_layers`; from now on, their outputs include what it adds.

    rank, alpha            of linear layers and 1x1 convolutions
    conv_rank, conv_alpha  of larger convolutions
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Linear | nn.Conv2d],
        *,
        rank: int,
        alpha: float,
        conv_rank: int = 0,
        conv_alpha: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.settings = {"rank": rank, "alpha": alpha, "conv_rank": conv_rank, "conv_alpha": conv_alpha}
        self.is_on = True
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, layer in layers.items():
            large = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
            added = LowRank(layer, *((conv_rank, conv_alpha) if large else (rank, alpha)), generator)
            self.add_module(name.replace(".", "/"), added.to(layer.weight.device))
            layer.register_forward_hook(
                lambda _, inputs, output, added=added: output + added(*inputs) if self.is_on else output
            )

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside the `with` block, the networks are as they were without it."""
        self.is_on = False
        try:
            yield
        finally:
            self.is_on = True

    @torch.no_grad()
    def begin_with(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the values of an adapter on the same layers, with the same ranks and alphas.

        parts  "down" and "up" of each layer, with or without axes of length 1

        Raises ValueError for other layers or ranks.
        """
        own = dict(self.layers())
        if parts.keys() != own.keys():
            raise ValueError(f"the adapter to begin with has {len(parts)} layers, this one {len(own)}, or others.")
        for name, added in own.items():
            for part, layer in (("down", added.down), ("up", added.up)):
                given, shape = parts[name][part], layer.weight.shape
                if given.numel() != shape.numel():
                    raise ValueError(f"the adapter to begin with has other ranks: {name} is {tuple(given.shape)}")
                layer.weight.copy_(given.reshape(shape))

    def layers(self) -> Iterator[tuple[str, LowRank]]:
        """The name of each adapted layer, and what is added to it."""
        for name, added in self.named_children():
            yield name.replace("/", "."), added


class NewWord(nn.Module):
    """A word with vectors of its own, from now on known to the text encoder: textual inversion.

    name       of the word in captions
    vectors    (n, D), to begin with; the word takes n places in a prompt
    tokenizer  the model's; `self.tokenizer` knows the word as well

    Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion" (2022).
    """

    def __init__(self, name: str, vectors: Tensor, text_encoder: TextEncoder, tokenizer: Tokenizer):
        super().__init__()
        self.settings = {"word": name, "vectors": len(vectors)}
        self.vectors = nn.Parameter(vectors.clone())
        word = LearnedWord(name=name, vectors=vectors.numpy(force=True))
        sizes = {"context_length": tokenizer.context_length, "pad_token": tokenizer.pad_token}
        self.tokenizer = LearnedTokenizer(words=(word,), **sizes)
        text_encoder.token_embedding = with_rows(text_encoder.token_embedding, self.vectors)


class OnlyTrained(nn.Module):
    """A loss whose networks are frozen: its parameters are those of the adapter alone."""

    def __init__(self, adapter: nn.Module, loss: nn.Module):
        super().__init__()
        self.adapter = adapter.requires_grad_(True)  # new vectors also belong to the text encoder, which is frozen
        self._frozen = (loss,)  # in a tuple, a module is no part of this one

    def forward(self, *batch: Tensor) -> Tensor:
        (loss,) = self._frozen
        return loss(*batch)
