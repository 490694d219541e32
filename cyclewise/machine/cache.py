"""The KV cache as the machine holds it: pages of PAGE_TOKENS tokens of one sequence, each with the
keys and values of every layer.

`builder.py` makes it and hands its addresses to the moments; which sequence has which page is
`engine/kvcache.py`'s business. Memory is committed as pages are written for the first time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cyclewise.errors import UnsupportedModelError
from cyclewise.machine.kernels.blocks import ROWS
from cyclewise.machine.kernels.layout import PAGE_TOKENS
from cyclewise.machine.kernels.pages import KINDS
from cyclewise.machine.names import CacheKind
from cyclewise.machine.packing import allocate


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of a model's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def padded_head_dim(self) -> int:
        return -(-self.head_dim // ROWS) * ROWS


class KVCache:
    """Pages of a kind (`kernels/pages.py`): a layer's keys before its values, layer after layer.

    Raises UnsupportedModelError where int8 cannot hold such heads.
    """

    def __init__(
        self, heads: Heads, num_layers: int, num_pages: int, kind: CacheKind = "f16"
    ) -> None:
        if kind == "int8" and heads.head_dim % 2:
            raise UnsupportedModelError(
                f"The heads have {heads.head_dim} dimensions; an int8 KV cache needs an even "
                "number: use kv f16."
            )
        self.heads, self.kind = heads, kind
        pages = KINDS[kind]
        key_lanes = pages.steps(heads.head_dim) * PAGE_TOKENS
        value_lanes = pages.steps(PAGE_TOKENS) * heads.padded_head_dim
        self.key_bytes = int(heads.num_kv_heads * pages.head_bytes(key_lanes))
        self._layer_bytes = self.key_bytes + int(heads.num_kv_heads * pages.head_bytes(value_lanes))
        page_bytes = num_layers * self._layer_bytes
        memory = allocate(page_bytes * num_pages)
        self.pages: NDArray[np.uint8] = memory[: page_bytes * num_pages].reshape(num_pages, -1)

    @property
    def num_pages(self) -> int:
        return int(self.pages.shape[0])

    @property
    def page_bytes(self) -> int:
        return int(self.pages.shape[1])

    @property
    def bytes_per_token(self) -> int:
        return self.page_bytes // PAGE_TOKENS

    def layer(self, layer: int) -> tuple[int, int]:
        """The addresses of a layer's keys and values in the first page."""
        keys = self.pages.ctypes.data + layer * self._layer_bytes
        return keys, keys + self.key_bytes

    def copy_page(self, source: int, to: int) -> None:
        """Copies all keys and values of a page."""
        self.pages[to] = self.pages[source]
