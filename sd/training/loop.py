"""The training loop, for any module whose forward pass returns a loss; in one process or several; exactly resumable."""

import csv
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from sd.files import written_whole
from sd.training.ema import AveragedWeights
from sd.training.mixed import mixed_precision
from sd.training.muon import Muon, is_matrix

MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "muon": ("momentum",)}  # what an optimiser keeps for each weight
COLUMNS = ("step", "loss", "learning_rate", "gradient_norm", "seconds")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    steps: int  # updates in total, also over interruptions
    learning_rate: float
    warmup: int  # steps in which the learning rate grows from 0
    final_learning_rate: float  # reached along half a cosine; equal to learning_rate: constant
    weight_decay: float
    gradient_clip: float  # largest norm of the whole gradient
    ema_decay: float
    autocast: bool  # bfloat16 in the forward pass
    save_every: int  # steps between saved states
    muon: bool = False  # for weight matrices; AdamW for the rest


def save_rows(path: Path, rows: list[dict[str, float]]) -> None:
    """Write `loss.csv`, one row per step."""
    with written_whole(path, force=True) as file:
        lines = [COLUMNS, *([row[column] for column in COLUMNS] for row in rows)]
        file.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())


def load_rows(path: Path, steps: int) -> list[dict[str, float]]:
    """The rows up to a step; steps after it will be repeated."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [{**row, "step": int(row["step"])} for row in rows if row["step"] <= steps]


class Numbered(Dataset):
    """A function of a number as a data set for PyTorch's loader."""

    def __init__(self, function: Callable[[int], tuple[Tensor, ...]]):
        self.function = function

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        return self.function(number)


