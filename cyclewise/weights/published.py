"""Published layouts of quantized matrices: GPTQ, AWQ and compressed-tensors.

In: `quantization_config` and the tensors of a module, as a Hugging Face directory has them. Out:
matrices in blocks of ours (`formats.py`: I4_128 and its like), whose codes, scales and zero points
are those of the file. Called by `directory.py`. In each layout a weight is
`scale * (code - zero_point)`, with one scale and zero point for a group of columns of a row:

    GPTQ     `qweight` (columns / per word, rows), words of codes along the columns; `qzeros`
             (groups, rows / per word) and `scales` (groups, rows). What is stored of a zero point
             is one less, but in checkpoint_format gptq_v2. `g_idx`: the group of each column.
    AWQ      gemm: `qweight` (columns, rows / 8), `qzeros` (groups, rows / 8), `scales` (groups,
             rows). In a word, row r of 8 is the half byte [0, 4, 1, 5, 2, 6, 3, 7][r].
    compressed-tensors
             pack-quantized: `weight_packed` (rows, columns / per word), `weight_scale` (rows,
             groups), `weight_zero_point` (rows / per word, groups), `weight_shape`.
             int-quantized: `weight` of signed bytes, `weight_scale` and `weight_zero_point`.

Where the columns of a group are no neighbours (act-order: they were quantized in the order of their
importance), no block of ours could share a scale, and the weights are quantized again, to Q8_0.

Words are int32, the first code in the lowest bits. Our blocks have float16 scales. Those of
bfloat16 files are float16 too from 2**-17 (8e-6) upwards; a scale that is not is rounded, which
changes it by at most 2**-11 of itself where it is above 2**-14, and below that by at most 2**-25.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cyclewise.errors import ModelFileError, UnsupportedModelError
from cyclewise.weights.formats import FORMATS, Format
from cyclewise.weights.mapped import shown
from cyclewise.weights.quantize import quantize_rows
from cyclewise.weights.safetensors import SafetensorsFile

Bytes = npt.NDArray[np.uint8]
Files = Mapping[str, SafetensorsFile]
"""Which file holds a tensor of a module, by the last part of its name."""

IGNORED = ("input_scale", "input_zero_point", "input_global_scale", "output_scale")
"""Scales of activations that were chosen beforehand; here each token has its own."""

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_BLOCKS = (128, 64, 32)
_HALF_MAX = 65504.0
_INSTEAD = (
    "take the float weights, a GGUF file, or a version in GPTQ (4 or 8 bits), AWQ (gemm, 4 bits) "
    "or compressed-tensors (pack-quantized of 4 or 8 bits, int-quantized of 8)"
)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix of integers: what is known of it without reading it, and how its rows are had."""

    rows: int
    columns: int
    bits: int  # 4 or 8
    group_size: int  # columns of a row that share a scale
    codes: Callable[[int, int], Bytes]
    """Of rows first (a multiple of 8) to last, the last excluded: unsigned, (rows, columns)."""
    scales: Callable[[], npt.NDArray[np.float32]]  # (rows, groups)
    zero_points: Callable[[], Bytes]  # (rows, groups), unsigned
    scattered: npt.NDArray[np.int64] | None
    """The group of each column, where the columns of a group are no neighbours."""

    @property
    def format(self) -> Format:
        """The widest blocks that groups are made of; Q8_0 where they are scattered."""
        if self.scattered is not None:
            return FORMATS["Q8_0"]
        block = next(block for block in _BLOCKS if self.group_size % block == 0)
        return FORMATS[f"I{self.bits}_{block}"]

    @property
    def row_bytes(self) -> int:
        return self.columns // self.format.block_size * self.format.block_bytes

    def writer(self) -> Callable[[int, int], Bytes]:
        """What writes rows first to last in blocks, (rows, row bytes), as `codes` takes them."""
        if self.scattered is not None:
            return self._again()
        block = self.format.block_size
        repeats = self.group_size // block
        scales = np.repeat(self.scales().astype(np.float16), repeats, axis=1)
        zero_points = np.repeat(self.zero_points(), repeats, axis=1)

        def write(first: int, last: int) -> Bytes:
            codes = self.codes(first, last).reshape(last - first, -1, block)
            out = np.empty((*codes.shape[:2], self.format.block_bytes), np.uint8)
            out[..., :2] = scales[first:last, :, None].view(np.uint8)
            if self.bits == 8:
                out[..., 2] = zero_points[first:last] ^ 0x80
                out[..., 3:] = codes ^ 0x80
            else:
                out[..., 2] = zero_points[first:last]
                halves = codes.reshape(*codes.shape[:2], -1, 2, 16)
                packed = halves[..., 0, :] | (halves[..., 1, :] << 4)
                out[..., 3:] = packed.reshape(*codes.shape[:2], -1)
            return out.reshape(last - first, -1)

        return write

    def _again(self) -> Callable[[int, int], Bytes]:
        """What quantizes rows once more."""
        scales, zero_points = self.scales(), self.zero_points().astype(np.float32)

        def write(first: int, last: int) -> Bytes:
            values = self.codes(first, last) - zero_points[first:last, self.scattered]
            return quantize_rows(values * scales[first:last, self.scattered], "Q8_0")

        return write


