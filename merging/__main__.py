"""`python -m merging`: merge checkpoints on disk. Flags are read first, since PyTorch takes seconds to import."""

import contextlib
import sys

from merging.command.flags import parse

if __name__ == "__main__":
    with contextlib.suppress(ValueError, OSError):  # said by `main`
        parse(sys.argv[1:])  # --help and wrong flags end here
    from merging.command.main import main

    sys.exit(main())
