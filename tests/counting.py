"""A twin that counts: operations and bytes, moment by moment, while it computes a batch.

Operations are counted by the arrays themselves: whatever arithmetic numpy does on a `Counted` array
is booked under the moment that runs, element by element. Bytes are those of the arrays that a
moment is handed and those that it leaves. What is computed are the twins of `naive.py`, so a count
stands for an arithmetic whose result is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from cyclewise.machine.kernels.blocks import tile_bytes
from tests import naive
from tests.models.tiny import Tensor
from tests.naive_experts import route

COUNTED = (
    "add", "subtract", "multiply", "divide", "negative", "absolute", "maximum", "exp", "tanh",
    "sqrt", "rint",
)  # fmt: skip
NOT_COUNTED = ("greater", "clip")
"""Guards and conversions."""
TILE_ROWS = 16


@dataclass(slots=True)
class Count:
    operations: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    kv_bytes: int = 0


class Book:
    """Counts by moment."""

    def __init__(self) -> None:
        self.counts: dict[str, Count] = {}
        self.now: Count | None = None

    @contextmanager
    def moment(self, name: str) -> Iterator[Count]:
        assert self.now is None and name not in self.counts
        self.counts[name] = self.now = Count()
        yield self.now
        self.now = None


class Counted(np.ndarray):
    """An array whose arithmetic is booked while a moment runs."""

    book: Book | None = None

    def __array_finalize__(self, source):
        self.book = getattr(source, "book", None)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        plain = [np.asarray(x) if isinstance(x, Counted) else x for x in inputs]
        if out is not None:
            options["out"] = tuple(np.asarray(x) for x in out)
        result = getattr(ufunc, method)(*plain, **options)
        book = next(x.book for x in (*inputs, *(out or ())) if isinstance(x, Counted))
        if book is not None and book.now is not None:
            book.now.operations += _operations(ufunc, method, plain, result)
        return counted(result, book) if isinstance(result, np.ndarray | np.generic) else result

    def __array_function__(self, function, types, args, options):
        result = super().__array_function__(function, types, args, options)
        return counted(result, self.book) if isinstance(result, np.ndarray) else result


def counted(array, book):
    found = np.asarray(array).view(Counted)
    found.book = book
    return found


def _operations(ufunc, method, inputs, result):
    if ufunc is np.matmul:
        return 2 * np.size(result) * inputs[0].shape[-1]
    if ufunc.__name__ in NOT_COUNTED:
        return 0
    assert ufunc.__name__ in COUNTED, ufunc
    assert method in ("__call__", "reduce"), method
    return np.size(result) if method == "__call__" else np.size(inputs[0])


@dataclass(slots=True)
class Chunk:
    """Tokens that follow those of a sequence that was met before, or begin one."""

    sequence: int
    token_ids: Sequence[int]


@dataclass(slots=True)
class CountingTransformer:
    """`naive.Transformer`, batch by batch, with keys and values kept from one to the next."""

    twin: naive.Transformer
    tensors: dict[str, Tensor]
    """As they lie in the file."""
    experts_read: dict[str, int] = field(default_factory=dict)
    """Of the last batch, by layer."""
    kept: dict[tuple[int, int], list[np.ndarray]] = field(default_factory=dict)
    """Keys and values by sequence and layer, float16 (positions, kv_heads, head_dim)."""

    def run(self, chunks: Sequence[Chunk], logit_rows: Sequence[int]) -> tuple[np.ndarray, Book]:
        """Logits (rows, vocabulary), and what each moment cost."""
        twin, book = self.twin, Book()
        token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
        with book.moment("embed") as count:
            x = counted(twin.tensors["token_embd.weight"][token_ids], book)
            columns = x.shape[1]
            row_bytes = tile_bytes(self.tensors["token_embd.weight"][1], columns) // TILE_ROWS
            count.activation_bytes += len(token_ids) * row_bytes + x.nbytes
        for layer in range(twin.num_layers):
            name, file = f"layers.{layer}.", f"blk.{layer}."
            normed = self._norm(book, name + "attention.norm", file + "attn_norm", x)
            parts = [file + part for part in ("attn_q", "attn_k", "attn_v")]
            qkv = self._linear(book, name + "attention.qkv", parts, normed)
            attended = self._attention(book, name + "attention.", layer, chunks, qkv)
            output = [file + "attn_output"]
            x = self._linear(book, name + "attention.output", output, attended, onto=x)
            normed = self._norm(book, name + "ffn.norm", file + "ffn_norm", x)
            if twin.num_chosen:
                x = self._experts(book, name + "ffn.", file, normed, x)
                continue
            gated = self._gated(book, name + "ffn.gate_up", file, normed)
            x = self._linear(book, name + "ffn.down", [file + "ffn_down"], gated, onto=x)
        if not logit_rows:
            return np.empty((0, 0), np.float32), book
        normed = self._norm(book, "output.norm", "output_norm", x[list(logit_rows)])
        table = "output" if "output.weight" in twin.tensors else "token_embd"
        return np.asarray(self._linear(book, "output", [table], normed)), book

    def _norm(self, book, name, file, x):
        with book.moment(name) as count:
            weight = self.twin.tensors[file + ".weight"]
            out = naive.rms_norm(x, weight, self.twin.epsilon).astype(np.float32)
            count.weight_bytes += weight.nbytes
            count.activation_bytes += x.nbytes + out.nbytes
            return out

    def _input(self, book, name, files, x):
        """What the matrices read, and its bytes; a moment of its own where that is int8."""
        if not all(f"{file}.weight" in self.twin.quantized for file in files):
            return x, x.nbytes
        with book.moment(name + ".quantize") as count:
            quantized = naive.quantize(x)
            assert quantized.scaled_sum.shape == quantized.scale.shape
        rows = [slice(i, i + 1) for i in range(len(x))]
        packed = [naive.Activations(quantized.codes[r], quantized.scale[r]).pack() for r in rows]
        num_bytes = sum(row.nbytes for row in packed)
        count.activation_bytes += x.nbytes + num_bytes
        return quantized.values(), num_bytes

    def _packed_bytes(self, file):
        """Of a matrix, in whole tiles; `test_packing.py` holds what a tile of a format is."""
        data, kind = self.tensors[file + ".weight"]
        columns = self.twin.tensors[file + ".weight"].shape[1]
        return tile_bytes(kind, columns) * -(-len(data) // TILE_ROWS)

    def _product(self, count, file, x):
        """x times a matrix, with its bias."""
        out = x @ self.twin.tensors[file + ".weight"].T
        count.weight_bytes += self._packed_bytes(file)
        if file + ".bias" in self.twin.tensors:
            bias = self.twin.tensors[file + ".bias"]
            count.weight_bytes += bias.nbytes
            out = out + bias
        return out

    def _linear(self, book, name, files, x, onto=None):
        x, num_bytes = self._input(book, name, files, x)
        with book.moment(name) as count:
            out = np.concatenate([self._product(count, file, x) for file in files], axis=1)
            count.activation_bytes += num_bytes + out.nbytes
            if onto is not None:
                count.activation_bytes += onto.nbytes
                out = onto + out
            return out

    def _gated(self, book, name, file, x):
        files = [file + "ffn_gate", file + "ffn_up"]
        x, num_bytes = self._input(book, name, files, x)
        with book.moment(name) as count:
            gate, up = (self._product(count, each, x) for each in files)
            out = (naive.silu(gate) * up).astype(np.float32)
            count.activation_bytes += num_bytes + out.nbytes
            return out

    def _experts(self, book, name, file, normed, x):
        """The tokens of each expert that is chosen go through its matrices alone."""
        twin = self.twin
        logits = self._linear(book, name + "router", [file + "ffn_gate_inp"], normed)
        with book.moment(name + "route") as count:
            routing = route(logits, twin.num_chosen, normalize=twin.normalized)
            written = routing.chosen.astype(np.int32), routing.weights.astype(np.float32)
            count.activation_bytes += logits.nbytes + sum(array.nbytes for array in written)
        self.experts_read[name] = len(routing.experts)
        files = [f"{file}ffn_{kind}.0" for kind in ("gate", "up")]
        inputs, num_bytes = self._input(book, name + "gate_up", files, normed)
        quantized = inputs is not normed
        if not quantized:
            with book.moment(name + "gate_up.gather") as count:
                count.activation_bytes += normed.nbytes
        count = list(book.counts.values())[-1]
        # Each of a token's experts has a row of its own.
        count.activation_bytes += num_bytes * (twin.num_chosen - quantized)
        with book.moment(name + "gate_up") as count:
            rows = []
            for expert in routing.experts:
                each = inputs[routing.tokens_of(expert)]
                gate, up = (
                    self._product(count, f"{file}ffn_{kind}.{expert}", each)
                    for kind in ("gate", "up")
                )
                rows.append((naive.silu(gate) * up).astype(np.float32))
            count.activation_bytes += num_bytes * twin.num_chosen + sum(r.nbytes for r in rows)
        gated = np.concatenate(rows)
        gated, num_bytes = self._input(book, name + "down", [file + "ffn_down.0"], gated)
        out, first = x.copy(), 0
        with book.moment(name + "down") as count:
            for expert, each in zip(routing.experts, rows, strict=True):
                tokens = routing.tokens_of(expert)
                part = self._product(count, f"{file}ffn_down.{expert}", gated[first:][: len(each)])
                weights = [[routing.weight(token, expert)] for token in tokens]
                out[tokens] = out[tokens] + part * np.array(weights, np.float32)
                first += len(each)
            count.activation_bytes += num_bytes + x.nbytes + out.nbytes
        return out

    def _attention(self, book, name, layer, chunks, qkv):
        twin = self.twin
        heads, kv_heads = twin.num_heads, twin.num_kv_heads
        qkv = qkv.reshape(len(qkv), -1, twin.head_dim)
        firsts = np.cumsum([0, *(len(chunk.token_ids) for chunk in chunks)])
        queries = []
        with book.moment(name + "rope") as count:
            for chunk, first in zip(chunks, firsts, strict=False):
                kept = self.kept.setdefault((chunk.sequence, layer), _nothing(twin))
                rows = qkv[first : first + len(chunk.token_ids)]
                cosines, sines = twin.angles(np.arange(len(rows)) + len(kept[0]))
                rotated = naive.rotate(
                    rows[:, : heads + kv_heads], cosines, sines, neighbours=twin.neighbours
                )
                queries.append(rotated[:, :heads] / np.float32(np.sqrt(twin.head_dim)))
                new = [naive.to_half(a) for a in (rotated[:, heads:], rows[:, heads + kv_heads :])]
                both = zip(kept, new, strict=True)
                kept[:] = [counted(np.concatenate(parts), book) for parts in both]
                count.kv_bytes += sum(a.nbytes for a in new)
                count.activation_bytes += (
                    rows.nbytes + queries[-1].nbytes + cosines.nbytes + sines.nbytes
                )
        attended = []
        with book.moment(name + "attend") as count:
            for chunk, chunk_queries in zip(chunks, queries, strict=True):
                keys, values = self.kept[chunk.sequence, layer]
                first = len(keys) - len(chunk_queries)
                for i, query in enumerate(chunk_queries):
                    end = first + i + 1
                    attended.append(naive.attend(query, keys[:end], values[:end]).reshape(1, -1))
                count.kv_bytes += keys.nbytes + values.nbytes
            out = np.concatenate(attended).astype(np.float32)
            count.activation_bytes += sum(a.nbytes for a in queries) + out.nbytes
            return counted(out, book)


def _nothing(twin):
    return [np.zeros((0, twin.num_kv_heads, twin.head_dim), np.float16) for _ in range(2)]
