from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from cyclewise.machine.kernels.compiler import Compiler, Unit, callable_at
from cyclewise.machine.kernels.lang import I64
from cyclewise.machine.kernels.target import make_target

NAME = "test_doubling"


def doubling(emitter):
    emitter.function(NAME, 2, lambda x, out: emitter.store(out, emitter.load(x, I64) * 2, 8))


UNIT = Unit(NAME, doubling, (NAME,))


def works(compiler):
    compiler.load([UNIT])
    x, out = np.array([21], np.int64), np.zeros(1, np.int64)
    callable_at(compiler.address(NAME), 2)(x.ctypes.data, out.ctypes.data)
    return int(out[0]) == 42


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CYCLEWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(cache):
    return sorted(cache.rglob("*.o"))


def test_what_was_compiled_is_not_compiled_again(cache, capfd):
    assert works(Compiler())
    assert "compiling 1 kernels" in capfd.readouterr().err
    (file,) = kept(cache)
    before = file.stat()
    again = Compiler()
    assert works(again) and works(again)
    assert capfd.readouterr().err == ""
    assert file.stat() == before
    assert [p for p in cache.rglob("*") if p.is_file()] == [file]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "digest", "folder"])
def test_a_damaged_file_is_compiled_again(cache, capfd, damage):
    assert works(Compiler())
    (file,) = kept(cache)
    whole = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        middle = len(whole) // 2
        broken = {
            "flip": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "cut": whole[:middle],
            "empty": b"",
            "digest": bytes([whole[0] ^ 1]) + whole[1:],
        }
        file.write_bytes(broken[damage])
    capfd.readouterr()
    assert works(Compiler())
    assert "compiling 1 kernels" in capfd.readouterr().err
    if damage != "folder":
        assert file.read_bytes() == whole
    assert not [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".o"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners here")
def test_what_others_may_write_is_not_run(cache, capfd):
    assert works(Compiler())
    (file,) = kept(cache)
    file.chmod(0o666)
    capfd.readouterr()
    assert works(Compiler())
    assert "compiling 1 kernels" in capfd.readouterr().err
    assert not file.stat().st_mode & 0o022


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("CYCLEWISE_CACHE", str(blocked / "cache"))
    assert works(Compiler())
    assert blocked.read_text() == "in the way"


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_a_folder_that_may_not_be_written(cache):
    cache.mkdir()
    cache.chmod(0o500)
    assert works(Compiler())
    assert kept(cache) == []
    cache.chmod(0o700)


def test_targets_do_not_share_code(cache):
    for name in ("plain", "avx2", "avx512"):
        Compiler(make_target(name)).load([UNIT])
    assert len(kept(cache)) == 3


def test_a_kernel_that_was_not_loaded(cache):
    with pytest.raises(AssertionError, match="not loaded"):
        Compiler().address(NAME)


def test_two_processes_compile_at_once(cache):
    code = "import tests.machine.test_compiler as t; assert t.works(t.Compiler())"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(3)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
    assert len(kept(cache)) == 1
    assert works(Compiler())
