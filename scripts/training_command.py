"""How the training scripts end where training cannot go on: in a sentence, with exit code 2."""

import sys
from collections.abc import Callable
from pathlib import Path


def run(main: Callable[[], None]) -> None:
    """Run a script; wrong files, other options than before, and a loss that is not finite are what it may end with."""
    try:
        main()
    except (ValueError, ArithmeticError) as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)
