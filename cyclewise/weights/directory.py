"""Hugging Face directories as a source of weights: config.json, safetensors and what lies beside.

In: a directory. Out: metadata and tensors under GGUF's names (`source.py`), which the readers of
GGUF files understand. Weights stay as they are stored, F32, F16 or BF16, or integers in the layouts
that `published.py` reads (where it has to, it makes them Q8_0), unless float matrices are to be
quantized (`quantize.py`); only Gemma's norms gain the 1 that GGUF has added, and GPT-2's matrices
are turned round. Nothing here reads pickle: such a file is a program, and loading it runs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cyclewise.errors import (
    InvalidParameterError,
    ModelFileError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from cyclewise.weights.formats import FORMATS, Format
from cyclewise.weights.hf_config import HFConfig, read_hf_config
from cyclewise.weights.hf_files import read_object, text_metadata
from cyclewise.weights.hf_names import NameMap
from cyclewise.weights.mapped import shown
from cyclewise.weights.published import IGNORED, Files, Layout, read_layout
from cyclewise.weights.quantize import (
    QUANTIZED,
    QuantizingBar,
    as_floats,
    check_choice,
    choose_format,
    described,
    quantize_rows,
)
from cyclewise.weights.rows import make_rows
from cyclewise.weights.safetensors import ITEM_BYTES, SafetensorsFile, StoredTensor
from cyclewise.weights.source import PICKLES

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD = re.compile(r"[A-Za-z0-9_.+-]{1,200}\.safetensors")

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class DirectoryTensor:
    """A tensor under GGUF's name, and how its bytes are had."""

    name: str
    format: Format
    shape: tuple[int, ...]
    nbytes: int
    make: Callable[[], Bytes]
    stored: tuple[tuple[SafetensorsFile, str], ...]  # what it is made from


