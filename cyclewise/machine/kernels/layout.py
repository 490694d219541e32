"""The records that kernels read: fields of 64 bits, by number.

`machine/builder.py` writes them, the kernels read them through `Record`; both sides use the names
here. Every kernel of a moment has one signature: `kernel(moment, batch, thread, first, last)`,
the tiles `first..last` of the moment for one thread.
"""

from __future__ import annotations

from cyclewise.machine.kernels.lang import F32, I32, I64, Emitter, Value

PAGE_TOKENS = 32
"""Tokens of a page of the KV cache."""
QUERY_BLOCK = 16
"""Query tokens that attention takes at once."""
SPLIT = 256
"""Keys whose part in attention is summed on its own: a multiple of PAGE_TOKENS."""

BATCH = (
    "num_tokens",
    "num_logits",
    "token_ids",  # int32 (num_tokens)
    "positions",  # int32 (num_tokens)
    "slots",  # int32 (num_tokens): page * PAGE_TOKENS + place in the page
    "logit_rows",  # int32 (num_logits)
    "query_blocks",  # records QUERY_BLOCK_FIELDS
    "num_runs",
    "runs",  # records RUN: tokens with an adapter, in order
)
RUN = ("first_token", "num_tokens", "adapter")
"""Consecutive tokens of one adapter."""
QUERY_BLOCK_FIELDS = (
    "first_token", "num_tokens", "first_position", "pages",
    "first_split", "end_split",  # the splits of the keys that this record's tiles take
    "num_splits", "num_parts",  # of the block, and into how many records they are cut
    "partials",  # of all its splits and key-value heads, where there is more than one part
    "counters",  # a cache line for each key-value head: parts that are done; 0 between steps
)  # fmt: skip

THREAD = ("scratch", "private")
"""A thread's own memory, and what to add to the address of a private buffer."""

EMBED = ("row_kernel", "table", "tile_bytes", "columns", "out", "out_stride", "scale")
NORM = (
    "x", "x_stride", "weight", "width", "padded_width", "epsilon", "out", "out_stride",
    "of_logits", "out_private",
)  # fmt: skip
LAYER_NORM = (*NORM, "bias")
POSITIONS = ("row_kernel", "table", "tile_bytes", "columns", "out", "out_stride")
QUANTIZE = ("x", "x_stride", "x_private", "columns", "out", "out_private", "of_logits")
LINEAR = (
    "x", "x_stride", "x_private", "columns", "out", "out_stride",
    "add_to_out", "of_logits", "num_parts",
)  # fmt: skip
LINEAR_PART = ("tile_kernel", "weights", "tile_bytes", "num_tiles", "out_offset", "bias", "lora")
GATED = (
    "x", "x_stride", "x_private", "columns", "out", "out_stride",
    "gate_kernel", "gate", "gate_tile_bytes", "up_kernel", "up", "up_tile_bytes",
    "gate_lora", "up_lora",
)  # fmt: skip
LORA_A = ("x", "x_stride", "x_private", "columns", "low", "num_slots", "num_splits")
LORA_A_MATRIX = ("kernel", "weights", "tile_bytes", "num_tiles", "column_bytes")
"""Behind LORA_A, one for each adapter: its A's; `num_tiles` is 0 where it has none."""
LORA_B = ("kernel", "low", "num_splits")
"""What a matrix's `lora` points to: the kernel that adds B's part to a tile's sums."""
LORA_B_MATRIX = ("weights", "tile_bytes", "num_blocks", "first_row", "scale")
"""Behind LORA_B, one for each adapter; `num_blocks` is 0 where it leaves the matrix alone."""
ROUTE = (
    "logits", "logits_stride", "num_experts", "num_chosen", "normalize",
    "slots", "places", "row_tokens", "row_weights",
)  # fmt: skip
DISPATCH = (
    "x", "x_stride", "x_private", "columns", "out", "row_bytes", "num_chosen", "places",
    "quantize", "by_row",
)  # fmt: skip
EXPERTS_GATED = (
    "slots", "x", "row_bytes", "columns", "out", "out_stride", "num_tiles",
    "gate_kernel", "gates", "gate_tile_bytes", "up_kernel", "ups", "up_tile_bytes",
)  # fmt: skip
EXPERTS_DOWN = (
    "slots", "x", "x_private", "row_bytes", "columns", "out", "out_stride",
    "kernel", "matrices", "tile_bytes", "row_tokens", "row_weights",
)  # fmt: skip
SLOT = ("expert", "first_row", "num_rows")
"""An expert that tokens of the batch chose, and its rows in the order of experts. What `slots`
points to begins with their number."""
PLACE = ("row", "first_row", "num_rows")
"""int32: where a token lies with one of the experts that it chose, and that expert's rows."""
ROPE = (
    "qkv", "qkv_stride", "num_heads", "num_kv_heads", "head_dim", "padded_head_dim", "rope_dim",
    "cosines", "sines", "scale", "query_norm", "key_norm", "epsilon", "keys", "values",
    "page_bytes", "key_center",
)  # fmt: skip
ATTENTION = (
    "qkv", "qkv_stride", "num_heads", "num_kv_heads", "head_dim", "padded_head_dim",
    "keys", "values", "page_bytes", "out", "out_stride", "window", "softcap",
)  # fmt: skip

SOFTCAP = ("x", "x_stride", "cap")

STREAM = ("source", "tile_bytes", "repeats")
RATE = ("operands", "repeats")
HANDOVER = ("line", "rounds")
CHAIN = ("seed", "blocks")

SCHEDULE = ("kernel", "moment", "num_tiles", "grain", "replicated")
STEP = (
    "num_moments", "schedule", "batch", "counters", "num_threads", "threads",
    "waiters",  # the address of the number of threads that sleep inside a step
    "execute",  # the specialization of the loop that runs this step
    "stamps",  # where the clocked one writes its ticks
)  # fmt: skip

LINE = 64
"""Bytes of a cache line: what several threads write has its own."""
STEP_BYTES = 2 * LINE
STEPS_AT, SLEEPERS_AT, WAITERS_AT, FINISHED_AT = LINE, 5 * LINE, 6 * LINE, 7 * LINE
"""What threads share: the epoch, the records of two steps (by the epoch's parity), how many helpers
sleep between steps and inside one, and for each thread the last epoch that it has left."""


class Record:
    """A record at an address, read field by field."""

    def __init__(self, emitter: Emitter, address: Value, fields: tuple[str, ...]) -> None:
        self._emitter = emitter
        self._address = address
        self._fields = fields

    def __getattr__(self, name: str) -> Value:
        return self._emitter.load(self._address + 8 * self._fields.index(name))

    def float(self, name: str) -> Value:
        """A field whose low 32 bits are a float32."""
        return self._emitter.load(self._address + 8 * self._fields.index(name), F32)


def load_int32(emitter: Emitter, address: Value, index: Value) -> Value:
    """An element of an int32 array, as int64."""
    return emitter.cast(emitter.load(address + index * 4, I32), I64, "sext")
