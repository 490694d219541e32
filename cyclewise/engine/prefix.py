"""Which pages of the KV cache hold which tokens, so that no prompt's beginning is evaluated twice.

A full page is found by its key: a hash of the tokens in it and of the key before it, so that a key
stands for all tokens from the first on. What the first page's key begins with is a salt and the
LoRA adapter: two users with different salts share nothing, and neither learns from the time to the
first token what the other has asked (as vLLM's `cache_salt`). The hash is BLAKE2b (RFC 7693), for
which nobody can make two texts that collide.

`PagePool` (`kvcache.py`) owns a `PrefixIndex` and tells it when no sequence holds a page any more:
then the page is *idle*, can still be found, and is given to somebody else when no page is free. The
one idle for longest goes first. A sequence gives its pages back from the last to the first, and
whoever holds a page holds those before it, so a page goes before the one that leads to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

_KEY_BYTES = 32


def first_key(salt: bytes, adapter: int | None = None) -> bytes:
    """What stands before the first page of everyone who has this salt and this LoRA adapter, whose
    keys and values are its own.
    """
    person = b"cyclewise salt" if adapter is None else b"cw %d" % adapter
    return blake2b(salt, digest_size=_KEY_BYTES, person=person).digest()


def next_key(key: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a page of these tokens that follows the one of `key`."""
    data = key + np.asarray(token_ids, dtype="<i4").tobytes()
    return blake2b(data, digest_size=_KEY_BYTES, person=b"cyclewise page").digest()


class PrefixIndex:
    """The pages that can be found, and which of them no sequence holds."""

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._idle: dict[int, None] = {}  # in the order of `rest`

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page: int) -> bool:
        return page in self._keys

    @property
    def idle(self) -> list[int]:
        """The pages that no sequence holds; the next to go comes first."""
        return list(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def find(self, key: bytes) -> int | None:
        """The page of a key, if there is one."""
        return self._pages.get(key)

    def enter(self, key: bytes, page: int) -> None:
        """Let a page that is held be found by a key that none has."""
        assert key not in self._pages and page not in self._keys
        self._pages[key] = page
        self._keys[page] = key

    def rest(self, page: int) -> None:
        """Note that no sequence holds a page any more."""
        self._idle[page] = None

    def wake(self, page: int) -> None:
        """Note that a sequence holds an idle page again."""
        del self._idle[page]

    def evict(self) -> int:
        """Forget the page that has been idle for longest; the caller may write to it."""
        page = next(iter(self._idle))
        del self._idle[page]
        del self._pages[self._keys.pop(page)]
        return page
