"""Who owns which page of the KV cache.

The machine keeps keys and values in pages of a few dozen tokens (PagedAttention, Kwon et al. 2023,
arXiv:2309.06180); this module only keeps the books: `PagePool` knows which pages are free and how
many sequences hold each of the others, a `Sequence` which pages hold its tokens, in order. The
engine makes sequences and hands their page tables to the machine. The prefix of a sequence is kept
by truncating it: no page is copied. Sequences that were forked share pages; a page that is about to
be written is copied first if another sequence holds it too.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

import numpy as np

from cyclewise.errors import ContextLengthError, CyclewiseError

if TYPE_CHECKING:
    import numpy.typing as npt


class PagePool:
    """The free pages. The page freed last is handed out first: its memory is already committed."""

    def __init__(
        self, num_pages: int, page_tokens: int, copy_page: Callable[[int, int], None]
    ) -> None:
        """`copy_page(source, to)` copies the keys and values of a page."""
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.copy_page = copy_page
        self._free = list(range(num_pages - 1, -1, -1))  # the end is the top
        self._holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """Hand out one page. The caller has made sure that there is one."""
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """Note one more holder of a page that has some."""
        assert self._holders[page] > 0
        self._holders[page] += 1

    def is_shared(self, page: int) -> bool:
        """Whether more than one sequence holds it, so that nobody may write to it."""
        return self._holders[page] > 1

    def give(self, page: int) -> None:
        """Take one page back from one of its holders."""
        assert self._holders[page] > 0
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)


class Sequence:
    """The tokens whose keys and values lie in the cache, and the pages they lie in."""

    def __init__(self, pool: PagePool, context: int) -> None:
        self.token_ids: list[int] = []  # the engine appends, after the step that wrote their KV
        self.adapter: int | None = None  # what their KV was computed with; `use` changes it
        self._pool = pool
        self._context = context
        self._pages = np.zeros(-(-context // pool.page_tokens), dtype=np.int32)
        self._num_pages = 0

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
        writes = num_tokens > len(self.token_ids)
        last, place = divmod(len(self.token_ids), self._pool.page_tokens)
        copied = writes and place > 0 and self._pool.is_shared(int(self._pages[last]))
        missing = max(0, -(-num_tokens // self._pool.page_tokens) - self._num_pages)
        if missing + copied > self._pool.num_free:
            raise CyclewiseError(
                f"the KV cache is full: {missing + copied} more pages are needed and "
                f"{self._pool.num_free} of {self._pool.num_pages} are free; ask for fewer answers "
                f"(`n`) or shorter ones (`max_tokens`), or load the model with a larger `context`"
            )
        if copied:
            shared, own = int(self._pages[last]), self._pool.take()
            self._pool.copy_page(shared, own)
            self._pages[last] = own  # before the other is given back: Ctrl-C may come in between
            self._pool.give(shared)
        for _ in range(missing):
            self._pages[self._num_pages] = self._pool.take()
            self._num_pages += 1

    def use(self, adapter: int | None) -> None:
        """Go on with a LoRA adapter, by its number, or with none. Keys and values of another one
        are worth nothing then: all tokens are forgotten.
        """
        if adapter != self.adapter:
            self.truncate(0)
            self.adapter = adapter

    def truncate(self, num_tokens: int) -> None:
        """Forget every token after the first `num_tokens` and give back the pages left empty."""
        if not 0 <= num_tokens <= len(self.token_ids):
            raise ValueError(f"cannot keep {num_tokens} of {len(self.token_ids)} tokens")
        del self.token_ids[num_tokens:]
        needed = -(-num_tokens // self._pool.page_tokens)
        while self._num_pages > needed:
            self._num_pages -= 1
            self._pool.give(int(self._pages[self._num_pages]))

    def fork(self) -> Sequence:
        """A sequence of the same tokens, in the same pages. Either may go on: it takes pages of its
        own as it does, and a copy of the last one if that is partly filled.
        """
        other = Sequence(self._pool, self._context)
        other.adapter = self.adapter
        other.token_ids = self.token_ids.copy()
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
