"""Pretrain the text encoder on captions alone: it learns to say what is where.

The original's text encoder was already trained, on 400 million pictures with their texts (Radford et al., "Learning
Transferable Visual Models From Natural Language Supervision", 2021). A fresh one would have to learn the meaning of
words from the UNet's errors, which is slow: only in the noisiest steps does the prompt matter, and there "left of"
changes the loss by a hundredth. Here it learns which shape and colour is in each place, before there is any picture. An
attention over its tokens reads the answer, as the UNet's will.
B batch, T tokens, D width, P places.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.text.tokenizer import Tokenizer
from sd.training.loop import TrainingOptions, TrainingRun, process_share
from sd.training.shapes.scenes import COLOURS, SHAPES, Scene

PLACES = ("left", "right", "top", "bottom", "inner", "outer", "alone", "behind")  # the last is the background
PLACES_OF = {  # of a scene's things, in order
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
    "inside": ("inner", "outer"),
    None: ("alone",),
}
NOTHING = -100  # the label that cross_entropy ignores


class Reader(nn.Module):
    """Reads what is in each place from the text encoder's output: attention with a learned query for each place."""

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(0.1 * torch.randn(len(PLACES), width, dtype=torch.float32, device="cpu"))
        self.to_key = nn.Linear(width, width, bias=False)
        self.to_value = nn.Linear(width, width, bias=False)
        self.shape = nn.Linear(width, len(SHAPES))
        self.colour = nn.Linear(width, len(COLOURS))

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> (B, P, shapes), (B, P, colours), before the softmax"""
        looks = (self.queries @ self.to_key(context).transpose(1, 2)).softmax(dim=-1)  # (B, P, T)
        found = looks @ self.to_value(context)
        return self.shape(found), self.colour(found)


class ReadingLoss(nn.Module):
    """The error in reading the shape and the colour in every place from the text encoder's output.

    nearness  weight of the squared distance to the initial text encoder's output, for a UNet that already relies on it
    """

    def __init__(self, text_encoder: nn.Module, *, nearness: float = 0.0):
        super().__init__()
        self.text_encoder, self.nearness = text_encoder, nearness
        self.reader = Reader(text_encoder.final_norm.normalized_shape[0])
        self.at_first = copy.deepcopy(text_encoder).requires_grad_(False) if nearness else None

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens (B, T); labels (B, P, 2), shape and colour of each place or NOTHING -> scalar"""
        context = self.text_encoder(tokens)
        loss = sum(
            F.cross_entropy(said.flatten(0, 1), labels[:, :, which].flatten(), ignore_index=NOTHING)
            for which, said in enumerate(self.reader(context))
        )
        if self.at_first is None:
            return loss
        return loss + self.nearness * (context - self.at_first(tokens)).square().mean()


def labels_of(scene: Scene) -> Tensor:
    """(P, 2): the shape's and the colour's index for each place; NOTHING for an empty place"""
    labels = torch.full((len(PLACES), 2), NOTHING, dtype=torch.int64, device="cpu")
    for place, thing in zip(PLACES_OF[scene.relation], scene.things, strict=True):
        indices = SHAPES.index(thing.shape), list(COLOURS).index(thing.colour)
        labels[PLACES.index(place)] = torch.tensor(indices, dtype=torch.int64, device="cpu")
    labels[PLACES.index("behind"), 1] = list(COLOURS).index(scene.background.colour)
    return labels


def reading_run(
    text_encoder: nn.Module,
    tokenizer: Tokenizer,
    describe: Callable[[int], tuple[Scene, str]],
    options: TrainingOptions,
    folder: Path,
    *,
    batch_size: int,
    seed: int,
    nearness: float,
) -> TrainingRun:
    """Train the text encoder on endless new scenes.

    describe  number -> a scene and its caption
    """
    share = process_share(batch_size)
    device = text_encoder.final_norm.weight.device

    def batch(step: int) -> tuple[Tensor, Tensor]:
        numbers = range(step * batch_size, (step + 1) * batch_size)[share]
        scenes, captions = zip(*map(describe, numbers), strict=True)
        labels = torch.stack([labels_of(scene) for scene in scenes])
        return torch.from_numpy(tokenizer(list(captions))).to(device), labels.to(device)

    torch.manual_seed(seed)  # the reader's weights
    loss = ReadingLoss(text_encoder, nearness=nearness).to(device)
    return TrainingRun(loss, batch, options, folder, batch_size=batch_size, seed=seed, nearness=nearness)
