"""What the scripts that train adapters share: flags, the frozen model, the pictures, and the metadata of the result."""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from training_command import options, prepare, save_sheet, train, training_parser

import sd
from convert.adapters.model_metadata import model_metadata
from sd.pipeline.runner import Runner
from sd.pipeline.stable_diffusion import StableDiffusion
from sd.training.adapters import LowRankAdapter, NewWord
from sd.training.folder import PictureFolder
from sd.training.jobs import denoiser_run
from sd.training.latents import EncodedAsTheyCome, EncodedOnce, encode_all
from sd.training.loop import TrainingOptions, TrainingRun
from sd.training.shapes.drawing import ShapesDataset
from sd.training.shapes.scenes import KINDS, SHAPES
from sd.training.shapes.subjects import SUBJECTS, SubjectPictures

SAMPLES = 8
SCENES = "shapes"  # draws what the embedded model was trained on
MOST_TAGS = 200  # of the captions, in the metadata


def adapter_parser(
    description: str, *, steps: int, learning_rate: float, prompt_dropout: float | None = None
) -> argparse.ArgumentParser:
    """The flags; with a share of pictures without caption, also those of the usual loss."""
    parser = training_parser(description, batch_size=4, save_every=250)
    add = parser.add_argument
    add("model", type=Path, help="the checkpoint to train for; it stays unchanged")
    add("pictures", help=f"folder of pictures and captions, or what to draw: {', '.join([SCENES, *SUBJECTS])}")
    add("folder", type=Path, help="output folder; the result gets its name")
    add("--steps", type=int, default=steps, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=learning_rate, help="(default: %(default)s)")
    add("--size", type=int, help="pixels of a side, a multiple of 8 (default: the model's native size)")
    add("--drawn", type=int, default=1600, help="how many pictures to draw (default: %(default)s)")
    add("--ordinary", type=float, default=0.5, help="share of drawn pictures without the subject (default: 0.5)")
    add("--scenes", default="all", choices=KINDS, help="of drawn pictures, as for train_tiny.py (default: %(default)s)")
    add(
        "--shapes", nargs="+", choices=SHAPES, default=SHAPES, metavar="SHAPE", help="in drawn pictures without subject"
    )
    add("--sample-every", type=int, default=250, help="steps (default: %(default)s)")
    add("--ema-decay", type=float, default=0.99, help="(default: %(default)s)")
    if prompt_dropout is not None:
        add(
            "--prompt-dropout",
            type=float,
            default=prompt_dropout,
            help="share of pictures trained without caption (default: %(default)s)",
        )
        add("--min-snr-gamma", type=float, help="weight the timesteps; 5 is usual (default: equal weights)")
        add(
            "--snr-floor", type=float, default=0.0, help="with --min-snr-gamma, the weight of the noisiest (default: 0)"
        )
    return parser


class TrainingPictures:
    """The pictures of a folder, or drawn ones, which are encoded once and kept in the output folder."""

    def __init__(self, args: argparse.Namespace, model: StableDiffusion):
        self.size = args.size or model.config.native_size
        if args.pictures in (SCENES, *SUBJECTS) and not Path(args.pictures).is_dir():
            chosen = {"kind": args.scenes, "shapes": tuple(args.shapes)}
            if args.pictures == SCENES:
                drawn = ShapesDataset(args.seed, self.size, **chosen)
            else:
                drawn = SubjectPictures(args.pictures, args.seed, self.size, ordinary=args.ordinary, **chosen)
            latents = args.folder / "latents.safetensors"
            if not latents.exists():
                args.folder.mkdir(parents=True, exist_ok=True)
                with tqdm(desc="encoding", total=args.drawn, unit="picture") as bar:
                    encode_all(
                        model.vae,
                        drawn,
                        args.drawn,
                        latents,
                        batch_size=args.batch_size,
                        on_batch=bar.update,
                        made_of=f"{args.drawn}: {drawn.name}",
                    )
            self.encoded = EncodedOnce(latents, drawn.recaption, args.seed, f"{args.drawn}: {drawn.name}")
            self.captions = [drawn.recaption(number, 0) for number in range(args.drawn)]
            self.trigger, shown = "", args.drawn
            if isinstance(drawn, SubjectPictures):
                self.trigger, shown = drawn.trigger, sum(drawn.scene(number)[1] for number in range(args.drawn))
            self.tags = {args.pictures: {self.trigger or SCENES: shown}}
        else:
            self.trigger = ""
            folder = PictureFolder(Path(args.pictures), self.size, args.seed)
            self.encoded = EncodedAsTheyCome(model.vae, folder)
            self.captions = [folder.captions[name] for name in folder.names]
            tags = Counter(tag.strip() for caption in self.captions for tag in caption.split(",") if tag.strip())
            self.tags = {Path(args.pictures).resolve().name: dict(tags.most_common(MOST_TAGS))}


