"""Compare the speed of our tokenizer with the `clip` package's and transformers', in one run.

    python scripts/benchmarks/benchmark_tokenizer.py [--rounds 15]

The three take turns in every round, so a busy machine slows all of them. The table shows medians over the rounds and
the others' times as multiples of ours. "fresh words" are new in every round, so no cache can know them. transformers
needs no network here: its files are made from the vocabulary in the `clip` package.
"""

import argparse
import gzip
import importlib.util
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from sd.text import tokenizer as ours

PROMPTS = [
    "a photograph of an astronaut riding a horse",
    "a corgi's birthday party, oil on canvas",
    "portrait of an old fisherman, highly detailed, sharp focus, 85mm, f/1.4, golden hour",
    "A high tech solarpunk utopia in the Amazon rainforest, trending on artstation, 8k, intricate, cinematic lighting",
    "isometric low poly render of a tiny castle on a floating island, pastel colours, soft shadows, octane render",
]
UNICODE_PROMPTS = [
    "café “naïve” it’s…",
    "馬に乗る宇宙飛行士の写真",
    "black &amp; white",
    "космонавт на лошади",
    "cafÃ© 🐎",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    rng = random.Random(0)

    with tempfile.TemporaryDirectory() as folder:
        original_module = load_original()
        original = original_module.SimpleTokenizer()
        theirs = load_transformers(Path(folder))
        tokenizer = ours.Tokenizer()

        def one_by_one(texts: list[str]) -> list[Callable]:
            return [
                lambda: [tokenizer.encode(text) for text in texts],
                lambda: [original.encode(text) for text in texts],
                lambda: [theirs(text)["input_ids"] for text in texts],
            ]

        def as_batch(texts: list[str]) -> list[Callable]:
            return [
                lambda: tokenizer(texts),
                lambda: [pad_to_77(original.encode(text)) for text in texts],
                lambda: theirs(texts, padding="max_length", max_length=77, truncation=True, return_tensors="np"),
            ]

        def construct() -> list[Callable]:
            return [
                lambda: (ours.merge_table.cache_clear(), ours.Tokenizer()),
                original_module.SimpleTokenizer,
                lambda: load_transformers(Path(folder)),
            ]

        cases = [  # name, how many prompts, a function that makes the three calls of one round
            ("prompts, one by one", 5, lambda: one_by_one(PROMPTS)),
            ("prompts, one by one, fresh words", 50, lambda: one_by_one(fresh_prompts(rng, 50))),
            ("prompts, batch of 250 to 77 ids", 250, lambda: as_batch(PROMPTS * 50)),
            ("other scripts, entities, mojibake", 5, lambda: one_by_one(UNICODE_PROMPTS)),
            ("one word of 2,000 letters, fresh", 1, lambda: one_by_one([letters(rng, 2000)])),
            ("construct", 1, construct),
        ]
        print(f"microseconds a prompt, median of {rounds} rounds")
        print(f"{'':<34}{'ours':>10}{'clip':>12}{'transformers':>14}{'clip/ours':>12}{'transformers/ours':>20}")
        for name, count, make_calls in cases:
            a, b, c = (1e6 * seconds / count for seconds in take_turns(make_calls, rounds))
            print(f"{name:<34}{a:>10,.1f}{b:>12,.1f}{c:>14,.1f}{b / a:>12.1f}{c / a:>20.1f}")


def take_turns(make_calls: Callable[[], list[Callable]], rounds: int) -> list[float]:
    """Median seconds of each call; the first round warms up and does not count."""
    times: list[list[float]] = []
    for _ in range(rounds + 1):
        calls = make_calls()
        times.append([seconds(call) for call in calls])
    return [statistics.median(column) for column in zip(*times[1:], strict=True)]


def seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def pad_to_77(ids: list[int]) -> list[int]:
    return [ours.START, *ids[:75], ours.END, *[ours.END] * (75 - len(ids))]


def fresh_prompts(rng: random.Random, count: int) -> list[str]:
    return [" ".join(letters(rng, rng.randint(3, 11)) for _ in range(15)) for _ in range(count)]


def letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=count))


def load_original() -> ModuleType:
    """clip/simple_tokenizer.py alone: `import clip` would import torch and torchvision."""
    spec = importlib.util.spec_from_file_location("simple_tokenizer", clip_folder() / "simple_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clip_folder() -> Path:
    spec = importlib.util.find_spec("clip")
    if spec is None:
        raise ImportError("the clip package is missing: pip install openai-clip==1.0.1 --no-deps")
    return Path(spec.submodule_search_locations[0])


def load_transformers(folder: Path):
    """transformers' tokenizer, from files written out of the original's vocabulary."""
    from transformers import CLIPTokenizer

    if not (folder / "merges.txt").exists():
        vocabulary = gzip.decompress((clip_folder() / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8")
        merges = vocabulary.split("\n")[1 : 1 + 48894]
        (folder / "vocab.json").write_text(json.dumps(load_original().SimpleTokenizer().encoder))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(str(folder))


if __name__ == "__main__":
    main()
