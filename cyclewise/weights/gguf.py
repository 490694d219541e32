"""GGUF files: bytes on disk in, metadata and views of tensors out.

`weights/sources.py` says which file; this reader maps it, proves its header and hands it to
`models/` (shapes and bytes) and `text/` (token tables), several parts of a model through
`gguf_parts.py`. Files are hostile: every count, length and
offset is checked against the size of the file before it is used, so that nothing outside the file
is read and nothing is allocated that the file does not hold.

Versions 2 and 3, little-endian, as specified in ggml's docs/gguf.md. Arrays of arrays are refused,
as in llama.cpp.
"""

from __future__ import annotations

import itertools
import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cyclewise.errors import ModelFileError, UnsupportedModelError
from cyclewise.weights.formats import Format, format_of
from cyclewise.weights.mapped import MappedFile, shown

_STRING, _ARRAY = 8, 9
_BOOL = 7
# GGUF's number of a scalar type -> how struct and numpy call it
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_MAX_NAME_BYTES = 65_535
_MAX_DIMENSIONS = 4
_MAX_SIZE = 2**63 - 1
# The fewest bytes that one entry can take: a count beyond what the file holds is refused at once.
_MIN_METADATA_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
_EXPERTS = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))_exps\.weight")
_MAX_EXPERTS = 1024
_LENGTH = struct.Struct("<Q")
# As long as a length. ASCII, so that it neither mends nor breaks a neighbour's UTF-8; all its bytes
# differ, so that it cannot begin inside one of its own occurrences.
_SEPARATOR = bytes(range(8))


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies in a file."""

    name: str
    format: Format
    shape: tuple[int, ...]  # numpy order (rows, columns): a row's weights are consecutive
    offset: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """Everything in a GGUF file but the tensors' bytes."""

    version: int
    alignment: int
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]  # in file order
    num_tensors: int
    """As the file counts them: experts of one kind are one."""


class GGUFFile:
    """A GGUF file mapped into memory; a context manager.

    It may be one part of a model (`gguf_parts.py`). Metadata values are Python scalars, str,
    list[str], or numpy arrays for numeric arrays.

    Raises ModelNotFoundError for a missing file, ModelFileError for a damaged or unreadable one,
    and UnsupportedModelError for block formats this package cannot run.
    """

    __slots__ = ("_file", "alignment", "metadata", "num_tensors", "path", "tensors", "version")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = MappedFile(path)
        try:
            header = parse(self._file.buffer, str(self.path))
        except BaseException:
            self.close()
            raise
        self.version = header.version
        self.alignment = header.alignment
        self.metadata = header.metadata
        self.tensors = header.tensors
        self.num_tensors = header.num_tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """The file itself."""
        return (self.path,)

    @property
    def variant(self) -> str:
        """Nothing is made of the weights."""
        return ""

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """A read-only view of the tensor's `nbytes` bytes, one-dimensional; nothing is copied."""
        tensor = self.tensors[name]
        return self._file.view(tensor.offset, tensor.nbytes)

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


def parse(buffer: bytes | mmap.mmap, where: str) -> Header:
    """The proven header of the GGUF file held in `buffer`; `where` names the file in errors."""
    reader = _Reader(buffer, where)
    version = reader.preamble()
    num_tensors = reader.scalar("Q", "the number of tensors")
    num_entries = reader.scalar("Q", "the number of metadata entries")
    reader.claim(num_entries, _MIN_METADATA_BYTES, "metadata entries")
    reader.claim(num_tensors, _MIN_TENSOR_BYTES, "tensors")
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = reader.name("a metadata key")
        if key in metadata:
            raise reader.error(f"metadata key {shown(key)} occurs twice")
        metadata[key] = reader.value(f"metadata key {shown(key)}")
    alignment = _alignment(metadata, reader)
    tensors = _with_experts(_tensors(reader, num_tensors, alignment), reader)
    return Header(version, alignment, metadata, tensors, num_tensors)


