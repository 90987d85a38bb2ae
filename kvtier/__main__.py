"""``python -m kvtier``: the command line."""

import sys

from kvtier.cli import main

if __name__ == "__main__":
    sys.exit(main())
