"""What packing and models read of a model's files, whatever their kind.

A source looks like a GGUF file: its metadata has GGUF's keys (`general.architecture`,
`llama.block_count`, ...) and its tensors GGUF's names (`blk.0.attn_q.weight`), so that there is one
naming behind this wall. A tensor of experts, which GGUF stores in three dimensions, is listed as
one matrix each: `blk.0.ffn_gate.3.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from cyclewise.errors import InvalidParameterError
from cyclewise.weights.formats import Format

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files that PyTorch's pickle wrote."""


class SourceTensor(Protocol):
    """One tensor, as its bytes lie in the source."""

    @property
    def name(self) -> str: ...

    @property
    def format(self) -> Format: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns), or (length,): a row's weights are consecutive."""

    @property
    def nbytes(self) -> int: ...


class Source(Protocol):
    """An open model, one file or several; a context manager."""

    @property
    def path(self) -> Path:
        """What the user named, for messages."""

    @property
    def files(self) -> Sequence[Path]:
        """Every file that it reads: as long as they do not change, neither do its tensors. None: it
        is of no file.
        """

    @property
    def variant(self) -> str:
        """What it makes of the files' weights, such as `quantize=q8_0`; empty: they are as they
        are.
        """

    @property
    def metadata(self) -> dict[str, Any]:
        """GGUF's keys; the tokenizer's tables too."""

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """By GGUF's names, in file order."""

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, one-dimensional and read-only."""

    def release(self, name: str) -> None:
        """The tensor's bytes are not needed any more."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def open_source(path: Path | str, quantize: str | None = None) -> Source:
    """Opens a GGUF file (any of a model in several), or a directory of safetensors as Hugging Face
    lays them out (named itself, or by a file of weights in it), whose float matrices are quantized
    as `quantize` says (`quantize.py`).

    Raises ModelNotFoundError, ModelFileError, UnsupportedModelError, or InvalidParameterError for
    what is not to be quantized.
    """
    path = Path(path)
    if path.name.endswith((".safetensors", ".safetensors.index.json")):
        path = path.parent
    if path.suffix in PICKLES or path.is_dir():
        from cyclewise.weights.directory import ModelDirectory, refuse_pickle

        if path.suffix in PICKLES and not path.is_dir():
            raise refuse_pickle(path)
        return ModelDirectory(path, quantize)
    if quantize is not None:
        raise InvalidParameterError(
            f"{path}: quantize={quantize} is for a Hugging Face directory of float weights; a GGUF "
            "file is run as it is"
        )
    from cyclewise.weights.gguf_parts import open_gguf

    return open_gguf(path)
