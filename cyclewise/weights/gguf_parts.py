"""A GGUF model in several files, as llama.cpp's gguf-split cuts it.

In: the path of any part. Out: all of them as one source. A part is called
`NAME-00001-of-00003.gguf`; its metadata says which it is (`split.no`, from 0), of how many
(`split.count`), and how many tensors they hold together (`split.tensors.count`). What else there is
to say stands in the first. `source.py` opens GGUF files through `open_gguf`, and `sources.py`
fetches all that `part_names` names.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cyclewise.errors import ModelFileError
from cyclewise.weights.gguf import GGUFFile, Tensor
from cyclewise.weights.mapped import shown

_NAME = re.compile(r"(.+-)(\d{5})-of-(\d{5})\.gguf", re.ASCII)
_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"


def open_gguf(path: Path) -> GGUFFile | GGUFParts:
    """Opens a GGUF file, and the model's other files where it is one of several.

    Raises ModelNotFoundError, ModelFileError or UnsupportedModelError.
    """
    file = GGUFFile(path)
    count = file.metadata.get(_COUNT, 1)
    if not isinstance(count, int) or count < 2:
        return file
    with file:
        names = _NAME.fullmatch(path.name)
        if names is None or int(names[3]) != count:
            raise ModelFileError(
                f"{path}: one of {count} parts of a model, so its name should end in "
                f"-00001-of-{count:05}.gguf, or which part it is; rename it as it was"
            )
    return GGUFParts(path)


def part_names(name: str) -> list[str]:
    """The names of all parts of a model, in order, from that of any; of another file its own."""
    match = _NAME.fullmatch(name)
    if match is None or not 0 < int(match[2]) <= int(match[3]):
        return [name]
    return [f"{match[1]}{number:05}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]


class GGUFParts:
    """All parts of a model, mapped into memory; a context manager.

    Raises ModelFileError where one is missing or is not of this model, and what GGUFFile raises.
    """

    __slots__ = ("_holders", "_open", "files", "metadata", "path", "tensors")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = tuple(path.with_name(name) for name in part_names(path.name))
        missing = [file.name for file in self.files if not file.exists()]
        if missing:
            raise ModelFileError(
                f"{path}: {missing[0]} is missing, one of the model's {len(self.files)} files; "
                "fetch it"
            )
        with ExitStack() as files:
            parts = [files.enter_context(GGUFFile(file)) for file in self.files]
            self.metadata: dict[str, Any] = parts[0].metadata
            for number, part in enumerate(parts):
                _check(part, number, parts[0])
            self._holders = _holders(parts)
            self.tensors: dict[str, Tensor] = {
                name: part.tensors[name] for name, part in self._holders.items()
            }
            self._open = files.pop_all()

    @property
    def variant(self) -> str:
        """Nothing is made of the weights."""
        return ""

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """A read-only view of the tensor's `nbytes` bytes, one-dimensional; nothing is copied."""
        return self._holders[name].data(name)

    def release(self, name: str) -> None:
        """Let the operating system take back a tensor's pages; they may be read again."""
        self._holders[name].release(name)

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


def _check(part: GGUFFile, number: int, first: GGUFFile) -> None:
    """That a part is the one that its name says, and of the same model as the first."""
    found = part.metadata.get(_NUMBER)
    if found != number:
        raise ModelFileError(
            f"{part.path}: {_NUMBER} is {shown(found)} where its name needs {number}; it is another"
            " part, or was renamed"
        )
    for key in (_COUNT, _TENSORS, *part.metadata):
        ours: Any = first.metadata.get(key)
        theirs: Any = part.metadata.get(key)
        if key != _NUMBER and not np.array_equal(ours, theirs):
            raise ModelFileError(
                f"{part.path}: {key} is {shown(theirs)}, but {shown(ours)} in {first.path.name}; "
                "they are not parts of one model"
            )


def _holders(parts: list[GGUFFile]) -> dict[str, GGUFFile]:
    """Which part holds a tensor, in the order of the files."""
    holders: dict[str, GGUFFile] = {}
    for part in parts:
        for name in part.tensors:
            if name in holders:
                raise ModelFileError(
                    f"{part.path}: tensor {shown(name)} is in {holders[name].path.name} too"
                )
            holders[name] = part
    wanted, count = parts[0].metadata.get(_TENSORS), sum(part.num_tensors for part in parts)
    if wanted != count:
        raise ModelFileError(
            f"{parts[0].path}: the model's {len(parts)} files hold {count} tensors, where "
            f"{_TENSORS} says {shown(wanted)}; one of them is of another model"
        )
    return holders
