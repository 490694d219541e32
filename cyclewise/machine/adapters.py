"""LoRA adapters packed for the machine (`kernels/lora.py`), beside base weights that stay as they
are.

`models/adapters.py` gives what it read; `builder.py` asks, moment by moment, what adapters add to
matrices that share an input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cyclewise.machine.kernels.blocks import FLOAT_FORMATS, ROWS, tile_bytes
from cyclewise.machine.kernels.compiler import callable_at, host_compiler
from cyclewise.machine.kernels.lora import BLOCK_COLUMNS, lora_unit
from cyclewise.machine.kernels.matmul import matmul_unit
from cyclewise.machine.kernels.pack import pack_unit
from cyclewise.machine.packing import Matrix, allocate
from cyclewise.weights.lora import LoraFile, LoraModule, widened


@dataclass(frozen=True, slots=True)
class Addition:
    """What an adapter adds to one matrix: scale * b . (its rows of the stack's A's)."""

    b: Matrix
    first_row: int
    """Of its A in the stack."""
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class Stack:
    """An adapter's matrices of one moment: A's one below the other, each from a multiple of
    BLOCK_COLUMNS rows on; None where the adapter leaves a matrix alone.
    """

    a: Matrix
    rank: int
    """Of all A's, without padding."""
    additions: tuple[Addition | None, ...]

    @property
    def num_bytes(self) -> int:
        return self.a.num_bytes + sum(each.b.num_bytes for each in self.additions if each)


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What `cyclewise info` says of an adapter."""

    name: str
    path: str
    modules: int
    ranks: tuple[int, ...]
    nbytes: int
    """Packed."""


class Adapters:
    """The adapters of one model, by number in the order in which they were named. They live as
    long as this object.
    """

    def __init__(self, files: Mapping[str, LoraFile]) -> None:
        self.names = tuple(files)
        self._files = tuple(files.values())
        formats = {module.format for file in self._files for module in file.modules.values()}
        names = [name for name in FLOAT_FORMATS if name in formats or name == "F32"]
        # All that is added to a matrix is read by one kernel.
        self._b_format = formats.pop() if len(formats) == 1 else "F32"
        units = [unit(name) for name in names for unit in (pack_unit, matmul_unit)]
        host_compiler().load([*units, lora_unit()])
        bound = sum(_bound(m) for file in self._files for m in file.modules.values())
        self._memory, self._used = allocate(bound), 0
        self._bytes = [0] * len(self._files)
        self._asked: list[str] = []

    def __len__(self) -> int:
        return len(self.names)

    def finish(self) -> list[AdapterFacts]:
        """All is packed: lets go of what was read, and says what the adapters are."""
        facts = []
        for name, file, nbytes in zip(self.names, self._files, self._bytes, strict=True):
            assert file.modules.keys() <= set(self._asked)
            ranks = tuple(sorted({module.rank for module in file.modules.values()}))
            facts.append(AdapterFacts(name, str(file.path), len(file.modules), ranks, nbytes))
        self._files = ()
        return facts

    def of(self, matrices: Sequence[Matrix]) -> list[Stack | None]:
        """Packs what each adapter adds to matrices that share an input. Matrices of one name are
        the pieces of one of the file, in order.
        """
        self._asked += [matrix.name for matrix in matrices]
        stacks = [self._stack(file.modules, matrices) for file in self._files]
        for number, stack in enumerate(stacks):
            self._bytes[number] += stack.num_bytes if stack else 0
        return stacks

    def _stack(self, modules: Mapping[str, LoraModule], matrices: Sequence[Matrix]) -> Stack | None:
        names = [name for name in dict.fromkeys(m.name for m in matrices) if name in modules]
        if not names:
            return None
        formats = {modules[name].format for name in names}
        format_name = formats.pop() if len(formats) == 1 else "F32"
        first_rows: dict[str, int] = {}
        rows: list[NDArray[np.generic]] = []
        num_rows = 0
        for name in names:
            module = modules[name]
            first_rows[name] = num_rows
            rows.append(_padded(_as(format_name, module, module.a), 0))
            num_rows += len(rows[-1])
        a = self._pack("lora_a", format_name, np.concatenate(rows))
        done = dict.fromkeys(names, 0)
        additions: list[Addition | None] = []
        for matrix in matrices:
            if matrix.name not in modules:
                additions.append(None)
                continue
            module = modules[matrix.name]
            first = done[matrix.name]
            done[matrix.name] += matrix.num_rows
            piece = _as(self._b_format, module, module.b)[first : first + matrix.num_rows]
            b = self._pack(f"{matrix.name}.lora_b", self._b_format, _padded(piece, 1))
            assert b.num_rows == matrix.num_rows
            assert module.a.shape[1] == matrix.num_columns
            additions.append(Addition(b, first_rows[matrix.name], module.rank, module.scale))
        assert all(done[name] == len(modules[name].b) for name in names)
        return Stack(a, sum(modules[name].rank for name in names), tuple(additions))

    def _pack(self, name: str, format_name: str, values: NDArray[np.generic]) -> Matrix:
        values = np.ascontiguousarray(values)
        rows, columns = values.shape
        stride = tile_bytes(format_name, columns)
        address = self._take(stride * -(-rows // ROWS))
        matrix = Matrix(name, format_name, rows, columns, address, stride)
        order = np.arange(rows, dtype=np.int32)
        pack = callable_at(host_compiler().address(f"pack_{format_name}"), 9)
        pack(
            values.ctypes.data, values.strides[0], order.ctypes.data, rows, columns,
            matrix.address, stride, 0, matrix.num_tiles,
        )  # fmt: skip
        return matrix

    def _take(self, num_bytes: int) -> int:
        at = self._used
        self._used += -(-num_bytes // 64) * 64
        assert self._used <= self._memory.nbytes
        return int(self._memory.ctypes.data) + at


def _bound(module: LoraModule) -> int:
    """Bytes that a module takes at most: as F32, its rows beginning within a tile, its B in two
    pieces.
    """
    rank = -(-module.rank // BLOCK_COLUMNS) * BLOCK_COLUMNS
    a_tiles, b_tiles = -(-rank // ROWS) + 1, -(-len(module.b) // ROWS) + 1
    a_bytes = a_tiles * tile_bytes("F32", module.a.shape[1])
    return a_bytes + b_tiles * tile_bytes("F32", rank) + 4 * 64


def _as(format_name: str, module: LoraModule, bits: NDArray[np.generic]) -> NDArray[np.generic]:
    return bits if module.format == format_name else widened(module.format, bits)


def _padded(values: NDArray[np.generic], axis: int) -> NDArray[np.generic]:
    """With zeros up to a multiple of BLOCK_COLUMNS along an axis."""
    missing = -values.shape[axis] % BLOCK_COLUMNS
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, missing)
    return np.pad(values, widths)
