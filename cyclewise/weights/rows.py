"""Rows of a matrix made on all cores, a few at a time.

`directory.py` makes what it gives out in other blocks than its files have with this.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

_CHUNK_WEIGHTS = 1 << 18
"""Weights that a thread works on at once: its arrays stay in the cache, and memory is bounded."""


def make_rows(
    num_rows: int,
    num_columns: int,
    row_bytes: int,
    make: Callable[[int, int], npt.NDArray[np.uint8]],
    done: Callable[[int], None] = lambda weights: None,
) -> npt.NDArray[np.uint8]:
    """The bytes of all rows, one-dimensional.

    `make(first, last)` gives those of rows first to last, uint8 (rows, row_bytes); `first` is a
    multiple of 8. It runs on several threads, and `done` is told of the weights of each call.
    """
    from cyclewise.machine.host import available_cpus

    out = np.empty((num_rows, row_bytes), np.uint8)
    step = max(_CHUNK_WEIGHTS // num_columns // 8, 1) * 8

    def run(first: int) -> None:
        last = min(first + step, num_rows)
        out[first:last] = make(first, last)
        done((last - first) * num_columns)

    with ThreadPoolExecutor(available_cpus()) as pool:
        list(pool.map(run, range(0, num_rows, step)))
    return out.reshape(-1)
