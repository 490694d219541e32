"""Packed weights kept on disk, so that a second start packs nothing.

`packing.py` asks for an arena and fills it, matrix after matrix. The arena is a file of the cache
directory mapped into memory: what is packed into it is there at the next start, which maps it and
checks that each matrix asked for is the one that lies there.

A file holds the arena, an index in JSON and a footer. It is written under another name and renamed
when it is whole; what a process that was killed has left is removed by the next. It is never
trusted blindly: its key names the model's files (path, size, time of change, inode), the kernels'
sources and the target; every page of it has a checksum, which is compared before the first use;
another user's file is not opened. Weights are codes and scales, which no kernel uses as an address.

All files together stay under LIMIT_BYTES, the least recently used going first, and a disk that is
nearly full gets none. Whatever goes wrong here costs the time of packing and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cyclewise.machine.host import advise, available_cpus
from cyclewise.paths import cache_dir, open_own

VERSION = 2
"""Of the file's layout."""
LIMIT_BYTES = 32 << 30
"""Of all files together."""
LEAST_BYTES = 32 << 20
"""Less is packed in the time that a file takes."""
FREE_SHARE = 0.1
"""Of the disk, which is left alone."""

_CHUNK = 1 << 20
_PAGE = 1 << 12
_ALIGNMENT = max(_PAGE, mmap.PAGESIZE)
_LONGEST_INDEX = 1 << 24
_MAGIC = b"CWPACKED"
_FOOTER = struct.Struct("<8sQ32s")  # magic, bytes of the index, SHA-256 of the index
_PARTIAL = ".partial-"
_DAMAGED = (RuntimeError, ValueError, KeyError, TypeError, IndexError)
"""What a file may raise that holds something else than it should. JSON may nest too deeply."""
_ABANDONED = 24 * 3600
"""Seconds after which a partial file has no writer, where locks do not tell."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A file of packed weights in the cache."""

    path: Path
    nbytes: int
    used: float
    """When it was last used, in seconds since the epoch."""
    orphaned: bool
    """The model's files have changed or are gone."""


class Arena:
    """Memory for packed weights. `memory` is zeroed, or holds what `index` says."""

    def __init__(self, memory: NDArray[np.uint8], index: list[Any] | None = None) -> None:
        self.memory = memory
        self.index = index
        """What lies there, entry by entry as `keep` got it; None: nothing yet."""

    def keep(self, index: list[Any], num_bytes: int) -> None:
        """All of it is packed: `num_bytes` from the start, as `index` says."""

    def drop(self) -> None:
        """It will not be kept, or what was kept is wrong."""


class _KeptArena(Arena):
    """Mapped from a whole file."""

    def __init__(self, path: Path, memory: NDArray[np.uint8], index: list[Any]) -> None:
        super().__init__(memory, index)
        self._path = path

    def drop(self) -> None:
        with suppress(OSError):
            self._path.unlink()


class _NewArena(Arena):
    """Mapped from a file in the making."""

    def __init__(
        self, descriptor: int, partial: str, path: Path, key: dict[str, Any], num_bytes: int
    ) -> None:
        self._descriptor, self._partial, self._path, self._key = descriptor, partial, path, key
        mapped = mmap.mmap(descriptor, num_bytes)
        advise(mapped, "MADV_HUGEPAGE")  # decode is slower by a tenth with small ones
        super().__init__(np.frombuffer(mapped, np.uint8))

    def keep(self, index: list[Any], num_bytes: int) -> None:
        end = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        found = {"key": self._key, "bytes": end, "sums": _sums(self.memory[:end]), "index": index}
        text = json.dumps(found).encode()
        footer = _FOOTER.pack(_MAGIC, len(text), hashlib.sha256(text).digest())
        try:
            with os.fdopen(self._descriptor, "wb") as file:
                # The pages behind the end are mapped still, and nobody reads them.
                file.truncate(end)
                file.seek(end)
                file.write(text + footer)
            os.replace(self._partial, self._path)
        except OSError:
            self._unlink()
            return
        except BaseException:  # Ctrl-C
            self._unlink()
            raise
        prune(LIMIT_BYTES, spare=self._path)

    def drop(self) -> None:
        os.close(self._descriptor)
        self._unlink()

    def _unlink(self) -> None:
        with suppress(OSError):
            os.unlink(self._partial)


def open_arena(files: Sequence[Path], variant: str, num_bytes: int) -> Arena:
    """An arena of at least `num_bytes` for the weights of a model.

    Args:
        files: the model's files; none: it is not kept.
        variant: what was made of them, beside packing.
    """
    from cyclewise.machine.packing import allocate

    if files and num_bytes >= LEAST_BYTES:
        try:
            key = _key(files, variant)
            path = _folder() / _name(key)
            found = _open(path, key, num_bytes) or _create(path, key, num_bytes)
        except (OSError, RuntimeError):
            found = None
        if found is not None:
            return found
    return Arena(allocate(num_bytes))


def kept() -> list[Kept]:
    """The files of packed weights, the least recently used first."""
    try:
        paths = [path for path in _folder().iterdir() if path.suffix == ".packed"]
    except (OSError, RuntimeError):
        return []
    found = []
    for path in paths:
        with suppress(OSError):
            state = path.stat()
            found.append(Kept(path, state.st_size, state.st_mtime, _is_orphaned(path)))
    return sorted(found, key=lambda entry: entry.used)


