"""The builder: how a file in `models/` writes a program, and the memory its moments work in.

Here and nowhere
else are addresses made: a moment's record (`kernels/layout.py`) is filled from matrices and
buffers whose shapes are checked against each other, and `machine.py` checks a batch against the
program before a kernel sees it.

Buffers, float32 unless said otherwise, one row a token:

    hidden     (tokens, hidden)             the residual stream
    normed     (tokens, hidden)             a norm's output
    quantized  (tokens, groups, 60 bytes)   int8 activations (`kernels/dot.py`)
    qkv        (tokens, heads + 2 kv_heads, head_dim)
    attended   (tokens, heads, head_dim)
    projected  (tokens, hidden)             what a norm follows
    gated      (tokens, feed-forward)
    logits     (logit rows, vocabulary)
    low        (tiles, splits, tokens, 16)          A x of LoRA adapters (`kernels/lora.py`)

In a small batch every thread has `normed` and `quantized` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cyclewise.errors import UnsupportedModelError
from cyclewise.machine import costs
from cyclewise.machine.adapters import Adapters, Addition, Stack
from cyclewise.machine.cache import Heads, KVCache
from cyclewise.machine.costs import Form, MatrixShape
from cyclewise.machine.kernels import attention, linear, loop, matmul, pack, rows
from cyclewise.machine.kernels.blocks import FLOAT_FORMATS, GROUP, ROWS
from cyclewise.machine.kernels.compiler import host_compiler
from cyclewise.machine.kernels.dot import ACTIVATION_GROUP
from cyclewise.machine.kernels.layout import (
    ATTENTION,
    EMBED,
    GATED,
    LAYER_NORM,
    LINE,
    LINEAR,
    LINEAR_PART,
    LORA_A,
    LORA_A_MATRIX,
    LORA_B,
    LORA_B_MATRIX,
    NORM,
    PAGE_TOKENS,
    POSITIONS,
    QUANTIZE,
    ROPE,
    SOFTCAP,
)
from cyclewise.machine.kernels.linear import MAX_BATCH_TOKENS
from cyclewise.machine.kernels.lora import BLOCK_COLUMNS, SPLIT_BYTES, SPLIT_COLUMNS
from cyclewise.machine.names import CacheKind
from cyclewise.machine.packing import Matrix, allocate
from cyclewise.machine.profile import load_tuning
from cyclewise.machine.program import Moment, MomentClass, Program, Tiles

Activation = Literal["silu", "gelu"]
"""What opens a feed-forward's gate."""


