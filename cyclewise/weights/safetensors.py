"""Safetensors files: bytes on disk in, views of tensors out.

`weights/directory.py` reads a model's weights with this, and adapters come the same way. The
format has no code in it, only a length, a JSON header and the tensors' bytes; yet the header is
hostile like that of any file: every type, shape and offset is proven before it is used, and its
JSON may hold nothing but what the format has. The safetensors package has no bfloat16 for numpy.

The format is specified at https://github.com/huggingface/safetensors (README, "Format"): eight
bytes of length, little-endian, the header, then the data, in which there are no holes.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cyclewise.errors import ModelFileError, UnsupportedModelError
from cyclewise.weights.mapped import MappedFile, shown

# Bytes of one value. Types of less than a byte (F4, F6) have no layout that is agreed upon.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

_MAX_HEADER = 1 << 25  # a hundred bytes for each of 300,000 tensors; no known file has one of 5 MB
_MAX_DIMENSIONS = 8
_MAX_SIZE = 2**63 - 1
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies in a file."""

    name: str
    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]  # numpy order
    offset: int  # bytes from the start of the file
    nbytes: int


class SafetensorsFile:
    """A safetensors file mapped into memory; a context manager.

    Raises ModelNotFoundError for a missing file, ModelFileError for a damaged or unreadable one,
    and UnsupportedModelError for a type of number that is not known here.
    """

    __slots__ = ("_file", "metadata", "path", "tensors")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = MappedFile(path)
        try:
            self.tensors, self.metadata = parse(self._file.buffer, str(self.path))
        except BaseException:
            self.close()
            raise

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """A read-only view of the tensor's `nbytes` bytes, one-dimensional; nothing is copied."""
        tensor = self.tensors[name]
        return self._file.view(tensor.offset, tensor.nbytes)

    def values(self, name: str) -> npt.NDArray[Any]:
        """The tensor in its shape, read-only: BF16 as float32, other numbers as they are.

        Raises UnsupportedModelError for 8-bit floats, which numpy does not have.
        """
        tensor = self.tensors[name]
        data = self.data(name)
        if tensor.dtype == "BF16":
            bits = data.view("<u2").astype(np.uint32) << 16
            return bits.view(np.float32).reshape(tensor.shape)
        kind = _NUMPY.get(tensor.dtype)
        if kind is None:
            raise UnsupportedModelError(
                f"{self.path}: tensor {shown(name)} is {tensor.dtype}, which cannot be read here"
            )
        return data.view(kind).reshape(tensor.shape)

    def release(self, name: str) -> None:
        """Let the operating system take back a tensor's pages; they may be read again."""
        tensor = self.tensors[name]
        self._file.release(tensor.offset, tensor.nbytes)

    def close(self) -> None:
        """Unmap the file, now or when the last view of it is gone."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


_NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip


def parse(buffer: bytes | mmap.mmap, where: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The proven tensors, in the order of the header, and the file's metadata; `where` names the
    file in errors.
    """
    header, start = _header(buffer, where)
    metadata = _metadata(header.pop(_METADATA, {}), where)
    size = len(buffer) - start
    tensors = {name: _tensor(name, entry, start, size, where) for name, entry in header.items()}
    end, before = start, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset < end:
            raise ModelFileError(f"{where}: tensors {before} and {shown(tensor.name)} overlap")
        if tensor.offset > end:
            raise ModelFileError(
                f"{where}: {tensor.offset - end} bytes before tensor {shown(tensor.name)} "
                "belong to none: the file is damaged, fetch it again"
            )
        end, before = tensor.offset + tensor.nbytes, shown(tensor.name)
    if end != len(buffer):
        raise ModelFileError(
            f"{where}: {len(buffer) - end} bytes after the last tensor belong to none: the file is "
            "damaged, fetch it again"
        )
    return tensors, metadata


def _header(buffer: bytes | mmap.mmap, where: str) -> tuple[dict[str, Any], int]:
    """The header's JSON object, and where the data begin."""
    if len(buffer) < 8:
        raise ModelFileError(f"{where}: not a safetensors file: it has only {len(buffer)} bytes")
    (length,) = struct.unpack_from("<Q", buffer)
    if length > _MAX_HEADER or buffer[8:9] != b"{":
        raise ModelFileError(
            f"{where}: not a safetensors file: it begins with {bytes(buffer[:9])!r} instead of a "
            "length and a JSON object"
        )
    if length > len(buffer) - 8:
        raise ModelFileError(
            f"{where}: the file ends inside its header: it is truncated or damaged, fetch it again"
        )
    try:
        header = json.loads(
            str(buffer[8 : 8 + length], "utf-8"),
            object_pairs_hook=_unique,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except RecursionError:
        raise ModelFileError(f"{where}: its header is nested too deeply") from None
    except ValueError as error:  # also of bytes that are no UTF-8, and of integers without end
        reason = str(error).partition("\n")[0][:160]
        raise ModelFileError(f"{where}: its header is no JSON object ({reason})") from None
    if not isinstance(header, dict):
        raise ModelFileError(f"{where}: its header is no JSON object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{shown(twice)} occurs twice")
    return members


def _no_number(text: str) -> None:
    raise ValueError(f"{shown(text)} is no whole number")


def _metadata(metadata: object, where: str) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ModelFileError(f"{where}: its metadata is no table of texts")
    return metadata


def _tensor(name: str, entry: Any, start: int, size: int, where: str) -> StoredTensor:
    what = f"{where}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelFileError(f"{what} should have a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _whole_numbers(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ModelFileError(
            f"{what} has the shape {shown(shape)}, where at most {_MAX_DIMENSIONS} whole numbers "
            "are needed"
        )
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelFileError(f"{what} has the offsets {shown(offsets)}, which cannot be")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UnsupportedModelError(
            f"{what} is of type {shown(dtype)}; known are {', '.join(ITEM_BYTES)}"
        )
    nbytes = ITEM_BYTES[dtype]
    for extent in shape:
        nbytes *= extent
    first, last = offsets
    if max(nbytes, last) > _MAX_SIZE or nbytes != last - first:
        raise ModelFileError(
            f"{what} has {last - first} bytes, where {shown(shape)} of {dtype} need {nbytes}"
        )
    if last > size:
        raise ModelFileError(
            f"{what} ends at byte {start + last}, but the file has {start + size} bytes: it is "
            "truncated or damaged, fetch it again"
        )
    return StoredTensor(name, dtype, tuple(shape), start + first, nbytes)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(
        type(number) is int and 0 <= number <= _MAX_SIZE for number in value
    )
