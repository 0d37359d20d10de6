"""`python -m fastppo` is the `fastppo` command."""

import sys

from fastppo.cli import main

if __name__ == "__main__":
    sys.exit(main())