def load_kernels(formats: Iterable[str]) -> None:
    """Compiles, or loads from the cache, every kernel that matrices of these formats need, in one
    go. The register tiles are the machine profile's, where there is one.
    """
    names = list(dict.fromkeys(formats))
    tiles = load_tuning().token_tiles
    host_compiler().load(
        [
            *(pack.pack_unit(name) for name in names),
            *(matmul.matmul_unit(name, tiles.get(name)) for name in names),
            rows.rows_unit(), linear.linear_unit(), attention.attention_unit(), loop.loop_unit(),
        ]
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Buffer:
    address: int
    stride: int
    """Bytes of a row."""
    width: int
    private: bool = False


class Builder:
    """Writes a program. `num_threads` private copies of the small buffers are provided for."""

    def __init__(
        self, *, hidden_size: int, head_dim: int, num_heads: int, num_kv_heads: int,
        num_layers: int, feed_forward: int, vocab_size: int, context_length: int,
        num_threads: int, epsilon: float, kv: CacheKind = "f16", private_bytes: int = 0,
        adapters: Adapters | None = None, sequences: int = 1,
    ) -> None:  # fmt: skip
        """`private_bytes`: what a thread has besides, from `_own_private` on; `adapters`: what
        tokens may have added to the matrices of attention and feed-forward; `sequences`: of the
        whole context, for which there are pages.
        """
        self._moments: list[Moment] = []
        self._memory: list[object] = []
        self._epsilon, self._num_threads = epsilon, num_threads
        self._scratch_bytes = 0
        self._adapters, self._low, self._low_bytes = adapters, 0, 0
        heads = Heads(num_heads, num_kv_heads, head_dim)
        self._heads, self._kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        self._vocab_size, self._context = vocab_size, context_length
        widest = max(hidden_size, num_heads * head_dim, feed_forward)
        self._hidden = self._buffer(hidden_size)
        self._qkv = self._buffer((num_heads + 2 * num_kv_heads) * head_dim)
        self._attended = self._buffer(num_heads * head_dim)
        self._projected = self._buffer(hidden_size)
        self._gated = self._buffer(feed_forward)
        self._logits = self._buffer(vocab_size)
        normed_stride = -(-hidden_size // ROWS) * ROWS * 4
        quantized_stride = -(-widest // GROUP) * ACTIVATION_GROUP
        small = MAX_BATCH_TOKENS * (normed_stride + quantized_stride)
        self._private_bytes = -(-small // LINE) * LINE + -(-private_bytes // LINE) * LINE
        private = self._allocate(self._private_bytes * num_threads)
        self._normed = _Buffer(private, normed_stride, hidden_size, True)
        at = private + MAX_BATCH_TOKENS * normed_stride
        self._quantized = _Buffer(at, quantized_stride, widest, True)
        self._own_private = private + -(-small // LINE) * LINE
        pages = sequences * -(-context_length // PAGE_TOKENS)
        self._cache = KVCache(heads, num_layers, pages, kv)
        self._suffix = "" if kv == "f16" else f"_{kv}"

    # Buffers

    def _allocate(self, num_bytes: int) -> int:
        memory = allocate(num_bytes)
        self._memory.append(memory)
        return int(memory.ctypes.data)

    def _buffer(self, width: int, num_rows: int = MAX_BATCH_TOKENS) -> _Buffer:
        stride = -(-width // ROWS) * ROWS * 4
        return _Buffer(self._allocate(stride * num_rows), stride, width)

    def _pointer(self, array: NDArray[np.generic] | None) -> int:
        if array is None:
            return 0
        self._memory.append(array)
        return int(array.ctypes.data)

    def _add(
        self, name: str, kind: MomentClass, kernel: str, fields: tuple[str, ...],
        values: dict[str, int], tiles: Tiles | int, form: Form, *, tail: Sequence[int] = (),
        tiles_per_block: int = 1, replicable: bool = False,
    ) -> None:  # fmt: skip
        assert values.keys() == set(fields), values.keys() ^ set(fields)
        record = np.array([*(values[field_] for field_ in fields), *tail], np.int64)
        self._moments.append(
            Moment(name, kind, kernel, record, form, tiles, tiles_per_block, replicable)
        )

    @staticmethod
    def _kernel(matrix: Matrix, prefix: str) -> int:
        """The address of a matrix kernel of the matrix's format."""
        return host_compiler().address(f"{prefix}_{matrix.format}")

    # Moments

    def embed(self, name: str, table: Matrix, *, scale: float = 1.0) -> None:
        """hidden = scale * table[token ids]"""
        assert table.num_rows == self._vocab_size and table.num_columns == self._hidden.width
        values = {
            "row_kernel": self._kernel(table, "row"), "table": table.address,
            "tile_bytes": table.stride, "columns": table.num_columns,
            "out": self._hidden.address, "out_stride": self._hidden.stride, "scale": _bits(scale),
        }  # fmt: skip
        row_bytes = table.tile_bytes // ROWS
        form = costs.embed_form(table.num_columns, row_bytes, scaled=scale != 1.0)
        self._add(name, "memory", "embed", EMBED, values, "tokens", form)

    def positions(self, name: str, table: Matrix) -> None:
        """hidden += table[positions]"""
        assert table.num_rows >= self._context and table.num_columns == self._hidden.width
        values = {
            "row_kernel": self._kernel(table, "row"), "table": table.address,
            "tile_bytes": table.stride, "columns": table.num_columns,
            "out": self._hidden.address, "out_stride": self._hidden.stride,
        }  # fmt: skip
        self._scratch_bytes = max(self._scratch_bytes, self._hidden.stride + matmul.SCRATCH_BYTES)
        form = costs.positions_form(table.num_columns, table.tile_bytes // ROWS)
        self._add(name, "memory", "positions", POSITIONS, values, "tokens", form)

    def norm(self, name: str, weight: NDArray[np.float32], *, of_logits: bool = False) -> None:
        """normed = RMSNorm(hidden) * weight, of all tokens or of those that need logits."""
        values = self._norm_record(weight, self._hidden, self._normed, of_logits=of_logits)
        tiles: Tiles = "logits" if of_logits else "tokens"
        form = costs.norm_form(self._hidden.width, of_logits=of_logits)
        self._add(name, "activation", "norm", NORM, values, tiles, form, replicable=True)

    def layer_norm(
        self, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32], *,
        of_logits: bool = False,
    ) -> None:  # fmt: skip
        """normed = LayerNorm(hidden) * weight + bias, as `norm`"""
        assert bias.size == weight.size
        values = self._norm_record(weight, self._hidden, self._normed, of_logits=of_logits)
        values["bias"] = self._pointer(bias)
        tiles: Tiles = "logits" if of_logits else "tokens"
        form = costs.layer_norm_form(self._hidden.width, of_logits=of_logits)
        self._add(
            name, "activation", "layer_norm", LAYER_NORM, values, tiles, form, replicable=True
        )  # fmt: skip

    def add_norm(self, name: str, weight: NDArray[np.float32]) -> None:
        """hidden += RMSNorm(projected) * weight"""
        values = self._norm_record(weight, self._projected, self._hidden)
        form = costs.norm_form(self._hidden.width, add=True)
        self._add(name, "activation", "add_norm", NORM, values, "tokens", form)

    def _norm_record(
        self, weight: NDArray[np.float32], x: _Buffer, out: _Buffer, *, of_logits: bool = False
    ) -> dict[str, int]:
        assert weight.size == x.stride // 4 == out.stride // 4 and not x.private
        return {
            "x": x.address, "x_stride": x.stride,
            "weight": self._pointer(weight), "width": x.width, "padded_width": weight.size,
            "epsilon": _bits(self._epsilon), "out": out.address, "out_stride": out.stride,
            "of_logits": int(of_logits), "out_private": int(out.private),
        }  # fmt: skip

    def qkv(
        self, name: str, matrices: Sequence[Matrix], biases: Sequence[NDArray[np.float32] | None]
    ) -> None:
        """qkv = matrices . normed + biases"""
        assert sum(matrix.num_rows for matrix in matrices) == self._qkv.width
        self._linear(name, matrices, biases, self._normed, self._qkv)

    def project(
        self, name: str, matrix: Matrix, bias: NDArray[np.float32] | None = None, *,
        apart: bool = False,
    ) -> None:  # fmt: skip
        """hidden += matrix . attended + bias; `apart`: projected = matrix . attended + bias"""
        self._onto_hidden(name, matrix, bias, self._attended, apart)

    def down(
        self, name: str, matrix: Matrix, bias: NDArray[np.float32] | None = None, *,
        apart: bool = False,
    ) -> None:  # fmt: skip
        """hidden += matrix . gated + bias; `apart`: projected = matrix . gated + bias"""
        self._onto_hidden(name, matrix, bias, self._gated, apart)

    def _onto_hidden(
        self, name: str, matrix: Matrix, bias: NDArray[np.float32] | None, source: _Buffer,
        apart: bool,
    ) -> None:  # fmt: skip
        out = self._projected if apart else self._hidden
        self._linear(name, [matrix], [bias], source, out, add=not apart)

    def up(self, name: str, matrix: Matrix, bias: NDArray[np.float32] | None = None) -> None:
        """gated = gelu(matrix . normed + bias)"""
        self._linear(name, [matrix], [bias], self._normed, self._gated, activation="gelu")

    def output(self, name: str, matrix: Matrix) -> None:
        """logits = matrix . normed, of the tokens that need logits"""
        self._linear(name, [matrix], [None], self._normed, self._logits, of_logits=True)

    def softcap(self, name: str, cap: float) -> None:
        """logits = cap * tanh(logits / cap), of the tokens that need logits"""
        logits = self._logits
        values = {"x": logits.address, "x_stride": logits.stride, "cap": _bits(cap)}
        form = costs.softcap_form(logits.width)
        num_tiles = -(-logits.width // ROWS)
        self._add(name, "activation", "softcap", SOFTCAP, values, num_tiles, form)

    def gated(self, name: str, gate: Matrix, up: Matrix, activation: Activation) -> None:
        """gated = activation(gate . normed) * (up . normed)"""
        assert gate.num_rows == up.num_rows == self._gated.width
        source = self._input(name, [gate, up], self._normed)
        lora, with_lora = self._lora(name, [gate, up], self._normed)
        values = {
            "x": source.address, "x_stride": source.stride, "x_private": int(source.private),
            "columns": gate.num_columns,
            "out": self._gated.address, "out_stride": self._gated.stride,
            "gate_kernel": self._kernel(gate, "tile"), "gate": gate.address,
            "gate_tile_bytes": gate.stride,
            "up_kernel": self._kernel(up, "tile"), "up": up.address, "up_tile_bytes": up.stride,
            "gate_lora": lora[0], "up_lora": lora[1],
        }  # fmt: skip
        quantized = source is self._quantized
        form = costs.gated_form(_shape(gate), _shape(up), activation, quantized=quantized)
        form = with_lora(form)
        self._add(name, "matmul", f"gated_{activation}", GATED, values, gate.num_tiles, form)

    def rope(
        self, name: str, layer: int, cosines: NDArray[np.float32] | None,
        sines: NDArray[np.float32] | None, *, scale: float | None = None,
        query_norm: NDArray[np.float32] | None = None,
        key_norm: NDArray[np.float32] | None = None,
        key_center: NDArray[np.float32] | None = None,
    ) -> None:  # fmt: skip
        """Normalizes, rotates and scales queries and keys of `qkv`; writes keys and values to the
        cache.

        Args:
            name: the moment's.
            layer: whose part of the cache it is.
            cosines, sines: (context, rope_dim / 2); None where nothing is rotated.
            scale: of the queries; head_dim ** -0.5 if None.
            query_norm, key_norm: weights of an RMSNorm of each head, (head_dim); None: no norm.
            key_center: what is near all rotated keys of each head, (kv_heads, head_dim): an int8
                cache keeps the differences. Not where scores are capped.
        """
        rope_dim = 0
        if cosines is not None and sines is not None:
            assert cosines.shape == sines.shape and cosines.shape[0] == self._context
            rope_dim = 2 * cosines.shape[1]
        for weight in (query_norm, key_norm):
            assert weight is None or weight.size >= self._head_dim
        assert key_center is None or key_center.size == self._kv_heads * self._head_dim
        keys, cache_values = self._cache.layer(layer)
        values = {
            "qkv": self._qkv.address, "qkv_stride": self._qkv.stride,
            "num_heads": self._heads, "num_kv_heads": self._kv_heads,
            "head_dim": self._head_dim, "padded_head_dim": self._cache.heads.padded_head_dim,
            "rope_dim": rope_dim,
            "cosines": self._pointer(cosines), "sines": self._pointer(sines),
            "scale": _bits(self._head_dim**-0.5 if scale is None else scale),
            "query_norm": self._pointer(query_norm), "key_norm": self._pointer(key_norm),
            "epsilon": _bits(self._epsilon),
            "keys": keys, "values": cache_values, "page_bytes": self._cache.page_bytes,
            "key_center": self._pointer(key_center),
        }  # fmt: skip
        form = costs.rope_form(
            self._heads, self._kv_heads, self._head_dim, rope_dim,
            query_norm=query_norm is not None, key_norm=key_norm is not None, kv=self._cache.kind,
        )  # fmt: skip
        self._add(name, "memory", "rope" + self._suffix, ROPE, values, "tokens", form)

    def attention(
        self, name: str, layer: int, *, window: int | None = None, softcap: float | None = None
    ) -> None:
        """attended = softmax(queries . keys) . values, causal.

        Args:
            name: the moment's.
            layer: whose part of the cache it is.
            window: tokens that a token sees, itself among them; all before it if None.
            softcap: a score becomes softcap * tanh(score / softcap); None: it stays as it is.
        """
        assert (window is None or window > 0) and (softcap is None or softcap > 0)
        keys, cache_values = self._cache.layer(layer)
        values = {
            "qkv": self._qkv.address, "qkv_stride": self._qkv.stride,
            "num_heads": self._heads, "num_kv_heads": self._kv_heads,
            "head_dim": self._head_dim, "padded_head_dim": self._cache.heads.padded_head_dim,
            "keys": keys, "values": cache_values, "page_bytes": self._cache.page_bytes,
            "out": self._attended.address, "out_stride": self._attended.stride,
            "window": window or attention.NO_WINDOW, "softcap": _bits(softcap or 0.0),
        }  # fmt: skip
        form = costs.attention_form(
            self._heads, self._kv_heads, self._head_dim, window=window,
            softcap=softcap is not None, kv=self._cache.kind,
        )  # fmt: skip
        self._add(
            name, "activation", "attention" + self._suffix, ATTENTION, values, "queries", form,
            tiles_per_block=self._kv_heads,
        )  # fmt: skip

    def _input(
        self, name: str, matrices: Sequence[Matrix], source: _Buffer, of_logits: bool = False
    ) -> _Buffer:
        """The buffer that the matrices read: `source`, or its quantized form, which a moment of
        its own makes.
        """
        floats = {matrix.format in FLOAT_FORMATS for matrix in matrices}
        columns = {matrix.num_columns for matrix in matrices}
        assert columns == {source.width}, (name, columns, source.width)
        if len(floats) > 1:
            raise UnsupportedModelError(
                f"{name}: its matrices are partly float and partly quantized; "
                "Cyclewise needs them alike."
            )
        if floats == {True}:
            return source
        values = {
            "x": source.address, "x_stride": source.stride, "x_private": int(source.private),
            "columns": source.width, "out": self._quantized.address, "out_private": 1,
            "of_logits": int(of_logits),
        }  # fmt: skip
        tiles: Tiles = "logits" if of_logits else "tokens"
        form = costs.quantize_form(source.width, of_logits=of_logits)
        self._add(
            f"{name}.quantize", "activation", "quantize", QUANTIZE, values, tiles, form,
            replicable=True,
        )  # fmt: skip
        return self._quantized

    def _linear(
        self, name: str, matrices: Sequence[Matrix], biases: Sequence[NDArray[np.float32] | None],
        source: _Buffer, out: _Buffer, *, add: bool = False, of_logits: bool = False,
        activation: Literal["gelu"] | None = None,
    ) -> None:  # fmt: skip
        x = self._input(name, matrices, source, of_logits)
        lora, with_lora = self._lora(name, matrices, source)
        tail: list[int] = []
        offset = biased_rows = 0
        for matrix, bias, of_matrix in zip(matrices, biases, lora, strict=True):
            assert bias is None or bias.size >= matrix.num_rows
            part = {
                "tile_kernel": self._kernel(matrix, "tile"), "weights": matrix.address,
                "tile_bytes": matrix.stride, "num_tiles": matrix.num_tiles,
                "out_offset": offset * 4, "bias": self._pointer(bias), "lora": of_matrix,
            }  # fmt: skip
            tail += [part[field_] for field_ in LINEAR_PART]
            offset += matrix.num_rows
            biased_rows += matrix.num_rows if bias is not None else 0
            if matrix.num_rows % ROWS and matrix is not matrices[-1]:
                raise UnsupportedModelError(
                    f"{matrix.name} has {matrix.num_rows} rows; "
                    f"Cyclewise needs a multiple of {ROWS} here."
                )
        assert offset == out.width
        values = {
            "x": x.address, "x_stride": x.stride, "x_private": int(x.private),
            "columns": source.width, "out": out.address, "out_stride": out.stride,
            "add_to_out": int(add), "of_logits": int(of_logits), "num_parts": len(matrices),
        }  # fmt: skip
        form = costs.linear_form(
            tuple(_shape(matrix) for matrix in matrices), biased_rows,
            quantized=x is self._quantized, add=add, activation=activation, of_logits=of_logits,
        )  # fmt: skip
        kernel = f"linear_{activation}" if activation else "linear"
        num_tiles = sum(matrix.num_tiles for matrix in matrices)
        form = with_lora(form)
        self._add(name, "matmul", kernel, LINEAR, values, num_tiles, form, tail=tail)

    def _lora(
        self, name: str, matrices: Sequence[Matrix], source: _Buffer
    ) -> tuple[list[int], Callable[[Form], Form]]:
        """low = the adapters' A's . source, in a moment of its own. Gives each matrix's `lora`, 0
        where no adapter changes it, and what becomes of the form of the moment that adds the B's.
        """
        stacks = self._adapters.of(matrices) if self._adapters else []
        largest = max((s for s in stacks if s), key=lambda s: s.num_bytes, default=None)
        if largest is None:
            return [0] * len(matrices), lambda form: form
        num_splits = -(-source.width // SPLIT_COLUMNS)
        num_slots = max(stack.a.num_tiles for stack in stacks if stack)
        low = self._low_buffer(num_slots * num_splits * SPLIT_BYTES)
        values = {
            "x": source.address, "x_stride": source.stride, "x_private": int(source.private),
            "columns": source.width, "low": low, "num_slots": num_slots, "num_splits": num_splits,
        }  # fmt: skip
        tail = [field_ for stack in stacks for field_ in self._lora_a_record(stack)]
        form = costs.lora_a_form(replace(_shape(largest.a), rows=largest.rank))
        self._add(
            f"{name}.lora_a", "matmul", "lora_a", LORA_A, values, "adapters", form, tail=tail,
            tiles_per_block=num_slots * num_splits,
        )  # fmt: skip
        tables = []
        for place in range(len(matrices)):
            additions = [stack.additions[place] if stack else None for stack in stacks]
            found = next((each for each in additions if each), None)
            if found is None:
                tables.append(0)
                continue
            kernel = self._kernel(found.b, "lora_b")
            head = {"kernel": kernel, "low": low, "num_splits": num_splits}
            table = [head[field_] for field_ in LORA_B]
            for addition in additions:
                table += self._lora_b_record(addition)
            tables.append(self._pointer(np.array(table, np.int64)))
        added = [(each.rank, _shape(each.b)) for each in largest.additions if each]
        return tables, lambda form: costs.with_lora_b(form, added)

    def _low_buffer(self, num_bytes: int) -> int:
        """Only the moment behind reads it: one serves all, unless it is too small."""
        if num_bytes > self._low_bytes:
            self._low, self._low_bytes = self._allocate(num_bytes), num_bytes
        return self._low

    def _lora_a_record(self, stack: Stack | None) -> list[int]:
        if stack is None:
            return [0] * len(LORA_A_MATRIX)
        a = stack.a
        values = {
            "kernel": self._kernel(a, "tile"), "weights": a.address, "tile_bytes": a.stride,
            "num_tiles": a.num_tiles, "column_bytes": ROWS * FLOAT_FORMATS[a.format],
        }  # fmt: skip
        return [values[field_] for field_ in LORA_A_MATRIX]

    def _lora_b_record(self, addition: Addition | None) -> list[int]:
        if addition is None:
            return [0] * len(LORA_B_MATRIX)
        b = addition.b
        values = {
            "weights": b.address, "tile_bytes": b.stride,
            "num_blocks": b.num_columns // BLOCK_COLUMNS, "first_row": addition.first_row,
            "scale": _bits(addition.scale),
        }  # fmt: skip
        return [values[field_] for field_ in LORA_B_MATRIX]

    def build(self, *keep_alive: object) -> Program:
        logits = next(memory for memory in self._memory if _address(memory) == self._logits.address)
        assert isinstance(logits, np.ndarray)
        stride = self._logits.stride // 4
        table = logits.view(np.float32)[: MAX_BATCH_TOKENS * stride].reshape(-1, stride)
        group = self._heads // self._kv_heads
        scratch = max(
            2 * linear.SUMS_BYTES + matmul.SCRATCH_BYTES,
            attention.scratch_bytes(group, self._cache.heads.padded_head_dim),
            self._scratch_bytes,
        )
        return Program(
            tuple(self._moments), self._vocab_size, self._context, self._cache, table,
            self._num_threads, self._private_bytes, scratch, (*self._memory, *keep_alive),
            len(self._adapters) if self._adapters else 0,
        )  # fmt: skip


def _bits(value: float) -> int:
    """A float32 as a record's field."""
    return int(np.float32(value).view(np.int32))


def _shape(matrix: Matrix) -> MatrixShape:
    return MatrixShape(matrix.format, matrix.num_rows, matrix.num_columns, matrix.num_bytes)


def _address(memory: object) -> int:
    return int(memory.ctypes.data) if isinstance(memory, np.ndarray) else 0
