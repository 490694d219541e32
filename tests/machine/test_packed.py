"""Weights kept on disk: the second start gives the same bits, and nothing is trusted blindly."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cyclewise.machine import packed, packing
from cyclewise.machine.machine import Chunk
from cyclewise.models import load_model
from tests.models import tiny
from tests.models.tiny import Tiny

MODEL = Tiny(hidden=256, head_dim=64, feed_forward=512, layers=2, format="Q4_0", tied=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache's folder of packed weights; every model is large enough for it."""
    monkeypatch.setattr(packed, "_folder", lambda: tmp_path / "packed")
    monkeypatch.setattr(packed, "LEAST_BYTES", 0)
    monkeypatch.setattr(packed, "FREE_SHARE", 0)
    return tmp_path / "packed"


@pytest.fixture
def filled(monkeypatch):
    """Names of the matrices that were packed."""
    names, fill = [], packing.Weights._fill

    def count(self, matrix, order):
        names.append(matrix.name)
        fill(self, matrix, order)

    monkeypatch.setattr(packing.Weights, "_fill", count)
    return names


def logits(path):
    model = load_model(path, threads=1)
    pages = np.arange(model.machine.num_pages, dtype=np.int32)
    found = model.machine.step(list(range(40)), [Chunk(0, 40, 0, pages)], range(40)).copy()
    model.close()
    return found


@pytest.fixture
def path(tmp_path):
    tiny.write(tmp_path / "model.gguf", MODEL)
    return tmp_path / "model.gguf"


def only(folder) -> Path:
    (entry,) = folder.iterdir()
    return entry


def test_a_second_start_packs_nothing_and_computes_the_same(folder, path, filled):
    first = logits(path)
    assert filled and only(folder).suffix == ".packed"
    filled.clear()
    np.testing.assert_array_equal(logits(path), first)
    assert not filled
    (entry,) = packed.kept()
    assert not entry.orphaned and entry.nbytes == only(folder).stat().st_size


def test_a_changed_model_is_packed_again(folder, path, filled):
    first = logits(path)
    filled.clear()
    tiny.write(path, Tiny(**{name: getattr(MODEL, name) for name in MODEL.__slots__} | {"seed": 1}))
    assert packed.kept()[0].orphaned
    assert not np.array_equal(logits(path), first)
    assert filled and len(packed.kept()) == 1 and not packed.kept()[0].orphaned


@pytest.mark.parametrize("what", ["kernels", "target"])
def test_other_kernels_or_another_target_pack_again(folder, path, filled, what, monkeypatch):
    logits(path)
    filled.clear()
    key = packed._key
    monkeypatch.setattr(packed, "_key", lambda *a: key(*a) | {what: "another"})
    logits(path)
    assert filled


def flip(data: bytearray, at: int) -> None:
    data[at] ^= 1


def swap_pages(data: bytearray) -> None:
    first, second = data[:4096], data[8192:12288]
    assert first != second
    data[:4096], data[8192:12288] = second, first


def with_index(data: bytearray, text: bytes) -> None:
    """What the index says is another, and its digest fits."""
    _, length, _ = packed._FOOTER.unpack(data[-packed._FOOTER.size :])
    del data[-packed._FOOTER.size - length :]
    digest = hashlib.sha256(text).digest()
    data += text + packed._FOOTER.pack(b"CWPACKED", len(text), digest)


def with_changes(data: bytearray, **values: object) -> None:
    _, length, _ = packed._FOOTER.unpack(data[-packed._FOOTER.size :])
    index = json.loads(data[-packed._FOOTER.size - length : -packed._FOOTER.size])
    with_index(data, json.dumps(index | values).encode())


