"""Who owns which page of the KV cache.

The machine keeps keys and values in pages of a few dozen tokens (PagedAttention, Kwon et al. 2023,
arXiv:2309.06180); this module only keeps the books: `PagePool` knows which pages are free, a
`Sequence` which pages hold its tokens, in order. The engine makes sequences and hands their page
tables to the machine. The prefix of a sequence is kept by truncating it: no page is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cyclewise.errors import ContextLengthError, CyclewiseError

if TYPE_CHECKING:
    import numpy.typing as npt


class PagePool:
    """The free pages. The page freed last is handed out first: its memory is already committed."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._free = list(range(num_pages - 1, -1, -1))  # the end is the top

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """Hand out one page. The caller has made sure that there is one."""
        return self._free.pop()

    def give(self, page: int) -> None:
        """Take one page back."""
        self._free.append(page)


class Sequence:
    """The tokens whose keys and values lie in the cache, and the pages they lie in."""

    def __init__(self, pool: PagePool, context: int) -> None:
        self.token_ids: list[int] = []  # the engine appends, after the step that wrote their KV
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
        """Own pages for `num_tokens` tokens in all.

        Raises ContextLengthError if the context is shorter, CyclewiseError if the other sequences
        leave too few pages; either way nothing is taken.
        """
        if num_tokens > self._context:
            raise ContextLengthError(
                f"{num_tokens} tokens do not fit into the context of {self._context}: shorten the "
                f"prompt, or load the model with a larger `context`"
            )
        missing = -(-num_tokens // self._pool.page_tokens) - self._num_pages
        if missing > self._pool.num_free:
            raise CyclewiseError(
                f"the KV cache is full: {missing} more pages are needed and "
                f"{self._pool.num_free} of {self._pool.num_pages} are free; free a sequence, or "
                f"load the model with a larger `context`"
            )
        for _ in range(missing):
            self._pages[self._num_pages] = self._pool.take()
            self._num_pages += 1

    def truncate(self, num_tokens: int) -> None:
        """Forget every token after the first `num_tokens` and give back the pages left empty."""
        if not 0 <= num_tokens <= len(self.token_ids):
            raise ValueError(f"cannot keep {num_tokens} of {len(self.token_ids)} tokens")
        del self.token_ids[num_tokens:]
        needed = -(-num_tokens // self._pool.page_tokens)
        while self._num_pages > needed:
            self._num_pages -= 1
            self._pool.give(int(self._pages[self._num_pages]))
