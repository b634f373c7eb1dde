"""`python -m merging`: merge checkpoints on disk. What it does is told and done in `merging.command.main`."""

import sys

from merging.command.main import main, merge, parse

__all__ = ["main", "merge", "parse"]

if __name__ == "__main__":
    sys.exit(main())
