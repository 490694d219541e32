"""Suites that others wrote, held against `cyclewise serve`: `make test-clients`.

    python -m tests.clients.run                     all of them
    python -m tests.clients.run openai schemathesis some

The suites and the clients come from the package index into `.clients`, an environment of their own.
Which tests are expected to fail, and why, stands in docs/compatibility.md alone (`deviations.py`).
Ends with one line, `N passed, N failed`; of what is expected to fail, what passes has failed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.clients import deviations, llama_server
from tests.conftest import QWEN_CODER

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = ROOT / ".clients"
PYTHON = FOLDER / "venv" / "bin" / "python"
STORIES = ROOT.parent / "shared" / "data" / "stories260K"
SOURCES = {
    "openai-3.57.0": ("openai==3.57.0", "tests"),
    "llama_cpp_python-0.3.36": ("llama-cpp-python==0.3.36", "vendor/llama.cpp/tools/server/tests"),
}
"""The folder that a source distribution holds: what pip calls it, and what is used of it."""
KEY = "sk-the-key-of-local-tests"
SCOPES = ("fixture", "test")  # of pytest-asyncio: LangChain's client keeps to one event loop
START_SECONDS = 300.0  # with kernels to compile and a model to fetch


@dataclass(slots=True)
class Count:
    """What came of a suite's tests."""

    passed: int = 0
    failed: int = 0
    deviating: int = 0
    skipped: int = 0


def prepare() -> None:
    """Make the environment, where it is not there or is of other versions."""
    wanted = (HERE / "requirements.txt").read_text() + repr(SOURCES)
    ready = FOLDER / "ready"
    if ready.exists() and ready.read_text() == wanted:
        return
    print("setting up .clients", flush=True)
    ready.unlink(missing_ok=True)
    venv.create(FOLDER / "venv", with_pip=True, clear=True)
    pip("install", "--requirement", str(HERE / "requirements.txt"))
    for folder, (package, used) in SOURCES.items():
        # built without isolation: the build systems are there, and nothing is compiled
        source = ("--no-deps", "--no-binary", ":all:", "--no-build-isolation", package)
        pip("download", *source, "--dest", str(FOLDER))
        with tarfile.open(FOLDER / f"{folder}.tar.gz") as archive:
            inside = (f"{folder}/{used}/", f"{folder}/pyproject.toml")
            members = [each for each in archive.getmembers() if each.name.startswith(inside)]
            archive.extractall(FOLDER, members, filter="data")
    ready.write_text(wanted)


def pip(*arguments: str) -> None:
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([PYTHON, "-m", "pip", *arguments, "-qq"], check=True, env=environment)


@contextmanager
def server(model: str, *arguments: str) -> Iterator[str]:
    """The address of a server that is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cyclewise", "serve", model, "--port", str(port), *arguments]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        end = time.monotonic() + START_SECONDS
        while not _lives(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server of {model} did not start")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _lives(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def pytest(suite: str, folder: Path, *arguments: str, **variables: str) -> Count:
    """Run tests, those that deviate as expected failures."""
    report = FOLDER / f"{suite}.xml"
    report.unlink(missing_ok=True)
    environment = {**os.environ, **variables, "SUITE": suite, "PYTHONPATH": str(HERE)}
    command = [PYTHON, "-m", "pytest", "-p", "deviations", "-p", "no:cacheprovider", "-q"]
    command += ["--tb=short", f"--junit-xml={report}", *arguments]
    ended = subprocess.run(command, cwd=folder, env=environment).returncode
    if ended not in (0, 1) or not report.exists():  # 1: some tests failed
        return Count(failed=1)
    return _read(report)


def _read(report: Path) -> Count:
    count = Count()
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag: child for child in case}
        if "failure" in kinds or "error" in kinds:
            count.failed += 1
        elif "skipped" not in kinds:
            count.passed += 1
        elif kinds["skipped"].get("type") == "pytest.xfail":
            count.deviating += 1
        else:
            count.skipped += 1
    return count


def openai() -> Count:
    """The `openai` client's tests of the routes that are served, under the names that they send."""
    tests = ("test_completions.py", "chat/test_completions.py", "test_models.py")
    names = ("--name", "gpt-6-astra", "--name", "gpt-3.5-turbo-instruct")
    with server(stories(), *names, "--context", "256") as address:
        return pytest(
            "openai", FOLDER / "openai-3.57.0", "--override-ini=addopts=",
            *(f"tests/api_resources/{each}" for each in tests), TEST_API_BASE_URL=f"{address}/v1",
        )  # fmt: skip