class ModelDirectory:
    """An open directory; a context manager.

    Raises ModelNotFoundError where there is none, ModelFileError where something in it is damaged
    or missing, UnsupportedModelError for another kind of model, of numbers, or of files.
    """

    def __init__(self, path: Path | str, quantize: str | None = None) -> None:
        check_choice(quantize)
        self.path = Path(path)
        self.variant = "" if quantize is None else f"quantize={quantize}"
        with ExitStack() as files:
            config = _config(self.path)
            layout = _layout(self.path, config)
            if layout is not None and quantize is not None:
                raise InvalidParameterError(
                    f"{self.path}: its weights are quantized already ({layout.method}), so they "
                    "cannot be quantized again; leave quantize out, or name the float model"
                )
            shards = _shards(self.path)
            opened = [files.enter_context(SafetensorsFile(shard)) for shard in shards]
            stored = _stored(opened, self.path)
            self.files = [self.path / "config.json", *shards]
            self.metadata: dict[str, Any] = {
                "general.name": self.path.resolve().name,
                **config.metadata,
                **text_metadata(self.path, config.values),
            }
            self.tensors: Mapping[str, DirectoryTensor] = _tensors(
                stored, config, layout, self.path
            )
            again = [each for each in self.tensors.values() if each.format.name == "Q8_0"]
            if again:
                self.metadata[QUANTIZED] = f"Q8_0 for {len(again)} matrices in act-order"
            if quantize is not None:
                self.tensors, note, bar = _quantize_floats(self.tensors, quantize)
                self.metadata[QUANTIZED] = note
                files.enter_context(bar)
            self._open = files.pop_all()

    def data(self, name: str) -> Bytes:
        """The tensor's bytes, one-dimensional and read-only."""
        return self.tensors[name].make()

    def release(self, name: str) -> None:
        """Let the operating system take back the pages that the tensor was made from."""
        for file, stored in self.tensors[name].stored:
            file.release(stored)

    def close(self) -> None:
        """Unmap the files, now or when the last view of them is gone."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def refuse_pickle(path: Path) -> UnsupportedModelError:
    """The error for a file, or a directory, whose weights are pickled."""
    return UnsupportedModelError(
        f"{path}: PyTorch's pickle files are programs that run when they are read, so they are not "
        "opened here; take the model's .safetensors files, or convert it where you trust it "
        "(transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...))"
    )


def _config(path: Path) -> HFConfig:
    values = read_object(path / "config.json")
    if values is None:
        if not path.is_dir():
            raise ModelNotFoundError(f"{path}: no such directory")
        others = sorted(each.name for each in path.glob("*.gguf"))
        if others:
            raise ModelFileError(f"{path}: a directory of GGUF files; name one, as {others[0]}")
        if (path / "adapter_config.json").exists():
            raise UnsupportedModelError(f"{path}: an adapter, not a model; name its base model")
        raise ModelFileError(f"{path}: config.json is missing, so this is no model's directory")
    return read_hf_config(values, str(path / "config.json"))


def _shards(path: Path) -> list[Path]:
    """The files of weights, each once, in order."""
    index = read_object(path / _INDEX)
    if index is not None:
        names = index.get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ModelFileError(f"{path / _INDEX}: weight_map is missing or no object")
        files = sorted({str(name) for name in names.values()})
        for file in files:
            if _SHARD.fullmatch(file) is None:
                raise ModelFileError(f"{path / _INDEX}: {shown(file)} is no name of a shard")
            if not (path / file).exists():
                raise ModelFileError(
                    f"{path}: {file} is missing, one of the model's {len(files)} shards; fetch it"
                )
        return [path / file for file in files]
    if (path / _SINGLE).exists():
        return [path / _SINGLE]
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise ModelFileError(
            f"{path}: {_INDEX} is missing, which says where in {len(found)} files a tensor lies"
        )
    if any(each.suffix in PICKLES for each in path.iterdir()):
        raise refuse_pickle(path)
    raise ModelFileError(f"{path}: there are no .safetensors files in this directory")


def _stored(files: list[SafetensorsFile], path: Path) -> dict[str, SafetensorsFile]:
    """Which file holds a tensor."""
    where: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.tensors:
            if name in where:
                raise ModelFileError(
                    f"{path}: tensor {shown(name)} is in {where[name].path.name} and in "
                    f"{file.path.name}"
                )
            where[name] = file
    index = read_object(path / _INDEX) if len(files) > 1 else None
    for name in (index or {}).get("weight_map", {}):
        if name not in where:
            raise ModelFileError(f"{path}: no shard holds tensor {shown(name)} of the index")
    return where


def _layout(path: Path, config: HFConfig) -> Layout | None:
    values = dict(config.values)
    if "quantization_config" not in values:  # where earlier versions of GPTQ's tools wrote it
        beside = read_object(path / "quantize_config.json")
        if beside is not None:
            values["quantization_config"] = {"quant_method": "gptq", **beside}
    return read_layout(values, str(path / "config.json"))


def _modules(
    stored: dict[str, SafetensorsFile], names: NameMap
) -> dict[str, dict[str, SafetensorsFile]]:
    """Each module's tensors by the last part of their names, and the files that hold them."""
    modules: dict[str, dict[str, SafetensorsFile]] = {}
    for tensor, file in stored.items():
        if not names.is_ignored(tensor):
            module, _, kind = tensor.rpartition(".")
            modules.setdefault(module, {})[kind] = file
    return modules


def _tensors(
    stored: dict[str, SafetensorsFile], config: HFConfig, layout: Layout | None, path: Path
) -> dict[str, DirectoryTensor]:
    names = NameMap(config.model_type)
    tensors: dict[str, DirectoryTensor] = {}
    for module, all_files in _modules(stored, names).items():
        files: Files = all_files
        stem = names.of_module(module)
        if stem == "output" and config.values.get("tie_word_embeddings") is True:
            continue
        found: dict[str, DirectoryTensor] = {}
        if stem is not None and layout is not None and layout.holds(files):
            found["weight"], files = _quantized(f"{stem}.weight", module, files, layout)
        for kind, file in files.items():
            source = f"{module}.{kind}"
            if stem is None or kind not in ("weight", "bias"):
                raise UnsupportedModelError(
                    f"{file.path}: a model of type {config.model_type} has no tensor "
                    f"{shown(source)} that is known here"
                )
            tensor = file.tensors[source]
            found[kind] = _tensor(f"{stem}.{kind}", file, tensor, config.model_type)
        for kind, made in found.items():
            if made.name in tensors:
                raise ModelFileError(
                    f"{path}: tensor {shown(f'{module}.{kind}')} is there under two names"
                )
            tensors[made.name] = made
    if config.values.get("tie_word_embeddings") is False and "output.weight" not in tensors:
        raise ModelFileError(f"{path}: tensor 'lm_head.weight' is missing")
    for name, factors in config.factors.items():
        tensors[name] = _constant(name, factors)
    return tensors


