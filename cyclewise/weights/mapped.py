"""A file mapped into memory: what the readers of model files share.

`gguf.py` and `safetensors.py` prove a header against the size of the map, and then hand out views
of it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cyclewise.errors import ModelFileError, ModelNotFoundError


class MappedFile:
    """A regular file that is not empty, mapped for reading.

    Raises ModelNotFoundError for a missing file and ModelFileError for one that cannot be mapped.
    """

    __slots__ = ("_map", "path")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map: mmap.mmap | None = _map(self.path)

    @property
    def buffer(self) -> mmap.mmap:
        """The whole file."""
        assert self._map is not None, "the file is closed"
        return self._map

    def view(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """A read-only view of `nbytes` bytes from `offset`; nothing is copied."""
        return np.frombuffer(self.buffer, np.uint8, nbytes, offset)

    def release(self, offset: int, nbytes: int) -> None:
        """Let the operating system take back these bytes' pages; they may be read again."""
        if hasattr(mmap, "MADV_DONTNEED") and nbytes:
            # Rounded outwards: a neighbour's bytes on the same page come back when they are read.
            start = offset - offset % mmap.PAGESIZE
            self.buffer.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)

    def close(self) -> None:
        """Unmap the file, now or when the last view of it is gone."""
        mapped, self._map = self._map, None
        if mapped is not None:
            # With views in use it cannot be unmapped yet: it goes with the last of them.
            with contextlib.suppress(BufferError):
                mapped.close()


def _map(path: Path) -> mmap.mmap:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelFileError(f"{path}: a directory, not a file of weights; name a file in it")
        # Opening a pipe would wait for its other end, and a device has no size.
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path}: not a regular file, so it cannot be mapped into memory")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ModelFileError(f"{path}: the file is empty; fetch it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelFileError(f"{path}: the file cannot be read ({reason})") from None


def shown(value: object) -> str:
    """A value from a file as an error may print it: short, on one line, no control characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