def llama() -> Count:
    """llama.cpp's tests of its server, with `llama_server.py` in the server's place."""
    if not STORIES.is_dir():
        print("llama: stories260K is not beside this checkout, and the tests fetch it from a hub")
        return Count(skipped=1)
    shim = FOLDER / "llama-server"
    run = f'PYTHONPATH="{ROOT}" STORIES260K="{STORIES}" exec "{sys.executable}"'
    shim.write_text(f'#!/bin/sh\n{run} -m tests.clients.llama_server "$@"\n')
    shim.chmod(0o755)
    folder = FOLDER / "llama_cpp_python-0.3.36" / "vendor/llama.cpp/tools/server/tests"
    tests = ("basic", "chat_completion", "completion", "security", "tokenize")
    return pytest(
        "llama", folder, "-n", "2", "-p", "no:asyncio",
        *(f"unit/test_{each}.py" for each in tests), LLAMA_SERVER_BIN_PATH=str(shim),
    )  # fmt: skip


def langchain() -> Count:
    """LangChain's tests of a chat model."""
    with server(QWEN_CODER, "--name", "qwen", "--api-key-file", keys()) as address:
        return pytest(
            "langchain", HERE, "--config-file=/dev/null", "--rootdir=.", "--confcutdir=.",
            "--override-ini=asyncio_mode=auto",
            *(f"--override-ini=asyncio_default_{each}_loop_scope=session" for each in SCOPES),
            "langchain_suite.py", TEST_API_BASE_URL=f"{address}/v1", TEST_API_KEY=KEY,
        )  # fmt: skip


def schemathesis() -> Count:
    """What schemathesis makes of `/openapi.json`; checks that deviate must find something."""
    left_out = list(deviations.read(deviations.DOCUMENT.read_text())["schemathesis"])
    limits = ("--context", "64", "--parallel", "32", "--api-key-file", keys())
    with server(stories(), *limits) as address:
        report = FOLDER / "schemathesis.xml"
        report.unlink(missing_ok=True)
        given = ["--checks=all", *(f"--exclude-checks={each}" for each in left_out)]
        _schemathesis(address, *given, "--report=junit", f"--report-junit-path={report}")
        count = _read(report) if report.exists() else Count(failed=1)
        for check in left_out:
            some = ("--include-path=/tokenize", "--include-path=/detokenize")  # it ends soon
            if _schemathesis(address, f"--checks={check}", *some):
                count.deviating += 1
            else:
                print(f"schemathesis: {check} finds nothing any more")
                count.failed += 1
    return count


def _schemathesis(address: str, *arguments: str) -> int:
    command = [PYTHON.with_name("st"), "run", f"{address}/openapi.json", "--continue-on-failure"]
    command += ["--header", f"Authorization: Bearer {KEY}", "--request-timeout=120"]
    command += ["--max-examples=10", "--seed=1", "--no-shrink", "--suppress-health-check=all"]
    return subprocess.run([*command, *arguments], cwd=FOLDER).returncode


def stories() -> str:
    """A model whose answers cost next to nothing, or a small one where it is not to be had."""
    if not STORIES.is_dir():
        return "smollm2"
    path = FOLDER / "stories260K.gguf"
    llama_server.write_stories(STORIES, path, llama_server.CHATML)
    return str(path)


def keys() -> str:
    """A file with the key of the tests."""
    path = FOLDER / "keys"
    path.write_text(KEY)
    return str(path)


SUITES: dict[str, Callable[[], Count]] = {
    "openai": openai, "llama": llama, "langchain": langchain, "schemathesis": schemathesis,
}  # fmt: skip


def main(names: list[str]) -> int:
    """Run the suites of these names; 1 if a test failed."""
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        print(f"no suite is called {unknown[0]}; there are {', '.join(SUITES)}", file=sys.stderr)
        return 2
    prepare()
    counts = {name: SUITES[name]() for name in names or SUITES}
    for name, count in counts.items():
        print(f"{name}: {count.passed} as the suite wants, {count.deviating} deviations, "
              f"{count.failed} failed, {count.skipped} skipped")  # fmt: skip
    passed = sum(count.passed for count in counts.values())
    failed = sum(count.failed for count in counts.values())
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
