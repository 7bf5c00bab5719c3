"""`python -m effjax.cli`, where the console entry is not on the path."""

import sys

from effjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