class _Reader:
    """Reads forwards through a header, and proves first that what it reads lies inside."""

    __slots__ = ("buffer", "position", "size", "where")

    def __init__(self, buffer: bytes | mmap.mmap, where: str) -> None:
        self.buffer = buffer
        self.position = 0
        self.size = len(buffer)
        self.where = where

    def error(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.where}: {what}")

    def truncated(self, what: str) -> ModelFileError:
        return self.error(
            f"the file ends inside {what}: it is truncated or damaged, fetch it again"
        )

    def preamble(self) -> int:
        """Magic and version."""
        magic = self.buffer[:4]
        if magic != b"GGUF":
            raise self.error(f"not a GGUF file: it starts with {magic!r} instead of b'GGUF'")
        self.position = 4
        version = self.scalar("I", "the version")
        if version & 0xFFFF == 0 and version != 0:
            raise self.error("a big-endian GGUF file; only little-endian files can be read")
        if version not in (2, 3):
            raise self.error(f"GGUF version {version}; only versions 2 and 3 can be read")
        return int(version)

    def scalar(self, code: str, what: str) -> Any:
        layout = _LAYOUTS[code]
        end = self.position + layout.size
        if end > self.size:
            raise self.truncated(what)
        value = layout.unpack_from(self.buffer, self.position)[0]
        self.position = end
        return value

    def claim(self, count: int, size: int, what: str) -> None:
        """Prove that `count` things of at least `size` bytes can lie in the rest of the file."""
        if count * size > self.size - self.position:
            raise self.error(
                f"it claims {count} {what}, more than the file can hold: it is truncated or damaged"
            )

    def string(self, what: str) -> str:
        length = self.scalar("Q", what)
        start, end = self.position, self.position + length
        if end > self.size:
            raise self.truncated(what)
        self.position = end
        try:
            return str(self.buffer[start:end], "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not valid UTF-8") from None

    def name(self, what: str) -> str:
        name = self.string(what)
        if len(name) > _MAX_NAME_BYTES:
            raise self.error(f"{what} is longer than {_MAX_NAME_BYTES} bytes")
        return name

    def value(self, what: str) -> Any:
        kind = self.scalar("I", what)
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        code = _SCALARS.get(kind)
        if code is None:
            raise self.error(f"{what} has the unknown value type {kind}")
        return self.scalar(code, what)

    def array(self, what: str) -> Any:
        kind = self.scalar("I", what)
        count = self.scalar("Q", what)
        if kind == _STRING:
            self.claim(count, _LENGTH.size, f"strings in {what}")
            return self.strings(count, what)
        if kind == _ARRAY:
            raise self.error(f"{what} is an array of arrays, which no known model uses")
        code = _SCALARS.get(kind)
        if code is None:
            raise self.error(f"{what} is an array of the unknown value type {kind}")
        # Any byte but 0 is true, and numpy's own bool may only be 0 or 1.
        dtype = np.dtype("<u1" if kind == _BOOL else f"<{code}")
        self.claim(count, dtype.itemsize, f"values in {what}")
        stored = np.frombuffer(
            self.buffer[self.position : self.position + count * dtype.itemsize], dtype
        )
        self.position += count * dtype.itemsize
        return stored != 0 if kind == _BOOL else stored

    def strings(self, count: int, what: str) -> list[str]:
        # A vocabulary has up to a quarter of a million tokens and as many merges: most of the time
        # it takes to open a file. So the loop only follows the lengths; the strings are then cut
        # apart by one `split`, at a separator written over each length.
        buffer, position = self.buffer, self.position
        length_at = _LENGTH.unpack_from
        starts: list[int] = []
        append = starts.append
        try:
            for _ in range(count):
                append(position)
                position += 8 + length_at(buffer, position)[0]
        except (struct.error, OverflowError):
            raise self.truncated(what) from None
        if position > self.size:
            raise self.truncated(what)
        joined = np.frombuffer(buffer[self.position : position], np.uint8).copy()
        lengths_at = np.array(starts, np.int64) - self.position
        for i, byte in enumerate(_SEPARATOR):
            joined[lengths_at + i] = byte
        try:
            _, *strings = joined.tobytes().decode("utf-8").split(_SEPARATOR.decode())
        except UnicodeDecodeError:
            raise self.error(f"{what} holds a string that is not valid UTF-8") from None
        if len(strings) != count:
            raise self.error(f"{what} holds a string with {_SEPARATOR!r} in it, as no token has")
        self.position = position
        return strings


