"""The pictures of Stable Diffusion 1 in the docs, for screens and for phones: docs/architecture.svg and -tall.svg.

python scripts/figures/draw_architecture.py
"""

import argparse
from pathlib import Path

from sd.config import SD_V1
from sd.study.architecture.drawing import drawing

DOCS = Path(__file__).parents[2] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.parse_args()
    for name, tall in (("architecture.svg", False), ("architecture-tall.svg", True)):
        (DOCS / name).write_text(drawing(SD_V1, tall=tall) + "\n", encoding="utf-8")
        print(DOCS / name)


if __name__ == "__main__":
    main()
