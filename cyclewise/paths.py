"""Where Cyclewise keeps what it can make or fetch again."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path


def cache_dir() -> Path:
    """The user's cache folder: `CYCLEWISE_CACHE`, or the platform's own. It may not exist yet."""
    override = os.environ.get("CYCLEWISE_CACHE")
    if override:
        return Path(override).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "cyclewise"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "cyclewise" / "Cache"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cyclewise"


def open_own(path: Path) -> int | None:
    """A descriptor of a file to read what this process may trust; None unless it is a regular file,
    this user's, that nobody else may write.

    Raises OSError if it cannot be opened: FileNotFoundError if it is not there.
    """
    # A pipe of that name would be waited for.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    state = os.fstat(descriptor)
    ours = not hasattr(os, "geteuid") or (
        state.st_uid == os.geteuid() and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )
    if stat.S_ISREG(state.st_mode) and ours:
        return descriptor
    os.close(descriptor)
    return None
