"""Train a low-rank adapter (LoRA, LoCon) for a checkpoint, on pictures and captions, and write it as others do.

    python scripts/training/train_lora.py model.ckpt photos/ runs/photos --rank 16 --alpha 8
    python scripts/training/train_lora.py weights/sd-shapes.ckpt crescents runs/crescent --conv-rank 4

The pictures are in a folder, captioned as for finetune.py, or are drawn: crescents, outlined or pastel, mixed with
ordinary ones (`sd/training/shapes/subjects.py`). The output folder holds the state, the losses (`loss.csv`) and sample
pictures; the same command resumes training. The result, named after that folder, is a `.safetensors` with kohya's names
and metadata, in float16 and with averaged weights.
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch.distributed as dist
from adapter_command import TrainingPictures, adapter_parser, load_frozen, metadata_of, train_adapter
from torch import nn
from training_command import run

from sd.pipeline.stable_diffusion import StableDiffusion
from sd.runtime.adapter_saving import read_lora, save_lora
from sd.training.adapters import LowRankAdapter, adapted_layers
from sd.training.loop import TrainingRun


def add_ranks(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--rank", type=int, default=8, help="of linear layers (default: %(default)s)")
    add("--alpha", type=float, help="the change is scaled by alpha / rank (default: the rank)")
    add("--conv-rank", type=int, default=0, help="also adapt residual blocks, 3x3 convolutions with this rank")
    add("--conv-alpha", type=float, help="(default: the rank of these)")
    add("--init", type=Path, help="begin with this LoRA, which has the same layers, ranks and alphas")


def check_ranks(args: Namespace) -> None:
    if args.rank < 1 or args.conv_rank < 0:
        raise ValueError(f"ranks must be positive, got --rank {args.rank} and --conv-rank {args.conv_rank}")


def low_rank_adapter(
    args: Namespace, model: StableDiffusion, networks: dict[str, nn.Module], *, text_encoder: bool
) -> LowRankAdapter:
    layers = adapted_layers(networks, convolutions=args.conv_rank > 0, text_encoder=text_encoder)
    adapter = LowRankAdapter(
        layers,
        rank=args.rank,
        alpha=args.rank if args.alpha is None else args.alpha,
        conv_rank=args.conv_rank,
        conv_alpha=args.conv_rank if args.conv_alpha is None else args.conv_alpha,
        seed=args.seed,
    )
    if args.init:
        adapter.begin_with(read_lora(args.init, model.config))
    return adapter


def finish(
    args: Namespace,
    model: StableDiffusion,
    pictures: TrainingPictures,
    adapter: LowRankAdapter,
    training: TrainingRun,
    told: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the averaged weights, and leave the other processes.

    told  further metadata
    """
    if training.is_first:
        sizes = {name: f"{value:g}" for name, value in adapter.settings.items()}
        metadata = metadata_of(args, model, pictures, "lora") | {
            "ss_network_module": "networks.lora",
            "ss_network_dim": sizes["rank"],
            "ss_network_alpha": sizes["alpha"],
            **told,
        }
        if args.conv_rank:
            conv = {"conv_dim": sizes["conv_rank"], "conv_alpha": sizes["conv_alpha"]}
            metadata["ss_network_args"] = json.dumps(conv)
        target = args.folder / f"{args.folder.name}.safetensors"
        with training.ema.applied(training.module):
            parts = [(name, low.down.weight, low.up.weight, low.alpha) for name, low in adapter.layers()]
            save_lora(target, model.config, parts, metadata)
        print(target)
    if dist.is_initialized():
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = adapter_parser(__doc__, steps=1000, learning_rate=1e-4, prompt_dropout=0.1)
    add_ranks(parser)
    parser.add_argument("--train-text-encoder", action="store_true", help="also adapt the text encoder")
    args = parser.parse_args(arguments)
    check_ranks(args)
    model, networks = load_frozen(args)
    pictures = TrainingPictures(args, model)
    adapter = low_rank_adapter(args, model, networks, text_encoder=args.train_text_encoder)
    training = train_adapter(args, model, networks, pictures, adapter)
    finish(args, model, pictures, adapter, training)


if __name__ == "__main__":
    run(main)
