"""`python -m merging`: merge checkpoints on disk. Flags are read first, since PyTorch takes seconds to import."""

import contextlib
import os
import sys


def run() -> int:
    """Run the command; Ctrl-C, also while modules are imported, and a reader that has gone (`| head`) end it quietly.

    Returns:
        what `merging.command.main.main` does, or as shells have it 130 after Ctrl-C, and 141 where nobody reads on.
    """
    try:
        try:
            from merging.command.flags import parse

            with contextlib.suppress(ValueError):  # is said by `main`
                parse(sys.argv[1:])  # --help and wrong flags end here
            from merging.command.main import main

            return main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to write goes there
        return 141


if __name__ == "__main__":
    sys.exit(run())