DAMAGES = {
    "a flipped bit": lambda data: flip(data, len(data) // 3),
    "a page of zeros": lambda data: data.__setitem__(slice(0, 4096), bytes(4096)),
    "a flipped bit of the index": lambda data: flip(data, -100),
    "no magic": lambda data: flip(data, -48),
    "a huge index": lambda data: flip(data, -34),
    "cut short": lambda data: data.__delitem__(slice(len(data) // 2, None)),
    "empty": lambda data: data.clear(),
    "longer": lambda data: data.extend(b"x" * 64),
    "pages in another order": swap_pages,
    "an index that is no object": lambda data: with_index(data, b"[]"),
    "an index without an end": lambda data: with_index(data, b"[" * 100_000),
    "an index that is no JSON": lambda data: with_index(data, b"{"),
    "an index without a key": lambda data: with_index(data, b'{"bytes": 1}'),
    "a size that is no number": lambda data: with_changes(data, bytes="4096"),
    "a size of nothing": lambda data: with_changes(data, bytes=0),
    "entries that are no list": lambda data: with_changes(data, index={"0": 1}),
    "no checksum": lambda data: with_changes(data, sums=None),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_made_again(folder, path, filled, damage):
    first = logits(path)
    filled.clear()
    entry = only(folder)
    data = bytearray(entry.read_bytes())
    damage(data)
    entry.write_bytes(data)
    packed.kept()  # lists it, whatever it holds
    np.testing.assert_array_equal(logits(path), first)
    assert filled
    filled.clear()
    np.testing.assert_array_equal(logits(path), first)
    assert not filled


def test_an_index_of_other_matrices_is_made_again(folder, path, filled, monkeypatch):
    """As if another version had asked for rows in another order."""
    first = logits(path)
    filled.clear()
    is_kept = packing.Weights._is_kept

    def differs(self, entry):
        if entry[1] == ["blk.1.attn_q.weight"]:
            entry[-1] += 1
        return is_kept(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(packing.Weights, "_is_kept", differs)
        np.testing.assert_array_equal(logits(path), first)
    assert filled[0] == "blk.1.attn_q.weight" and not list(folder.iterdir())
    np.testing.assert_array_equal(logits(path), first)
    assert len(packed.kept()) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners here")
def test_what_others_may_write_is_not_used(folder, path, filled):
    logits(path)
    only(folder).chmod(0o666)
    filled.clear()
    logits(path)
    assert filled and not only(folder).stat().st_mode & 0o022


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_what_is_no_file_is_not_waited_for(folder, path, filled):
    first = logits(path)
    entry = only(folder)
    entry.unlink()
    os.mkfifo(entry)
    np.testing.assert_array_equal(logits(path), first)
    assert entry.is_file()
    entry.unlink()
    entry.symlink_to(path)
    np.testing.assert_array_equal(logits(path), first)
    assert path.read_bytes()[:4] == b"GGUF"


LOAD = """
import sys
from pathlib import Path
from cyclewise.machine import packed, packing
from cyclewise.models import load_model
packed._folder = lambda: Path(sys.argv[2])
packed.LEAST_BYTES = packed.FREE_SHARE = 0
fill = packing.Weights._fill
def slow(self, matrix, order):
    fill(self, matrix, order)
    if sys.argv[3] in matrix.name:
        print("filled", flush=True)
        sys.stdin.read()
packing.Weights._fill = slow
load_model(sys.argv[1], threads=1).close()
"""


def loading(path, folder, until="nowhere"):
    """A process that loads the model, and waits in the middle of packing."""
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, str(path), str(folder), until],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of this kind there")
def test_what_a_killed_process_has_left_is_removed(folder, path, filled):
    with loading(path, folder, "blk.1.attn_q") as alive, loading(path, folder, "blk.1") as killed:
        for process in (alive, killed):
            assert process.stdout.readline() == b"filled\n"
        assert len(list(folder.iterdir())) == 2
        killed.kill()
        killed.wait()
        first = logits(path)  # removes what has no writer any more, and nothing else
        assert len(list(folder.iterdir())) == 2 and len(packed.kept()) == 1
        filled.clear()
        alive.stdin.close()
        assert alive.wait() == 0
    assert len(list(folder.iterdir())) == 1
    np.testing.assert_array_equal(logits(path), first)
    assert not filled


def test_an_interrupted_process_leaves_nothing(folder, path):
    with loading(path, folder, "blk.1") as process:
        assert process.stdout.readline() == b"filled\n"
        assert len(list(folder.iterdir())) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait() != 0
    assert not list(folder.iterdir())


def test_processes_that_pack_at_once(folder, path, filled):
    processes = [loading(path, folder) for _ in range(4)]
    for process in processes:
        _, error = process.communicate()
        assert process.returncode == 0, error.decode()
    assert len(list(folder.iterdir())) == 1
    logits(path)
    assert not filled


def test_a_failed_load_keeps_nothing(folder, path, monkeypatch):
    def fail(self, matrix, order):
        raise KeyboardInterrupt

    monkeypatch.setattr(packing.Weights, "_fill", fail)
    with pytest.raises(KeyboardInterrupt):
        load_model(path, threads=1)
    assert not list(folder.iterdir())


def test_a_full_disk_costs_only_the_cache(folder, path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    def interrupt(*_):
        raise KeyboardInterrupt

    first = logits(path)
    only(folder).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full, raising=False)
        np.testing.assert_array_equal(logits(path), first)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        np.testing.assert_array_equal(logits(path), first)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_model(path, threads=1)
    assert not list(folder.iterdir())
    monkeypatch.setattr(packed, "FREE_SHARE", 1)
    np.testing.assert_array_equal(logits(path), first)
    assert not list(folder.iterdir())


def test_pruning(folder, tmp_path):
    for i in range(3):
        tiny.write(tmp_path / f"{i}.gguf", MODEL)
        logits(tmp_path / f"{i}.gguf")
        for entry in packed.kept():
            if entry.path.name.startswith(f"{i}-"):
                os.utime(entry.path, (i + 1, i + 1))
    (tmp_path / "2.gguf").unlink()
    names = [entry.path.name[0] for entry in packed.kept()]
    assert names == ["0", "1", "2"] and [e.orphaned for e in packed.kept()] == [False, False, True]
    size = packed.kept()[0].nbytes
    partial = folder / ".partial-old"
    partial.write_bytes(b"")
    os.utime(partial, (0, 0))
    assert [e.path.name[0] for e in packed.prune(size)] == ["2", "0"]
    assert not partial.exists() and [e.path.name[0] for e in packed.kept()] == ["1"]
    assert [e.path.name[0] for e in packed.prune(0)] == ["1"] and not packed.kept()


def test_the_least_recently_used_makes_room(folder, tmp_path, monkeypatch):
    for i in range(2):
        tiny.write(tmp_path / f"{i}.gguf", MODEL)
    logits(tmp_path / "0.gguf")
    monkeypatch.setattr(packed, "LIMIT_BYTES", int(packed.kept()[0].nbytes * 1.5))
    os.utime(packed.kept()[0].path, (0, 0))
    logits(tmp_path / "1.gguf")
    assert [entry.path.name[0] for entry in packed.kept()] == ["1"]
