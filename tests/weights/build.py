"""GGUF files as bytes, sound or broken on purpose."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy.typing as npt

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = dict(zip(range(13), "BbHhIif?  Qqd", strict=True))


def string(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def array(kind: int, values: list[Any]) -> bytes:
    head = struct.pack("<IQ", kind, len(values))
    if kind == STRING:
        return head + b"".join(string(value) for value in values)
    return head + struct.pack(f"<{len(values)}{CODES[kind]}", *values)


def entry(key: str | bytes, kind: int, value: Any) -> bytes:
    """A metadata entry; bytes as value are written as they are."""
    head = string(key) + struct.pack("<I", kind)
    if isinstance(value, bytes):
        return head + value
    return head + (string(value) if kind == STRING else struct.pack(f"<{CODES[kind]}", value))


def tensor(
    name: str | bytes, sizes: tuple[int, ...] = (32,), ggml_id: int = 0, offset: int = 0
) -> bytes:
    """A line of the tensor table; sizes in the order of the file, a row's length first."""
    return (
        string(name)
        + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        + struct.pack("<IQ", ggml_id, offset)
    )


def gguf(
    entries: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_entries: int | None = None,
    num_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    entries, tensors = entries or [], tensors or []
    num_entries = len(entries) if num_entries is None else num_entries
    num_tensors = len(tensors) if num_tensors is None else num_tensors
    head = magic + struct.pack("<IQQ", version, num_tensors, num_entries)
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def small_model() -> bytes:
    """A small file with every kind of metadata value and tensors of several formats."""
    entries = [
        entry("general.architecture", STRING, "llama"),
        entry("general.alignment", U32, 64),
        entry("u8", U8, 200),
        entry("i8", I8, -100),
        entry("u16", U16, 60_000),
        entry("i16", I16, -30_000),
        entry("i32", I32, -(2**31)),
        entry("f32", F32, 0.5),
        entry("bool", BOOL, True),
        entry("u64", U64, 2**64 - 1),
        entry("i64", I64, -(2**63)),
        entry("f64", F64, 0.1),
        entry("tokens", ARRAY, array(STRING, ["a", "", "Ġthe", "日本", "🙂"])),
        entry("scores", ARRAY, array(F32, [0.0, -1.5, 2.0])),
        entry("flags", ARRAY, array(U8, [0, 1, 2])).replace(
            struct.pack("<IQ", U8, 3), struct.pack("<IQ", BOOL, 3)
        ),
        entry("none", ARRAY, array(STRING, [])),
        entry("no numbers", ARRAY, array(I32, [])),
    ]
    tensors = [
        tensor("token_embd.weight", (64, 3), 8, 0),  # Q8_0: 6 blocks of 34 bytes
        tensor("norm.weight", (7,), 0, 256),  # F32
        tensor("blk.0.ffn_down.weight", (256, 2), 12, 320),  # Q4_K: 2 blocks of 144 bytes
    ]
    data = bytes(i % 251 for i in range(320 + 288))
    return gguf(entries, tensors, data, alignment=64)


def safetensors(
    tensors: dict[str, npt.NDArray[Any]], metadata: dict[str, str] | None = None
) -> bytes:
    """A safetensors file; arrays of uint16 are bfloat16."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, values in tensors.items():
        offsets = [len(data), len(data) + values.nbytes]
        header[name] = {
            "dtype": DTYPES[values.dtype.str[1:]],
            "shape": values.shape,
            "data_offsets": offsets,
        }
        data += values.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


DTYPES = {
    "f4": "F32", "f2": "F16", "u2": "BF16", "i8": "I64", "i4": "I32", "i1": "I8", "u1": "U8",
    "b1": "BOOL", "f8": "F64",
}  # fmt: skip