class Layout:
    """What a `quantization_config` says about the matrices that are quantized."""

    def __init__(self, method: str, bits: int, group_size: int, zero_offset: int) -> None:
        self.method = method
        self.bits = bits
        self.group_size = group_size
        """-1: one group a row."""
        self.zero_offset = zero_offset
        """What is added to a zero point as it is stored."""

    def holds(self, files: Files) -> bool:
        """Whether a module's tensors are a quantized matrix; modules may be left out."""
        return any(kind in files for kind in ("qweight", "weight_packed", "weight_scale"))

    def matrix(self, module: str, files: Files) -> tuple[Matrix, tuple[str, ...]]:
        """A module's matrix, and which of its tensors that is made of.

        Raises ModelFileError where they do not fit each other and UnsupportedModelError for groups
        of a size that is not read here.
        """
        tensors = _Tensors(module, files)
        if self.method == "compressed-tensors":
            read = _packed if "weight_packed" in files else _bytes
            matrix = read(tensors)
        else:
            matrix = (_gptq if self.method == "gptq" else _awq)(tensors, self)
        size = 32 if matrix.scattered is not None else matrix.group_size
        if matrix.columns % size or size % 32:
            raise UnsupportedModelError(
                f"{tensors.where}: groups of {size} of {matrix.columns} columns are "
                f"not supported, only whole ones of a multiple of 32; {_INSTEAD}"
            )
        return matrix, tuple(tensors.used)


def read_layout(config: Mapping[str, Any], where: str) -> Layout | None:
    """The layout that a config.json names; None where the weights are not quantized.

    Raises UnsupportedModelError, by name and with what to do, for any that is not known here.
    """
    settings = config.get("quantization_config")
    if settings is None:
        settings = config.get("compression_config")
    if settings is None:
        return None
    where = f"{where}: quantization_config"
    settings = _object(settings, where)
    method = settings.get("quant_method")
    match method:
        case "gptq":
            return _read_gptq(settings, where)
        case "awq":
            version = settings.get("version", settings.get("format")) or "gemm"
            if str(version).lower() != "gemm":
                raise _unsupported(where, f"AWQ's version {shown(version)}")
            bits, size = settings.get("bits", settings.get("w_bit")), settings.get("group_size")
            size = settings.get("q_group_size") if size is None else size
            return Layout("awq", _bits(where, "AWQ", bits, (4,)), _group_size(where, size), 0)
        case "compressed-tensors":
            _check_compressed(settings, where)
            return Layout("compressed-tensors", 0, 0, 0)
    raise _unsupported(where, f"quantization by {shown(method)}")


