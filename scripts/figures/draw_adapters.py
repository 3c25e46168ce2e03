"""Draw docs/adapters.png: the crescent that comes with the embedded model, at several strengths and without.

python scripts/figures/draw_adapters.py docs/adapters.png
"""

import sys
from pathlib import Path

from course_pictures import png, run_settings, sheet

import sd
from sd.files import embedded_model
from sd.pipeline.stable_diffusion import StableDiffusion

STRENGTHS = (0.0, 0.5, 1.0, 1.5)
CRESCENTS = ("a red crescent on a purple background", "a green crescent on a white background")
SEED = 3


def adapters(model: StableDiffusion) -> bytes:
    """A row for each prompt, a column for each strength."""
    folder = embedded_model().parent
    columns = []
    for strength in STRENGTHS:
        model.apply([(folder / "crescent.safetensors", strength)])
        columns.append(model.make([run_settings(model, prompt=prompt, seed=SEED) for prompt in CRESCENTS]))
    model.apply([])
    titles = [f"strength {strength:g}" for strength in STRENGTHS]
    return png(sheet([list(row) for row in zip(*columns, strict=True)], titles))


def main() -> None:
    (out,) = sys.argv[1:]
    Path(out).write_bytes(adapters(sd.load()))
    print(out)


if __name__ == "__main__":
    main()