class TrainingRun:
    """A module in training, with its optimiser and averaged weights, in a folder that training resumes from.

    module   its forward pass takes a batch and returns the loss, a scalar
    batches  step -> the batch of this process, a tuple of tensors on any device; depends on the step alone
    workers  processes that prepare batches while the device trains, for a GPU that would otherwise wait. `batches` must
             then return tensors on the CPU. The batches and their order stay the same
    settled  whatever else the losses depend on, such as the seed: numbers by name. They must be the same on resuming
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Callable[[int], tuple[Tensor, ...]],
        options: TrainingOptions,
        folder: Path,
        *,
        workers: int = 0,
        **settled: float | None,
    ):
        self.module, self.batches, self.options, self.folder = module, batches, options, folder
        self.workers = workers
        self.settings = {**asdict(options), **settled}
        self.trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
        common = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
        matrices, others = [], []
        for name, value in self.trained.items():
            (matrices if options.muon and is_matrix(name, value) else others).append(value)
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        if matrices:
            self.optimisers["muon"] = Muon(matrices, **common)
        if others:  # fused: four times faster than one tensor at a time, which matters for small models
            self.optimisers["adam"] = torch.optim.AdamW(others, betas=(0.9, 0.99), fused=True, **common)
        self.ema = AveragedWeights(module, options.ema_decay)
        self.rows: list[dict[str, float]] = []
        self.step = 0
        self.is_first = not dist.is_initialized() or dist.get_rank() == 0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.safetensors").exists():
            self.load()

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to the final learning rate."""
        options = self.options
        if step < options.warmup:
            return options.learning_rate * (step + 1) / options.warmup
        share = (step - options.warmup) / max(1, options.steps - options.warmup)
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * share, dtype=torch.float32, device="cpu")).item())
        return options.final_learning_rate + (options.learning_rate - options.final_learning_rate) * cosine

    def run(self) -> Iterator[dict[str, float]]:
        """Train to the end; yields each step's row of `loss.csv`."""
        parallel = DistributedDataParallel(self.module) if dist.is_initialized() else self.module
        started = time.perf_counter()
        for batch in self.coming_batches():
            batch = tuple(values.to(self.device, non_blocking=True) for values in batch)
            rate = self.learning_rate(self.step)
            for optimiser in self.optimisers.values():
                optimiser.param_groups[0]["lr"] = rate
            with mixed_precision(self.device, enabled=self.options.autocast):
                loss = parallel(*batch)
            self.module.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.trained.values(), self.options.gradient_clip)
            if not norm.isfinite():
                raise ArithmeticError(f"the gradient of step {self.step + 1} is not finite; try a lower learning rate")
            for optimiser in self.optimisers.values():
                optimiser.step()
            self.ema.update(self.module)
            self.step += 1
            row = {
                "step": self.step,
                "loss": average(loss.detach()),
                "learning_rate": rate,
                "gradient_norm": norm.item(),
                "seconds": round(time.perf_counter() - started, 4),
            }
            self.rows.append(row)
            if self.step % self.options.save_every == 0 or self.step == self.options.steps:
                self.save()
            yield row
            started = time.perf_counter()

    def coming_batches(self) -> Iterator[tuple[Tensor, ...]]:
        """The batches of the remaining steps, in order."""
        steps = range(self.step, self.options.steps)
        if not self.workers:
            return map(self.batches, steps)
        options = {"num_workers": self.workers, "pin_memory": self.device.type == "cuda"}
        return iter(DataLoader(Numbered(self.batches), sampler=steps, batch_size=None, **options))

    @property
    def device(self) -> torch.device:
        return next(iter(self.trained.values())).device

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on. Its random numbers depend on the step number alone."""
        state = {f"weights.{name}": value for name, value in self.module.named_parameters()}
        state |= {f"ema.{name}": value for name, value in self.ema.weights.items()}
        names = {value: name for name, value in self.trained.items()}
        for kind, optimiser in self.optimisers.items():
            for value, moments in optimiser.state.items():
                state |= {f"{kind}.{key}.{names[value]}": moment for key, moment in moments.items()}
        return state

    def save(self) -> None:
        if not self.is_first:
            return
        numbers = {"step": self.step, "ema_updates": self.ema.updates, "options": self.settings}
        with written_whole(self.folder / "state.safetensors", force=True) as file:
            save_file(
                {name: value.detach().contiguous() for name, value in self.tensors().items()},
                file.name,
                {"training": json.dumps(numbers)},
            )
        save_rows(self.folder / "loss.csv", self.rows)

    @torch.no_grad()
    def load(self) -> None:
        """Restore a saved state. Raises ValueError if its options or its module differ."""
        path = self.folder / "state.safetensors"
        with safe_open(path, "pt") as file:
            numbers = json.loads(file.metadata()["training"])
            changed = {
                name: (value, numbers["options"][name])
                for name, value in self.settings.items()
                if value != numbers["options"].get(name, value) and name not in ("steps", "save_every")
            }
            if changed:
                listed = "; ".join(f"{name} was {old}, is {new}" for name, (new, old) in changed.items())
                raise ValueError(f"{path} was made with other options ({listed}). Use those, or another folder.")
            for kind, optimiser in self.optimisers.items():
                for value in optimiser.param_groups[0]["params"]:
                    optimiser.state[value] = {name: torch.zeros_like(value) for name in MOMENTS[kind]}
                    if kind == "adam":
                        optimiser.state[value]["step"] = torch.zeros((), dtype=torch.float32, device=value.device)
            state = self.tensors()
            if set(file.keys()) != set(state):
                raise ValueError(f"{path} belongs to another model. Use another folder.")
            for name, value in state.items():
                value.copy_(file.get_tensor(name))
        self.step, self.ema.updates = numbers["step"], numbers["ema_updates"]
        self.rows = load_rows(self.folder / "loss.csv", self.step)


def average(value: Tensor) -> float:
    """The mean of a number over all processes."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


def process_share(batch_size: int) -> slice:
    """Which pictures of a global batch belong to this process."""
    if not dist.is_initialized():
        return slice(0, batch_size)
    world, rank = dist.get_world_size(), dist.get_rank()
    if batch_size % world:
        raise ValueError(f"the batch of {batch_size} pictures cannot be divided among {world} processes")
    share = batch_size // world
    return slice(rank * share, (rank + 1) * share)