def _unsupported(where: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{where}: {what} is not supported; {_INSTEAD}")


def _bits(where: str, name: str, bits: object, known: tuple[int, ...]) -> int:
    if type(bits) is not int or bits not in known:
        raise _unsupported(where, f"{name} with bits: {shown(bits)}")
    return bits


def _group_size(where: str, size: object) -> int:
    if type(size) is not int or (size < 1 and size != -1):
        raise ModelFileError(f"{where}: group_size should be a whole number, not {shown(size)}")
    return size


def _read_gptq(settings: Mapping[str, Any], where: str) -> Layout:
    kind = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if settings.get("is_marlin_format"):
        kind = "marlin"
    if kind not in ("gptq", "gptq_v2"):
        raise _unsupported(where, f"GPTQ's checkpoint_format {shown(kind)}")
    bits = _bits(where, "GPTQ", settings.get("bits"), (4, 8))
    return Layout("gptq", bits, _group_size(where, settings.get("group_size")), kind == "gptq")


def _check_compressed(settings: Mapping[str, Any], where: str) -> None:
    sparse = _object(settings.get("sparsity_config") or {}, f"{where}: sparsity_config")
    if sparse.get("format", "dense") != "dense":
        raise _unsupported(where, f"compressed-tensors' sparse format {shown(sparse['format'])}")
    groups = _object(settings.get("config_groups"), f"{where}: config_groups")
    for name, each in groups.items():
        inside = f"{where}: config_groups: {shown(name)}"
        group = _object(each, inside)
        weights = _object(group.get("weights") or {}, inside)
        kind = group.get("format") or settings.get("format")
        if kind not in ("pack-quantized", "int-quantized", "naive-quantized"):
            raise _unsupported(where, f"compressed-tensors' format {shown(kind)}")
        known = (4, 8) if kind == "pack-quantized" else (8,)
        _bits(where, f"compressed-tensors' {kind}", weights.get("num_bits"), known)
        if weights.get("type", "int") != "int":
            raise _unsupported(where, f"compressed-tensors' type {shown(weights['type'])}")


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ModelFileError(f"{where} should be an object, not {shown(value)}")
    return value


class _Tensors:
    """A module's tensors, checked as they are asked for."""

    def __init__(self, module: str, files: Files) -> None:
        self._module = module
        self._files = files
        self.used: list[str] = []
        self.where = f"{next(iter(files.values())).path}: {shown(module)}"

    def __contains__(self, kind: str) -> bool:
        return kind in self._files

    def shape(self, kind: str, dtypes: tuple[str, ...], dimensions: int = 2) -> tuple[int, ...]:
        """The shape of a tensor that has to be there, of one of these types."""
        if kind not in self._files:
            raise ModelFileError(f"{self.where}: tensor {kind} is missing")
        tensor = self._files[kind].tensors[f"{self._module}.{kind}"]
        if tensor.dtype not in dtypes or len(tensor.shape) != dimensions or 0 in tensor.shape:
            raise self.wrong(
                kind, f"{dimensions} dimensions of {' or '.join(dtypes)}",
                f"{shown(tensor.shape)} of {tensor.dtype}",
            )  # fmt: skip
        self.used.append(kind)
        return tensor.shape

    def require(self, kind: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        found = self.shape(kind, dtypes, len(shape))
        if found != shape:
            raise self.wrong(kind, f"the shape {shape}", shown(found))

    def wrong(self, kind: str, wanted: str, found: str) -> ModelFileError:
        return ModelFileError(f"{self.where}: tensor {kind} should have {wanted}, not {found}")

    def dimensions(self, kind: str) -> int:
        return len(self._files[kind].tensors[f"{self._module}.{kind}"].shape)

    def dtype(self, kind: str) -> str:
        return self._files[kind].tensors[f"{self._module}.{kind}"].dtype

    def values(self, kind: str) -> npt.NDArray[Any]:
        return self._files[kind].values(f"{self._module}.{kind}")

    def scales(self, kind: str) -> npt.NDArray[np.float32]:
        values = self.values(kind).astype(np.float32)
        if not (np.abs(values) <= _HALF_MAX).all():
            raise ModelFileError(f"{self.where}: {kind} holds a scale that is no float16 number")
        return values

    def scattered(
        self, kind: str, columns: int, group_size: int, groups: int
    ) -> npt.NDArray[np.int64] | None:
        """The group of each column, if a tensor says so and the columns of one are no neighbours.

        A tensor of -1 says nothing.
        """
        if kind not in self:
            return None
        self.require(kind, ("I32", "I64"), (columns,))
        found = self.values(kind).astype(np.int64)
        if (found == -1).all() or np.array_equal(found, np.arange(columns) // group_size):
            return None
        if found.min() < 0 or found.max() >= groups:
            raise ModelFileError(
                f"{self.where}: {kind} holds a group that is none of the {groups} there are"
            )
        return found


_SCALES = ("F16", "BF16", "F32")


def _gptq(tensors: _Tensors, layout: Layout) -> Matrix:
    bits, per_word = layout.bits, 32 // layout.bits
    words, rows = tensors.shape("qweight", ("I32",))
    columns = words * per_word
    size = columns if layout.group_size == -1 else layout.group_size
    groups = -(-columns // size)
    tensors.require("scales", _SCALES, (groups, rows))
    tensors.require("qzeros", ("I32",), (groups, -(-rows // per_word)))
    scattered = tensors.scattered("g_idx", columns, size, groups)

    def codes(first: int, last: int) -> Bytes:
        return _unpacked(tensors.values("qweight")[:, first:last].T, bits)

    def zero_points() -> Bytes:
        stored = _unpacked(tensors.values("qzeros"), bits)[:, :rows].T
        return (stored + np.uint8(layout.zero_offset)) & np.uint8((1 << bits) - 1)

    return Matrix(
        rows, columns, bits, size, codes, lambda: tensors.scales("scales").T, zero_points, scattered
    )  # fmt: skip


def _awq(tensors: _Tensors, layout: Layout) -> Matrix:
    columns, words = tensors.shape("qweight", ("I32",))
    rows = words * 8
    size = columns if layout.group_size == -1 else layout.group_size
    groups = -(-columns // size)
    tensors.require("scales", _SCALES, (groups, rows))
    tensors.require("qzeros", ("I32",), (groups, words))

    def in_order(stored: npt.NDArray[np.int32]) -> Bytes:
        placed = _unpacked(stored, 4).reshape(len(stored), -1, 8)
        return placed[..., _AWQ_PLACES].reshape(len(stored), -1).T

    def codes(first: int, last: int) -> Bytes:
        return in_order(tensors.values("qweight")[:, first // 8 : last // 8])

    return Matrix(
        rows, columns, 4, size, codes, lambda: tensors.scales("scales").T,
        lambda: in_order(tensors.values("qzeros")), None,
    )  # fmt: skip


def _packed(tensors: _Tensors) -> Matrix:
    """compressed-tensors' pack-quantized."""
    _, words = tensors.shape("weight_packed", ("I32",))
    tensors.require("weight_shape", ("I64", "I32"), (2,))
    rows, columns = (int(each) for each in tensors.values("weight_shape"))
    bits = next((bits for bits in (4, 8) if -(-columns * bits // 32) == words), 0)
    if bits == 0:
        raise tensors.wrong("weight_packed", f"rows of {columns} codes", f"{words} words")
    tensors.require("weight_packed", ("I32",), (rows, words))
    size, scattered = _groups(tensors, rows, columns)

    def codes(first: int, last: int) -> Bytes:
        return _unpacked(tensors.values("weight_packed")[first:last], bits)[:, :columns]

    return Matrix(
        rows, columns, bits, size, codes, lambda: _by_rows(tensors.scales("weight_scale"), rows),
        _zero_points(tensors, rows, columns // size, bits), scattered,
    )  # fmt: skip


def _bytes(tensors: _Tensors) -> Matrix:
    """compressed-tensors' int-quantized."""
    rows, columns = tensors.shape("weight", ("I8",))
    size, scattered = _groups(tensors, rows, columns)

    def codes(first: int, last: int) -> Bytes:
        stored: npt.NDArray[np.int8] = tensors.values("weight")[first:last]
        return stored.view(np.uint8) ^ np.uint8(0x80)

    return Matrix(
        rows, columns, 8, size, codes, lambda: _by_rows(tensors.scales("weight_scale"), rows),
        _zero_points(tensors, rows, columns // size, 8), scattered,
    )  # fmt: skip


def _groups(tensors: _Tensors, rows: int, columns: int) -> tuple[int, npt.NDArray[np.int64] | None]:
    """Their size, from the number of scales of a row (one scale may be the whole matrix's), and the
    group of each column where they are scattered.
    """
    if "weight_scale" not in tensors or tensors.dimensions("weight_scale") < 2:
        tensors.require("weight_scale", _SCALES, (1,))
        size = columns
    else:
        of_rows, groups = tensors.shape("weight_scale", _SCALES)
        if of_rows not in (1, rows) or columns % groups:
            raise tensors.wrong("weight_scale", f"scales of {rows} rows", f"({of_rows}, {groups})")
        size = columns // groups
    return size, tensors.scattered("weight_g_idx", columns, size, columns // size)


def _by_rows(values: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    values = values.reshape(-1, values.shape[-1])
    return np.broadcast_to(values, (rows, values.shape[1]))


def _zero_points(tensors: _Tensors, rows: int, groups: int, bits: int) -> Callable[[], Bytes]:
    """Signed in the file, as codes are there: half of the range is added. None: they are 0."""
    kind, half, per_word = "weight_zero_point", 1 << (bits - 1), 32 // bits
    if kind not in tensors:
        return lambda: np.full((rows, groups), half, np.uint8)
    if tensors.dtype(kind) == "I32":
        tensors.require(kind, ("I32",), (-(-rows // per_word), groups))
        return lambda: _unpacked(tensors.values(kind).T, bits)[:, :rows].T
    if tensors.dimensions(kind) == 1:
        tensors.require(kind, ("I8",), (1,))
    elif tensors.shape(kind, ("I8",)) not in ((rows, groups), (1, 1)):
        raise tensors.wrong(kind, f"the shape {(rows, groups)}", "another one")

    def whole() -> Bytes:
        stored: npt.NDArray[np.int8] = tensors.values(kind)
        return _by_rows(stored.view(np.uint8) + np.uint8(half), rows)

    return whole


def _unpacked(words: npt.NDArray[np.int32], bits: int) -> Bytes:
    """The codes in the words of each row, (rows, words * codes per word)."""
    stored = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stored
    codes = np.empty((*stored.shape, 2), np.uint8)
    np.bitwise_and(stored, 15, out=codes[..., 0])
    np.right_shift(stored, 4, out=codes[..., 1])
    return codes.reshape(len(stored), -1)
