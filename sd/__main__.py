import sys

from sd.app.cli import main

sys.exit(main())