def load_frozen(args: argparse.Namespace) -> tuple[StableDiffusion, dict[str, nn.Module]]:
    """The model in float32, and its networks; none of them is trained. Raises ValueError for models of XL."""
    model = sd.load(args.model, device=str(prepare(args)), precision="fp32")
    if model.config.unet.vector_width:
        raise ValueError(
            f"{args.model} is an {model.config.family} model; adapters and words are trained for Stable Diffusion 1 "
            "and 2 only. Give a model of these."
        )
    networks = {part: getattr(model, part).requires_grad_(False) for part in ("unet", "vae", "text_encoder")}
    networks["unet"].to(memory_format=torch.channels_last)
    model.runner = Runner()  # the one for speed joins layers, past the adapters that hang on them
    return model, networks


def train_adapter(
    args: argparse.Namespace,
    model: StableDiffusion,
    networks: dict[str, nn.Module],
    pictures: TrainingPictures,
    adapter: LowRankAdapter | NewWord,
) -> TrainingRun:
    """Train with the usual loss."""
    training = denoiser_run(
        model.config,
        networks,
        pictures.encoded,
        falling(args),
        args.folder,
        batch_size=args.batch_size,
        seed=args.seed,
        prompt_dropout=args.prompt_dropout,
        min_snr_gamma=args.min_snr_gamma,
        snr_floor=args.snr_floor,
        train_text_encoder=False,
        adapter=adapter,
    )
    train_to_the_end(args, model, pictures, training)
    return training


def falling(args: argparse.Namespace) -> TrainingOptions:
    """A learning rate that falls to a tenth."""
    rate, warmup = args.learning_rate, min(50, args.steps // 4)
    return options(args, args.steps, rate, warmup=warmup, final_learning_rate=rate / 10, ema_decay=args.ema_decay)


def train_to_the_end(
    args: argparse.Namespace, model: StableDiffusion, pictures: TrainingPictures, training: TrainingRun, **settings
) -> None:
    """Train, with sheets of sample pictures by the averaged weights, in these settings."""
    sizes = {"width": pictures.size, "height": pictures.size}
    batch = [
        model.settings_for(text, seed=seed, **sizes, **settings)
        for seed, text in enumerate(pictures.captions[:SAMPLES])
    ]

    @torch.no_grad()
    def show(step: int) -> None:
        with training.ema.applied(training.module):
            save_sheet(args.folder / f"samples-{step:06}.png", model.make(batch), 4)

    train(training, "adapter", args.sample_every, show)


def metadata_of(
    args: argparse.Namespace, model: StableDiffusion, pictures: TrainingPictures, kind: str
) -> dict[str, str]:
    """What others note of a training; no dates, so that the same command gives the same file.

    kind  lora or textual-inversion
    """
    return {
        **model_metadata(model.config, kind),
        "ss_sd_model_name": args.model.name,
        "ss_new_sd_model_hash": str(model.source.sha256()),
        "ss_output_name": args.folder.name,
        "ss_resolution": f"({pictures.size}, {pictures.size})",
        "ss_steps": str(args.steps),
        "ss_total_batch_size": str(args.batch_size),
        "ss_learning_rate": str(args.learning_rate),
        "ss_seed": str(args.seed),
        **({"ss_caption_dropout_rate": str(args.prompt_dropout)} if "prompt_dropout" in args else {}),
        **({"ss_min_snr_gamma": str(args.min_snr_gamma)} if "min_snr_gamma" in args else {}),
        "ss_tag_frequency": json.dumps(pictures.tags),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": args.folder.name,
        **({"modelspec.trigger_phrase": pictures.trigger} if pictures.trigger else {}),
        "modelspec.resolution": f"{pictures.size}x{pictures.size}",
    }
