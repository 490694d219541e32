"""A server that is killed, or that finds the disk full."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.serve.test_server import end, path, start  # noqa: F401 (a fixture)
from tests.serve.toys import WAIT, wait_until

CHILDREN = Path("/proc/self/task")
linux = pytest.mark.skipif(not CHILDREN.exists(), reason="it looks into /proc")


def children(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += (task / "children").read_text().split()
    return [int(child) for child in found]


def complete(address, **fields):
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 3, **fields}
    return httpx.post(f"{address}/completions", json=body, timeout=WAIT)


def ready(address):
    return httpx.get(address.removesuffix("v1") + "ready", timeout=WAIT)


@linux
def test_a_server_that_is_killed_leaves_nothing_behind(path):  # noqa: F811
    process, address = start(path, "--threads", "2")
    kept = [socket.create_connection(("127.0.0.1", httpx.URL(address).port)) for _ in range(5)]
    assert complete(address, regex="a+").status_code == 200
    pids = children(process.pid)
    assert len(pids) == 2  # one reads prompts, one tries structures out
    process.kill()
    process.communicate(timeout=WAIT)
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    # clients that have not left do not keep the next one from the address
    again, same = start(path, "--port", str(httpx.URL(address).port), "--threads", "1")
    assert same == address
    assert complete(same).status_code == 200
    again.send_signal(signal.SIGTERM)
    assert end(again)[0] == 0
    for each in kept:
        each.close()


def is_alive(pid):
    """Whether a process runs; nobody may have asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@linux
def test_a_process_of_the_server_that_dies_is_replaced(path):  # noqa: F811
    process, address = start(path, "--threads", "1")
    assert complete(address, regex="a+").status_code == 200
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
        begin = time.monotonic()
        wait_until(lambda pid=pid: not is_alive(pid))
        statuses = {ready(address).status_code}
        wait_until(lambda: ready(address).status_code == 200)
        statuses.add(ready(address).status_code)
        assert time.monotonic() - begin < WAIT and statuses <= {200, 503}
        # whoever asks at once waits for the new one
        assert complete(address, regex="a+").status_code == 200
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_what_is_said_does_not_fit_on_the_disk(path):  # noqa: F811
    """Neither the first line nor what is logged of a failure ends the server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cyclewise", "serve", str(path), "--port", str(port)]
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen([*command, "--threads", "1"], stdout=full, stderr=full)
    address = f"http://127.0.0.1:{port}/v1"

    def answers():
        assert process.poll() is None
        try:
            return ready(address).status_code == 200
        except httpx.TransportError:
            time.sleep(0.05)
            return False

    wait_until(answers)
    assert complete(address).status_code == 200
    assert complete(address, regex="(").status_code == 400
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT) == 0


@pytest.fixture
def full_disk(tmp_path):
    """A file system with room for nothing."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(place)], capture_output=True
    )
    if made.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        with open(place / "full", "wb") as file, suppress(OSError):
            file.write(bytes(1 << 20))
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_cache_on_a_full_disk(path, full_disk, monkeypatch):  # noqa: F811
    """Kernels are compiled and weights are packed, and neither is kept."""
    monkeypatch.setenv("CYCLEWISE_CACHE", str(full_disk))
    monkeypatch.setenv("TMPDIR", str(full_disk))
    process, address = start(path, "--threads", "1")
    assert complete(address).status_code == 200
    process.send_signal(signal.SIGTERM)
    code, _, said = end(process)
    assert code == 0 and "Traceback" not in said
    assert [each.name for each in full_disk.rglob("*") if each.is_file()] == ["full"]
