"""`python -m cyclewise` is the command `cyclewise`, and so is the script of that name."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the command: Ctrl-C ends it quietly, even while it is being imported."""
    try:
        from cyclewise.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
