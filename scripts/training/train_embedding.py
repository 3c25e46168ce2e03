"""Train vectors for a new word (textual inversion) on pictures and captions, with the whole model frozen.

    python scripts/training/train_embedding.py model.ckpt photos/ runs/mycat --word mycat --from-word cat --vectors 2
    python scripts/training/train_embedding.py weights/sd-shapes.ckpt pastel runs/pastel --from-word white

The captions must contain the word. Pictures are those of train_lora.py. The output folder holds the state, the
losses (`loss.csv`) and sample pictures; the same command resumes training. The result, named after that folder, is a
`.safetensors` as kohya's scripts write it, or with --pt a `.pt` as the web UI does.
"""

import torch.distributed as dist
from adapter_command import TrainingPictures, adapter_parser, load_frozen, metadata_of, train_adapter
from torch import Tensor
from training_command import run

from sd.pipeline.stable_diffusion import StableDiffusion
from sd.runtime.adapter_saving import save_embedding
from sd.training.adapters import NewWord


def first_vectors(model: StableDiffusion, word: str, count: int) -> Tensor:
    """The vectors (count, D) to begin with: those of the word's tokens, repeated until there are enough."""
    tokens = model.tokenizer.encode(word)
    if not tokens:
        raise ValueError(f"--from-word {word!r} has no tokens; give a word to begin with, such as style.")
    chosen = (tokens * count)[:count]
    return model.text_encoder.token_embedding.weight[chosen].detach().float()


def main(arguments: list[str] | None = None) -> None:
    parser = adapter_parser(__doc__, steps=1000, learning_rate=5e-3, prompt_dropout=0.0)
    add = parser.add_argument
    add("--word", help="the new word in the captions (default: the one of drawn pictures, or the folder's name)")
    add("--from-word", default="style", help="a known word whose vectors it begins with (default: %(default)s)")
    add("--vectors", type=int, default=1, help="how many, and places in a prompt (default: %(default)s)")
    add("--pt", action="store_true", help="write a .pt in place of a .safetensors")
    args = parser.parse_args(arguments)
    if not 1 <= args.vectors <= 75:
        raise ValueError(f"--vectors {args.vectors} is out of range: 1 to 75, the places in a prompt.")
    model, networks = load_frozen(args)
    pictures = TrainingPictures(args, model)
    word = args.word or pictures.trigger or args.folder.name
    named = sum(word.lower() in caption.lower() for caption in pictures.captions)
    if not named:
        raise ValueError(f"none of the {len(pictures.captions)} captions contains {word!r}; name another --word.")
    new = NewWord(word, first_vectors(model, args.from_word, args.vectors), model.text_encoder, model.tokenizer)
    model.tokenizer = new.tokenizer
    training = train_adapter(args, model, networks, pictures, new)
    if training.is_first:
        target = args.folder / f"{args.folder.name}.{'pt' if args.pt else 'safetensors'}"
        vectors = training.ema.weights["adapter.vectors"]
        save_embedding(target, vectors, metadata_of(args, model, pictures, "textual-inversion"), step=training.step)
        print(target)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
