"""Who owns which page of the KV cache.

The machine keeps keys and values in pages of a few dozen tokens (PagedAttention, Kwon et al. 2023,
arXiv:2309.06180); this module only keeps the books: `PagePool` knows which pages are free and how
many sequences hold each of the others, a `Sequence` which pages hold its tokens, in order. The
engine makes sequences and hands their page tables to the machine. The prefix of a sequence is kept
by truncating it: no page is copied. Sequences that were forked share pages, and so do those that
begin alike, where they are given a salt (`prefix.py`). A page that is about to be written is copied
first if another sequence holds it too or could find it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

import numpy as np

from cyclewise.engine.prefix import PrefixIndex, first_key, next_key
from cyclewise.errors import ContextLengthError, CyclewiseError

if TYPE_CHECKING:
    import numpy.typing as npt


class PagePool:
    """The free pages. The page freed last is handed out first: its memory is already committed.
    When there is none, pages that nobody holds and that are only kept to be found are free too.
    """

    def __init__(
        self, num_pages: int, page_tokens: int, copy_page: Callable[[int, int], None]
    ) -> None:
        """`copy_page(source, to)` copies the keys and values of a page."""
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.copy_page = copy_page
        self._free = list(range(num_pages - 1, -1, -1))  # the end is the top
        self._holders = [0] * num_pages
        self._prefixes = PrefixIndex()

    @property
    def num_tokens(self) -> int:
        """How many tokens all pages hold."""
        return self.num_pages * self.page_tokens

    @property
    def num_free(self) -> int:
        """Pages that can be handed out, those included that could still be found."""
        return len(self._free) + self._prefixes.num_idle

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and that can be found."""
        return self._prefixes.num_idle

    def take(self) -> int:
        """Hand out one page. The caller has made sure that there is one."""
        page = self._free.pop() if self._free else self._prefixes.evict()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """Note one more holder of a page that has some."""
        assert self._holders[page] > 0
        self._holders[page] += 1

    def is_shared(self, page: int) -> bool:
        """Whether other sequences hold it or could find it, so that nobody may write to it."""
        return self._holders[page] > 1 or page in self._prefixes

    def give(self, page: int) -> None:
        """Take one page back from one of its holders."""
        assert self._holders[page] > 0
        self._holders[page] -= 1
        if not self._holders[page]:
            if page in self._prefixes:
                self._prefixes.rest(page)
            else:
                self._free.append(page)

    def find(self, key: bytes) -> int | None:
        """Hand out the page of a key (`prefix.py`), if there is one, to one more holder."""
        page = self._prefixes.find(key)
        if page is not None:
            if not self._holders[page]:
                self._prefixes.wake(page)
            self._holders[page] += 1
        return page

    def enter(self, key: bytes, page: int) -> int:
        """Let others find a full page; returns the page that its holder has from now on: the one
        that has this key already, where there is one, since both hold the same bits.
        """
        same = self.find(key)
        if same is None:
            self._prefixes.enter(key, page)
            return page
        self.give(page)
        return same

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert that the books are right: each page is free, idle or held by as many of these
        sequences, all there are, as is noted.
        """
        holders = [0] * self.num_pages
        for sequence in sequences:
            for page in sequence.pages.tolist():
                holders[page] += 1
        assert holders == self._holders, "a page is held by more or fewer sequences than is noted"
        unheld = [page for page, count in enumerate(holders) if not count]
        assert sorted(self._free + self._prefixes.idle) == unheld, "a page is lost, or there twice"


class Sequence:
    """The tokens whose keys and values lie in the cache, and the pages they lie in."""

    def __init__(
        self,
        pool: PagePool,
        context: int,
        adapter: int | None = None,
        salt: bytes | None = None,
    ) -> None:
        """salt  sequences of the same one, and of the same adapter, share pages that hold the same
        tokens; None: this one shares with none but its forks
        """
        self.token_ids: list[int] = []  # the engine appends, after the step that wrote their KV
        self.adapter = adapter  # what their KV was computed with; `use` changes it
        self._pool = pool
        self._context = context
        self._pages = np.zeros(-(-context // pool.page_tokens), dtype=np.int32)
        self._num_pages = 0
        # what comes before the first page, then the key of each page that can be found
        self._keys = None if salt is None else [first_key(salt, adapter)]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def pages(self) -> npt.NDArray[np.int32]:
        """The page table: page i holds tokens [i * page_tokens, (i + 1) * page_tokens). A view."""
        return self._pages[: self._num_pages]

    def reserve(self, num_tokens: int) -> None:
        """Own pages for `num_tokens` tokens in all; those behind the last token so far alone.

        Raises ContextLengthError if the context is shorter, CyclewiseError if the other sequences
        leave too few pages; either way nothing is taken.
        """
        if num_tokens > self._context:
            raise ContextLengthError(
                f"{num_tokens} tokens do not fit into the context of {self._context}: shorten the "
                f"prompt, or load the model with a larger `context`"
            )
        missing, copied = self._missing(num_tokens)
        if missing + copied > self._pool.num_free:
            raise CyclewiseError(
                f"the KV cache is full: {missing + copied} more pages are needed and "
                f"{self._pool.num_free} of {self._pool.num_pages} are free; ask for fewer answers "
                f"(`n`) or shorter ones (`max_tokens`), or load the model with a larger `context`"
            )
        if copied:
            last = len(self.token_ids) // self._pool.page_tokens
            shared, own = int(self._pages[last]), self._pool.take()
            self._pool.copy_page(shared, own)
            self._pages[last] = own  # before the other is given back: Ctrl-C may come in between
            self._pool.give(shared)
        for _ in range(missing):
            self._pages[self._num_pages] = self._pool.take()
            self._num_pages += 1

    def use(self, adapter: int | None) -> None:
        """Go on with a LoRA adapter, by its number, or with none. Keys and values of another one
        are worth nothing then: all tokens are forgotten. Not of a sequence with a salt.
        """
        assert self._keys is None
        if adapter != self.adapter:
            self.truncate(0)
            self.adapter = adapter

    def num_missing(self, num_tokens: int) -> int:
        """How many free pages `reserve` would take."""
        return sum(self._missing(num_tokens))

    def _missing(self, num_tokens: int) -> tuple[int, bool]:
        """Pages to add, and whether the last one so far must be copied before it is written to."""
        last, place = divmod(len(self.token_ids), self._pool.page_tokens)
        writes = num_tokens > len(self.token_ids) and place > 0
        copied = writes and self._pool.is_shared(int(self._pages[last]))
        return max(0, -(-num_tokens // self._pool.page_tokens) - self._num_pages), copied

    def reuse(self, token_ids: SequenceOf[int]) -> None:
        """Begin with pages that hold the first of these tokens already; the last token is left to
        be evaluated, for its logits. The sequence is empty before, and has a salt.
        """
        assert not self.token_ids and self._keys is not None
        size = self._pool.page_tokens
        for start in range(0, len(token_ids) - size, size):
            tokens = token_ids[start : start + size]
            key = next_key(self._keys[-1], tokens)
            page = self._pool.find(key)
            if page is None:
                break
            self._pages[self._num_pages] = page
            self._num_pages += 1
            self._keys.append(key)
            self.token_ids.extend(tokens)

    def publish(self) -> None:
        """Let others of this salt find the pages that are full by now. Without a salt, nothing."""
        if self._keys is None:
            return
        size = self._pool.page_tokens
        while (end := len(self._keys) * size) <= len(self.token_ids):
            key = next_key(self._keys[-1], self.token_ids[end - size : end])
            number = len(self._keys) - 1
            self._pages[number] = self._pool.enter(key, int(self._pages[number]))
            self._keys.append(key)

    def truncate(self, num_tokens: int) -> None:
        """Forget every token after the first `num_tokens` and give back the pages left empty."""
        if not 0 <= num_tokens <= len(self.token_ids):
            raise ValueError(f"cannot keep {num_tokens} of {len(self.token_ids)} tokens")
        del self.token_ids[num_tokens:]
        if self._keys is not None:
            del self._keys[1 + num_tokens // self._pool.page_tokens :]
        needed = -(-num_tokens // self._pool.page_tokens)
        while self._num_pages > needed:
            self._num_pages -= 1
            self._pool.give(int(self._pages[self._num_pages]))

    def fork(self) -> Sequence:
        """A sequence of the same tokens, in the same pages. Either may go on: it takes pages of its
        own as it does, and a copy of the last one if that is partly filled.
        """
        other = Sequence(self._pool, self._context, self.adapter)
        other.token_ids = self.token_ids.copy()
        other._keys = None if self._keys is None else self._keys.copy()
        other._num_pages = -(-len(self) // self._pool.page_tokens)
        other._pages[: other._num_pages] = self._pages[: other._num_pages]
        for page in other.pages.tolist():
            self._pool.share(page)
        return other


def common_prefix(first: SequenceOf[int], second: SequenceOf[int]) -> int:
    """How many tokens two lists begin alike with."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