_LAYOUTS = {code: struct.Struct(f"<{code}") for code in _SCALARS.values()}


def _alignment(metadata: dict[str, Any], reader: _Reader) -> int:
    alignment = metadata.get("general.alignment", 32)
    if (
        not isinstance(alignment, int)
        or isinstance(alignment, bool)
        or alignment < 8
        or alignment & (alignment - 1)
    ):
        raise reader.error(
            f"general.alignment is {shown(alignment)}, where a power of two from 8 is needed"
        )
    return alignment


def _tensors(reader: _Reader, num_tensors: int, alignment: int) -> dict[str, Tensor]:
    entries: list[tuple[str, Format, tuple[int, ...], int, int]] = []
    for _ in range(num_tensors):
        entries.append(_tensor_entry(reader, alignment))
    data_start = -(-reader.position // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, block_format, shape, offset, nbytes in entries:
        if name in tensors:
            raise reader.error(f"tensor {shown(name)} occurs twice")
        start = data_start + offset
        if start + nbytes > reader.size:
            raise reader.error(
                f"tensor {shown(name)} ends at byte {start + nbytes}, but the file has "
                f"{reader.size} bytes: it is truncated or damaged, fetch it again"
            )
        tensors[name] = Tensor(name, block_format, shape, start, nbytes)
    in_place = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for before, after in itertools.pairwise(in_place):
        if before.offset + before.nbytes > after.offset:
            raise reader.error(f"tensors {shown(before.name)} and {shown(after.name)} overlap")
    return tensors


def _with_experts(tensors: dict[str, Tensor], reader: _Reader) -> dict[str, Tensor]:
    """The tensors with those of experts (experts, rows, columns) as one matrix for each expert."""
    found: dict[str, Tensor] = {}
    for tensor in tensors.values():
        match = _EXPERTS.fullmatch(tensor.name)
        if match is None or len(tensor.shape) != 3:
            found[tensor.name] = tensor
            continue
        count = tensor.shape[0]
        if count > _MAX_EXPERTS:
            raise UnsupportedModelError(
                f"{reader.where}: tensor {shown(tensor.name)} holds {count} experts; "
                f"at most {_MAX_EXPERTS} can be read"
            )
        nbytes = tensor.nbytes // count
        for expert in range(count):
            name, offset = f"{match[1]}.{expert}.weight", tensor.offset + expert * nbytes
            if name in tensors:
                raise reader.error(f"tensor {shown(name)} is also part of {shown(tensor.name)}")
            found[name] = Tensor(name, tensor.format, tensor.shape[1:], offset, nbytes)
    return found


def _tensor_entry(reader: _Reader, alignment: int) -> tuple[str, Format, tuple[int, ...], int, int]:
    """Name, format, shape, offset from the start of the data, and size in bytes."""
    name = reader.name("a tensor's name")
    what = f"tensor {shown(name)}"
    num_dimensions = reader.scalar("I", what)
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise reader.error(
            f"{what} has {num_dimensions} dimensions, where 1 to {_MAX_DIMENSIONS} are allowed"
        )
    sizes = tuple(reader.scalar("Q", what) for _ in range(num_dimensions))
    num_weights = 1
    for size in sizes:
        num_weights *= size
    if num_weights == 0:
        raise reader.error(f"{what} is empty: its sizes are {sizes}")
    ggml_id = reader.scalar("I", what)
    try:
        block_format = format_of(ggml_id)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{reader.where}: {what}: {error}") from None
    if sizes[0] % block_format.block_size:
        raise reader.error(
            f"{what} has rows of {sizes[0]} weights, not a multiple of "
            f"{block_format.name}'s blocks of {block_format.block_size}"
        )
    nbytes = num_weights // block_format.block_size * block_format.block_bytes
    offset = reader.scalar("Q", what)
    if max(num_weights, nbytes, offset + nbytes) > _MAX_SIZE:
        raise reader.error(f"{what} has sizes that overflow 64 bits: {sizes} at offset {offset}")
    if offset % alignment:
        raise reader.error(
            f"{what} lies at offset {offset}, not a multiple of the alignment {alignment}"
        )
    return name, block_format, sizes[::-1], offset, nbytes
