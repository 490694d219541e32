"""What was worked out before is kept for as long as there is room: token ids of prompts, grammars.

Whoever makes something of a text asks a `Memo` first. Keys are salted, as the prefix cache is
(`engine/prefix.py`): whoever has another salt cannot learn from times what was asked before.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from hashlib import blake2b
from typing import Generic, TypeVar

Value = TypeVar("Value")


def key_of(salt: bytes, kind: str, text: str) -> bytes:
    """Stands for a text of a kind, for everyone who has this salt of at most 64 bytes.

    It is BLAKE2b (RFC 7693) with the salt as its key: nobody can make two texts that collide.
    """
    data = text.encode("utf-8", "surrogatepass")
    return blake2b(data, digest_size=32, key=salt, person=kind.encode()).digest()


@dataclass(frozen=True, slots=True)
class Lookups:
    """How often something was looked for, and found."""

    hits: int
    misses: int


class Memo(Generic[Value]):
    """Values by their keys, of limited size; the one that was not asked for for longest goes first.
    Any thread may ask.
    """

    def __init__(self, most: int) -> None:
        """most  of all sizes together"""
        self._most = most
        self._size = 0
        self._values: dict[bytes, tuple[Value, int]] = {}  # whoever was asked for last comes last
        self._num_hits = self._num_misses = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    @property
    def lookups(self) -> Lookups:
        """So far."""
        with self._lock:
            return Lookups(self._num_hits, self._num_misses)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._values.clear()
            self._size = 0

    def find(self, key: bytes) -> Value | None:
        """The value of a key, if it is kept."""
        with self._lock:
            found = self._values.pop(key, None)
            if found is None:
                self._num_misses += 1
                return None
            self._num_hits += 1
            self._values[key] = found
            return found[0]

    def keep(self, key: bytes, value: Value, size: int) -> None:
        """Keep a value, and forget others where there is no room; one that is too large is not
        kept.

        size  at least 1, of what `most` counts
        """
        assert size > 0
        with self._lock:
            if key in self._values:
                self._size -= self._values.pop(key)[1]
            if size > self._most:
                return
            self._values[key] = value, size
            self._size += size
            while self._size > self._most:
                first = next(iter(self._values))
                self._size -= self._values.pop(first)[1]
