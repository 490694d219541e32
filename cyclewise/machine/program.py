"""A program: the ordered list of a model's moments.

`builder.py` writes it for a file in `models/`; `machine.py` executes it; the clock reads its closed
forms.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cyclewise.machine.cache import KVCache
from cyclewise.machine.costs import Form
from cyclewise.machine.names import layer_of

MomentClass = Literal["matmul", "activation", "memory"]
Tiles = Literal["tokens", "logits", "queries", "experts", "adapters"]


@dataclass(frozen=True, slots=True)
class Moment:
    """The smallest step of inference that stands on its own."""

    name: str
    """Stable: `layers.12.ffn.down`."""
    kind: MomentClass
    kernel: str
    """The exported kernel that computes it."""
    record: NDArray[np.int64]
    """The kernel's record."""
    form: Form
    """What it costs."""
    tiles: Tiles | int
    """What its tiles are: one a token or a row of logits; some of each query block, or of each
    expert that the tokens can choose, or of each block of tokens in a batch with adapters; or a
    fixed number.
    """
    tiles_per_block: int = 1
    """Tiles of a query block, an expert or a block of tokens."""
    replicable: bool = False
    """In a small batch every thread computes it for itself."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights it streams."""
        return self.form.weight_bytes

    @property
    def of_logits(self) -> bool:
        """It is left out of a batch that wants no logits."""
        return self.form.of_logits


@dataclass(frozen=True, slots=True)
class Program:
    """Moments and what a machine must know to run them. Made by a `Builder`."""

    moments: tuple[Moment, ...]
    vocab_size: int
    context_length: int
    cache: KVCache = field(repr=False)
    logits: NDArray[np.float32]
    """(MAX_BATCH_TOKENS, padded vocabulary)."""
    num_threads: int
    """Threads that there are private buffers for."""
    private_bytes: int
    """From one thread's private buffers to the next's."""
    scratch_bytes: int
    """What a thread's kernels need at most."""
    memory: tuple[object, ...] = field(repr=False)
    """Whatever the records point to."""
    num_adapters: int = 0
    """LoRA adapters that a token may have one of."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a token of decode streams, with the largest adapter's."""
        return sum(moment.weight_bytes for moment in self.moments)

    @property
    def num_pages(self) -> int:
        """Of the KV cache."""
        return self.cache.num_pages

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that a token adds to the KV cache."""
        return self.cache.bytes_per_token

    @property
    def num_layers(self) -> int:
        layers = (layer_of(moment.name) for moment in self.moments)
        return len({layer for layer in layers if layer is not None})

    def prefix(self, num_layers: int) -> Program:
        """The program with its first layers alone, in the same memory: for measuring how cost grows
        with layers. A machine of it and one of the whole must not step at once, and one must have
        settled before the other steps.
        """
        assert 0 <= num_layers <= self.num_layers
        layers = [layer_of(moment.name) for moment in self.moments]
        kept = [
            moment
            for moment, layer in zip(self.moments, layers, strict=True)
            if layer is None or layer < num_layers
        ]
        return replace(self, moments=tuple(kept))
