"""From a file's tensors to packed weights in memory of our own.

`weights/` gives bytes and formats, the pack kernels reorder them into tiles of 16 rows, and
`builder.py` gets a `Matrix`: an address and a shape. Pages of the file that were packed are let
go at once, so that the model is in memory only once. All cores pack.
"""

from __future__ import annotations

import mmap
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from cyclewise.errors import InvalidParameterError, ModelFileError, UnsupportedModelError
from cyclewise.machine.host import advise
from cyclewise.machine.kernels.blocks import ROWS, tile_bytes
from cyclewise.machine.kernels.compiler import callable_at, host_compiler
from cyclewise.machine.packed import Arena, open_arena
from cyclewise.weights.mapped import shown
from cyclewise.weights.source import Source, SourceTensor

if TYPE_CHECKING:
    from cyclewise.machine.adapters import Adapters

_HUGE_PAGE = 2 * 1024 * 1024


def allocate(num_bytes: int) -> NDArray[np.uint8]:
    """Zeroed memory, aligned to a huge page and asked to be made of them; committed as it is
    touched.
    """
    size = -(-max(num_bytes, 1) // _HUGE_PAGE) * _HUGE_PAGE
    try:
        # Private: shared memory, Python's default, would get no huge pages.
        private = (
            {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
        )
        memory = mmap.mmap(-1, size + _HUGE_PAGE, **private)
    except (OSError, ValueError, OverflowError) as error:
        raise InvalidParameterError(
            f"The system does not give {num_bytes / 1e9:.1f} GB of memory ({error}); "
            "try a smaller context or a smaller model."
        ) from error
    advise(memory, "MADV_HUGEPAGE")
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE
    return whole[start : start + size]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A packed weight matrix: `num_tiles` tiles of 16 rows at `address`."""

    name: str
    format: str
    num_rows: int
    num_columns: int
    address: int
    stride: int
    """Bytes from a tile to the next: more than a tile where another matrix's lie between."""

    @property
    def tile_bytes(self) -> int:
        return tile_bytes(self.format, self.num_columns)

    @property
    def num_tiles(self) -> int:
        return -(-self.num_rows // ROWS)

    @property
    def num_bytes(self) -> int:
        return self.tile_bytes * self.num_tiles


class Weights:
    """The packed weights of one source; they live as long as this object."""

    def __init__(self, source: Source, num_threads: int, adapters: Adapters | None = None) -> None:
        """`adapters`: what is added to them, for those who write the program."""
        self._source, self.adapters = source, adapters
        self._pool = ThreadPoolExecutor(num_threads)
        self._num_threads = num_threads
        self._memory: list[NDArray[np.generic]] = []
        self._total = sum(_packed_bytes(tensor) for tensor in source.tensors.values())
        self._arena = open_arena(source.files, source.variant, self._total)
        self._index: list[list[object]] = []
        self._used = 0
        self._left = dict.fromkeys(source.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._source.tensors

    def matrix(
        self, name: str, shape: tuple[int, int], row_order: NDArray[np.int32] | None = None
    ) -> Matrix:
        """Packs a two-dimensional tensor of (rows, columns); packed row i is row `row_order[i]`
        of the file.
        """
        self._tensor(name, shape)
        order = np.arange(shape[0], dtype=np.int32) if row_order is None else row_order
        return self._pack([name], shape, [order])[0]

    def pair(self, names: tuple[str, str], shape: tuple[int, int]) -> tuple[Matrix, Matrix]:
        """Packs two tensors of one shape tile by tile in turns: who takes tile i of both reads one
        stream.
        """
        for name in names:
            self._tensor(name, shape)
        order = np.arange(shape[0], dtype=np.int32)
        first, second = self._pack(names, shape, [order, order])
        return first, second

    def halves(self, name: str, shape: tuple[int, int]) -> tuple[Matrix, Matrix]:
        """Packs the first and the second half of a tensor's rows, of `shape` each, as `pair` packs
        two tensors.
        """
        rows, columns = shape
        self._tensor(name, (2 * rows, columns))
        order = np.arange(rows, dtype=np.int32)
        first, second = self._pack([name, name], shape, [order, order + np.int32(rows)])
        return first, second

    def _pack(
        self, names: Sequence[str], shape: tuple[int, int], orders: Sequence[NDArray[np.int32]]
    ) -> list[Matrix]:
        rows, columns = shape
        formats = [self._source.tensors[name].format.name for name in names]
        sizes = [tile_bytes(format_, columns) for format_ in formats]
        order_hash = zlib.crc32(b"".join(order.tobytes() for order in orders))
        entry = [self._used, list(names), formats, rows, columns, order_hash]
        kept = self._is_kept(entry)
        start = self._arena.memory.ctypes.data + self._used
        matrices = [
            Matrix(name, format_, rows, columns, start + sum(sizes[:i]), sum(sizes))
            for i, (name, format_) in enumerate(zip(names, formats, strict=True))
        ]
        self._used += -(-sum(matrix.num_bytes for matrix in matrices) // 64) * 64
        assert self._used <= self._arena.memory.nbytes
        self._index.append(entry)
        if not kept:
            for matrix, order in zip(matrices, orders, strict=True):
                self._fill(matrix, order)
        return matrices

    def _is_kept(self, entry: list[object]) -> bool:
        """Whether the arena holds what is to be packed next. If it holds something else, another
        version kept it: from here on an arena of our own is filled.
        """
        index = self._arena.index
        if index is None:
            return False
        place = len(self._index)
        if place < len(index) and index[place] == entry:
            return True
        self._arena.drop()
        self._memory.append(self._arena.memory)
        self._arena = Arena(allocate(self._total))
        entry[0] = self._used = 0
        return False

    def _fill(self, matrix: Matrix, order: NDArray[np.int32]) -> None:
        source = self._source.data(matrix.name)
        tensor = self._source.tensors[matrix.name]
        row_bytes = tensor.nbytes // tensor.shape[0]
        pack = callable_at(host_compiler().address(f"pack_{matrix.format}"), 9)
        bounds = np.linspace(0, matrix.num_tiles, self._num_threads + 1).astype(int)

        def run(first: int, last: int) -> None:
            pack(
                source.ctypes.data, row_bytes, order.ctypes.data, matrix.num_rows,
                matrix.num_columns, matrix.address, matrix.stride, first, last,
            )  # fmt: skip

        list(self._pool.map(run, bounds[:-1].tolist(), bounds[1:].tolist()))
        self._source.release(matrix.name)

    def vector(
        self, name: str, length: int, row_order: NDArray[np.int32] | None = None
    ) -> NDArray[np.float32]:
        """A one-dimensional tensor as float32, zero-padded to a multiple of 16."""
        tensor = self._tensor(name, (length,))
        data = self._source.data(name)
        match tensor.format.name:
            case "F32":
                values = data.view(np.float32)
            case "F16":
                values = data.view(np.float16).astype(np.float32)
            case "BF16":
                values = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            case other:
                raise ModelFileError(
                    f"{self._source.path}: tensor {name} is {other}; "
                    "a vector must be F32, F16 or BF16."
                )
        padded = np.zeros(-(-length // 16) * 16, np.float32)
        padded[:length] = values if row_order is None else values[row_order]
        return self.keep(padded)

    def check_all_used(self) -> None:
        """That every tensor of the source was asked for. RoPE's factors may not be needed.

        Raises UnsupportedModelError: without the others the model would compute something else.
        """
        left = [name for name in self._left if not name.startswith("rope_")]
        if left:
            raise UnsupportedModelError(
                f"{self._source.path}: the model's architecture is not known to have a tensor like "
                f"{shown(left[0])} ({len(left)} in all); it is a variant that is not supported."
            )

    def keep(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """Keeps an array alive whose address a moment holds."""
        self._memory.append(array)
        return array

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the packing; the packed weights stay, and are kept for the next start."""
        self._pool.shutdown()
        if self._arena.index is None:
            if error is None:
                self._arena.keep(self._index, self._used)
            else:
                self._arena.drop()

    def _tensor(self, name: str, shape: Sequence[int]) -> SourceTensor:
        tensor = self._source.tensors.get(name)
        if tensor is None:
            raise ModelFileError(f"{self._source.path}: tensor {name} is missing.")
        if tuple(tensor.shape) != tuple(shape):
            raise ModelFileError(
                f"{self._source.path}: tensor {name} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(shape)}."
            )
        self._left.pop(name, None)
        return tensor


def _packed_bytes(tensor: SourceTensor) -> int:
    if len(tensor.shape) != 2:
        return 0
    rows, columns = tensor.shape
    # In two halves it may take one tile more.
    size = tile_bytes(tensor.format.name, columns) * (-(-rows // ROWS) + 1)
    return -(-size // 64) * 64
