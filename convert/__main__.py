"""`python -m convert IN OUT` is `sd convert IN OUT`."""

import sys

from sd.__main__ import main

sys.argv.insert(1, "convert")
sys.exit(main())