def prune(limit: int, spare: Path | None = None) -> list[Kept]:
    """Removes files whose model has changed or is gone, then the least recently used until the rest
    takes at most `limit` bytes; returns those removed. `spare` stays.
    """
    entries = [entry for entry in kept() if entry.path != spare]
    total = sum(entry.nbytes for entry in kept())
    removed = []
    for entry in sorted(entries, key=lambda entry: (not entry.orphaned, entry.used)):
        if entry.orphaned or total > limit:
            with suppress(OSError):
                entry.path.unlink()
                removed.append(entry)
                total -= entry.nbytes
    with suppress(OSError, RuntimeError):
        _remove_abandoned(_folder())
    return removed


def _folder() -> Path:
    return cache_dir() / "packed"


def _key(files: Sequence[Path], variant: str) -> dict[str, Any]:
    from cyclewise.machine.kernels.compiler import kernels_hash
    from cyclewise.machine.kernels.target import host_target

    return {
        "version": VERSION,
        "files": [_identity(path) for path in files],
        "variant": variant,
        "kernels": kernels_hash(),
        "target": host_target().name,
    }


def _identity(path: Path | str) -> list[Any]:
    real = os.path.realpath(path)
    state = os.stat(real)
    return [real, state.st_size, state.st_mtime_ns, state.st_ino]


def _name(key: dict[str, Any]) -> str:
    """One name for a model and a target: newer kernels replace what older ones left."""
    stem = Path(key["files"][0][0]).stem
    readable = "".join(c if c.isascii() and c.isalnum() else "-" for c in stem)[:60]
    place = json.dumps([[file[0] for file in key["files"]], key["variant"], key["target"]])
    return f"{readable}-{hashlib.sha256(place.encode()).hexdigest()[:12]}.packed"


def _open(path: Path, key: dict[str, Any], num_bytes: int) -> Arena | None:
    try:
        descriptor = open_own(path)
        if descriptor is None:
            return None
        with os.fdopen(descriptor, "rb") as file:
            found = _read_index(file, os.fstat(descriptor).st_size)
            if not (found and found["key"] == key and 0 < found["bytes"] <= num_bytes + _CHUNK):
                return None
            mapped = mmap.mmap(descriptor, found["bytes"], access=mmap.ACCESS_READ)
        advise(mapped, "MADV_HUGEPAGE", "MADV_WILLNEED")
        memory = np.frombuffer(mapped, np.uint8)
        if _sums(memory) != found["sums"]:
            return None
    except (FileNotFoundError, *_DAMAGED):
        return None
    with suppress(OSError):
        os.utime(path)
    return _KeptArena(path, memory, found["index"])


def _read_index(file: Any, size: int) -> dict[str, Any] | None:
    """The index of a whole file, or None."""
    if size < _FOOTER.size:
        return None
    file.seek(size - _FOOTER.size)
    magic, length, digest = _FOOTER.unpack(file.read(_FOOTER.size))
    at = size - _FOOTER.size - length
    if magic != _MAGIC or at < 0 or at % _PAGE or length > _LONGEST_INDEX:
        return None
    file.seek(at)
    text = file.read(length)
    if hashlib.sha256(text).digest() != digest:
        return None
    found: dict[str, Any] = json.loads(text)
    is_sound = found["bytes"] == at and isinstance(found["index"], list)
    return found if is_sound else None


def _create(path: Path, key: dict[str, Any], num_bytes: int) -> Arena | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    disk = shutil.disk_usage(path.parent)
    if num_bytes > LIMIT_BYTES or disk.free - num_bytes < FREE_SHARE * disk.total:
        return None
    size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    descriptor, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=path.parent)
    try:
        _lock(descriptor)
        # A mapped file whose bytes the disk does not have would end the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
        return _NewArena(descriptor, partial, path, key, size)
    except BaseException:
        os.close(descriptor)
        os.unlink(partial)
        raise


def _lock(descriptor: int) -> bool:
    """Locks a file that is being written, until its writer has ended; whether it was free."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has it, or this file system knows no locks
        return False
    return True


def _remove_abandoned(folder: Path) -> None:
    """Removes partial files whose writer was killed."""
    for path in folder.glob(f"{_PARTIAL}*"):
        with suppress(OSError):
            descriptor = open_own(path)
            if descriptor is None:
                continue
            try:
                if _lock(descriptor) or time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()
            finally:
                os.close(descriptor)


def _sums(memory: NDArray[np.uint8]) -> str:
    """A digest of the sums of its pages, in 64-bit words: as fast as memory is read."""
    pages = memory.view(np.uint64).reshape(-1, _PAGE // 8)
    step = _CHUNK // _PAGE

    def totals(start: int) -> NDArray[np.uint64]:
        sums: NDArray[np.uint64] = pages[start : start + step].sum(axis=1, dtype=np.uint64)
        return sums

    with ThreadPoolExecutor(available_cpus()) as pool:
        sums = np.concatenate(list(pool.map(totals, range(0, len(pages), step))))
    return hashlib.sha256(sums.tobytes()).hexdigest()


def _is_orphaned(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            found = _read_index(file, path.stat().st_size)
        return found is None or any(_identity(f[0]) != f for f in found["key"]["files"])
    except (OSError, *_DAMAGED):
        return True
