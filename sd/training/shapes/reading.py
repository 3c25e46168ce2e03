"""Pretrain the text encoder on captions alone: it learns to say what is where.

The original's text encoder was already trained, on 400 million pictures with their texts (Radford et al., "Learning
Transferable Visual Models From Natural Language Supervision", 2021). A fresh one would have to learn the meaning of
words from the UNet's errors, which is slow: only in the noisiest steps does the prompt matter, and there "left of"
changes the loss by a hundredth. Here it learns all that captions may say about each place, before there is any picture.
An attention over its tokens reads the answers, as the UNet's will.
B batch, T tokens, D width, P places, Q questions.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.text.tokenizer import Tokenizer
from sd.training.loop import TrainingOptions, TrainingRun, process_share
from sd.training.shapes.captions import third
from sd.training.shapes.scenes import COLOURS, PATTERNS, SHAPES, SIZES, Scene

PLACES = ("left", "right", "top", "bottom", "inner", "outer", "alone", "behind")  # the last is the background
PLACES_OF = {  # of a scene's things, in order
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
    "inside": ("inner", "outer"),
    None: ("alone",),
}
THIRDS = ("low", "middle", "high")
QUESTIONS = {  # about what is in a place, each with its answers
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "pattern": ("plain", *PATTERNS),
    "column": THIRDS,
    "row": THIRDS,
}
NOTHING = -100  # the label where there is no answer


class Reader(nn.Module):
    """Reads what is in each place from the text encoder's output: attention with a learned query for each place."""

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(0.1 * torch.randn(len(PLACES), width, dtype=torch.float32, device="cpu"))
        self.to_key = nn.Linear(width, width, bias=False)
        self.to_value = nn.Linear(width, width, bias=False)
        self.answers = nn.ModuleList(nn.Linear(width, len(answers)) for answers in QUESTIONS.values())

    def forward(self, context: Tensor) -> list[Tensor]:
        """(B, T, D) -> for each question (B, P, answers), before the softmax"""
        looks = (self.queries @ self.to_key(context).transpose(1, 2)).softmax(dim=-1)  # (B, P, T)
        found = looks @ self.to_value(context)
        return [answer(found) for answer in self.answers]


class ReadingLoss(nn.Module):
    """The error in reading what is in every place from the text encoder's output.

    nearness  weight of the squared distance to the initial text encoder's output, for a UNet that already relies on it
    """

    def __init__(self, text_encoder: nn.Module, *, nearness: float = 0.0):
        super().__init__()
        self.text_encoder, self.nearness = text_encoder, nearness
        self.reader = Reader(text_encoder.final_norm.normalized_shape[0])
        self.at_first = copy.deepcopy(text_encoder).requires_grad_(False) if nearness else None

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens (B, T); labels (B, P, Q), the answer to each question in each place or NOTHING -> scalar

        The sum over the questions of the mean error of their answers. What a caption does not say can only be guessed.
        """
        context = self.text_encoder(tokens)
        loss = torch.zeros((), dtype=torch.float32, device=context.device)
        for said, answers in zip(self.reader(context), labels.unbind(dim=2), strict=True):
            error = F.cross_entropy(said.flatten(0, 1), answers.flatten(), ignore_index=NOTHING, reduction="sum")
            loss = loss + error / (answers != NOTHING).sum().clamp(min=1)
        if self.at_first is None:
            return loss
        return loss + self.nearness * (context - self.at_first(tokens)).square().mean()


def labels_of(scene: Scene) -> Tensor:
    """(P, Q): the index of the answer to each question about each place; NOTHING where there is none"""
    labels = torch.full((len(PLACES), len(QUESTIONS)), NOTHING, dtype=torch.int64, device="cpu")

    def note(place: str, **answers: str) -> None:
        for question, answer in answers.items():
            labels[PLACES.index(place), list(QUESTIONS).index(question)] = QUESTIONS[question].index(answer)

    for place, thing in zip(PLACES_OF[scene.relation], scene.things, strict=True):
        note(place, shape=thing.shape, colour=thing.colour, size=thing.size)
    note("behind", colour=scene.background.colour, pattern=scene.background.pattern)
    if scene.relation is None:
        thirds = {name: third(at, "low", "high") for name, at in (("column", thing.x), ("row", thing.y))}
        if None not in thirds.values():
            note("alone", **thirds)
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
