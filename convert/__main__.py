"""`python -m convert IN OUT` is `sd convert IN OUT`."""

import sys

from sd.app.cli import main

sys.exit(main(["convert", *sys.argv[1:]]))