def _quantized(
    name: str, module: str, files: Files, layout: Layout
) -> tuple[DirectoryTensor, Files]:
    """The matrix of a quantized module, and the module's other tensors."""
    matrix, used = layout.matrix(module, files)
    rest = {kind: files[kind] for kind in files if kind not in (*used, *IGNORED)}
    # GPTQ's tools give every matrix a bias, of zeros where the model has none.
    if "bias" in rest and not rest["bias"].data(f"{module}.bias").any():
        del rest["bias"]

    def make() -> Bytes:
        return make_rows(matrix.rows, matrix.columns, matrix.row_bytes, matrix.writer())

    shape, nbytes = (matrix.rows, matrix.columns), matrix.rows * matrix.row_bytes
    stored = tuple((files[kind], f"{module}.{kind}") for kind in used)
    return DirectoryTensor(name, matrix.format, shape, nbytes, make, stored), rest


def _tensor(
    name: str, file: SafetensorsFile, tensor: StoredTensor, model_type: str
) -> DirectoryTensor:
    what = f"{file.path}: tensor {shown(tensor.name)}"
    if tensor.dtype not in ("F32", "F16", "BF16"):
        raise UnsupportedModelError(
            f"{what} is {tensor.dtype}; weights may be F32, F16, BF16, or in a published layout of "
            "GPTQ, AWQ or compressed-tensors"
        )
    if len(tensor.shape) not in (1, 2) or 0 in tensor.shape:
        raise ModelFileError(f"{what} has the shape {tensor.shape}, which no weight has")
    stored = ((file, tensor.name),)
    if model_type.startswith("gemma") and name.endswith("norm.weight"):
        return _made(
            name,
            "F32",
            tensor.shape,
            lambda: file.values(tensor.name).astype(np.float32) + 1,
            stored,
        )
    if model_type == "gpt2" and name.startswith("blk.") and len(tensor.shape) == 2:
        rows, columns = tensor.shape
        integers = np.dtype(f"u{ITEM_BYTES[tensor.dtype]}")
        return _made(
            name, tensor.dtype, (columns, rows),
            lambda: file.data(tensor.name).view(integers).reshape(rows, columns).T, stored,
        )  # fmt: skip

    def view() -> Bytes:
        data = file.data(tensor.name)
        # Kernels read whole numbers from where a number may lie.
        return data.copy() if tensor.offset % ITEM_BYTES[tensor.dtype] else data

    return DirectoryTensor(name, FORMATS[tensor.dtype], tensor.shape, tensor.nbytes, view, stored)


def _made(
    name: str, dtype: str, shape: tuple[int, ...], make: Callable[[], npt.NDArray[Any]],
    stored: tuple[tuple[SafetensorsFile, str], ...] = (),
) -> DirectoryTensor:  # fmt: skip
    nbytes = int(np.prod(shape)) * ITEM_BYTES[dtype]

    def data() -> Bytes:
        return np.ascontiguousarray(make()).reshape(-1).view(np.uint8)

    return DirectoryTensor(name, FORMATS[dtype], shape, nbytes, data, stored)


def _quantize_floats(
    tensors: Mapping[str, DirectoryTensor], choice: str
) -> tuple[dict[str, DirectoryTensor], str, QuantizingBar]:
    """The tensors with matrices quantized, what became of them in words, and the bar to show."""
    made = {name: choose_format(name, each.shape, choice) for name, each in tensors.items()}
    total = sum(prod(tensors[name].shape) for name, format_ in made.items() if format_)
    bar = QuantizingBar(choice, total)
    found = {
        name: tensor if (to := made[name]) is None else _quantized_floats(tensor, to, bar)
        for name, tensor in tensors.items()
    }
    return found, described(choice, {name: each.shape for name, each in tensors.items()}), bar


def _quantized_floats(tensor: DirectoryTensor, to: Format, bar: QuantizingBar) -> DirectoryTensor:
    rows, columns = tensor.shape
    row_bytes = columns // to.block_size * to.block_bytes

    def make() -> Bytes:
        bar.show()
        data = tensor.make().reshape(rows, -1)

        def quantized(first: int, last: int) -> Bytes:
            values = as_floats(data[first:last], tensor.format.name)
            if not np.isfinite(values).all():
                file, name = tensor.stored[0]
                raise ModelFileError(
                    f"{file.path}: tensor {shown(name)} holds a weight that is no number"
                )
            return quantize_rows(values, to.name)

        return make_rows(rows, columns, row_bytes, quantized, bar.advance)

    return replace(tensor, format=to, nbytes=rows * row_bytes, make=make)


def _constant(name: str, values: npt.NDArray[np.float32]) -> DirectoryTensor:
    return _made(name, "F32", values.shape, lambda: values)
