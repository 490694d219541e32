"""`python -m cyclewise` is the command `cyclewise`."""

from __future__ import annotations

from cyclewise.cli import main

if __name__ == "__main__":
    main()
