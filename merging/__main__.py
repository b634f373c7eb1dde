"""`python -m merging`: see `merging.command.main`."""

import sys

from merging.command.main import main

if __name__ == "__main__":
    sys.exit(main())
