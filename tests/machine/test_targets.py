"""Every target that this processor can run passes the kernels' tests, each in a process of its own.
AVX-512 and AVX-VNNI do where they cannot run, too: there with stand-ins for their instructions.

Targets whose multiply-adds are fused (all but plain) agree with each other to the bit. The plain
x86 target rounds twice, as its twins do, and comes near.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cyclewise.errors import InvalidParameterError
from cyclewise.machine.kernels import (
    attention,
    experts,
    linear,
    loop,
    lora,
    matmul,
    pack,
    probes,
    rows,
    stream,
)
from cyclewise.machine.kernels.compiler import assembly
from cyclewise.machine.kernels.target import (
    ARM_SETS,
    INSTRUCTION_SETS,
    X86_SETS,
    host_target,
    host_targets,
    make_target,
)
from tests.machine.kernel_calls import BLOCK_FORMATS, FORMATS
from tests.models import tiny
from tests.models.test_models import (
    BLOCK_MODELS,
    FLOAT_MODELS,
    Runner,
    relative_error,
    token_ids,
)

ROOT = Path(__file__).parents[2]
KERNEL_TESTS = (
    "packing",
    "matmul",
    "math",
    "rows",
    "attention",
    "linear",
    "experts",
    "lora",
    "loop",
    "clocked_loop",
    "machine",
    "probe",
)
WIDTH_TESTS = ("matmul", "rows", "attention", "linear", "experts", "lora")
"""Of kernels that lanes, tiles and dot products decide."""
STAND_INS = "tests.machine.stand_ins"
UNITS = [
    *(matmul.matmul_unit(name) for name in FORMATS),
    *(pack.pack_unit(name) for name in FORMATS),
    rows.rows_unit(), linear.linear_unit(), experts.experts_unit(), attention.attention_unit(),
    lora.lora_unit(), loop.loop_unit(),
    stream.stream_unit(), loop.clocked_loop_unit(), probes.probes_unit(),
]  # fmt: skip

x86_only = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="looks for x86 instructions"
)


def tried_targets():
    """What this processor can run, if need be with stand-ins for instructions."""
    able = host_targets()
    return [*X86_SETS, "plain"] if "avx2" in able else able


@pytest.fixture(scope="module")
def other_targets():
    """The kernels' tests, running in a process for each target that is not this process's own."""
    own, able, running = host_target().name, host_targets(), {}
    for name in tried_targets():
        plugin, names = ([], KERNEL_TESTS) if name in able else (["-p", STAND_INS], WIDTH_TESTS)
        tests = [f"tests/machine/test_{name}.py" for name in names]
        command = [
            sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *plugin, *tests,
            "tests/models/test_models.py",
        ]  # fmt: skip
        if name != own:
            running[name] = subprocess.Popen(
                command, env=os.environ | {"CYCLEWISE_TARGET": name}, cwd=ROOT,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
    yield running
    for process in running.values():
        if process.returncode is None:
            process.kill()
            process.communicate()


def registers(text, name):
    return re.findall(rf"%{name}\d+", text)


# The processes of `other_targets` work while this one compiles for the next test.
@x86_only
@pytest.mark.parametrize("target", ["plain", "avx2", "avxvnni"])
def test_no_wider_register_is_used(other_targets, target):
    widest = {"plain": (), "avx2": ("ymm",), "avxvnni": ("ymm",)}[target]
    for unit in UNITS:
        text = assembly(unit, make_target(target))
        assert f"{unit.exports[0]}:" in text
        for register in ("ymm", "zmm"):
            if register not in widest:
                assert not registers(text, register), f"{unit.name} uses {register}"
        assert not re.search(r"%[xy]mm(1[6-9]|[23]\d)", text), "registers of AVX-512 alone"
        if target == "avxvnni":
            # Without the prefix the instruction would be that of AVX-512.
            assert text.count("vpdpbusd") == len(re.findall(r"\{vex\}\s+vpdpbusd", text))
            assert "vpmaddubsw" not in text
        else:
            assert "vpdpbusd" not in text


@x86_only
def test_what_that_test_would_find(other_targets):
    """The same search, where there is something: the right instructions for each target."""
    unit = matmul.matmul_unit("Q4_0")
    wide = assembly(unit, make_target("avx512"))
    assert registers(wide, "zmm") and "vpdpbusd" in wide
    narrow = assembly(unit, make_target("avx2"))
    assert registers(narrow, "ymm") and "vpmaddubsw" in narrow and "vfmadd" in narrow
    short = assembly(unit, make_target("avxvnni"))
    assert re.search(r"\{vex\}\s+vpdpbusd.*%ymm", short) and "vfmadd" in short
    assert re.search(r"%zmm(1[6-9]|[23]\d)", wide) and "{vex}" not in wide


@x86_only
def test_bfloat16_is_multiplied_where_the_processor_does(other_targets):
    able = make_target("avx512", "sapphirerapids", "+avx512bf16")
    assert able.has_bf16 and not make_target("avx512", "cascadelake", "-avx512bf16").has_bf16
    text = assembly(matmul.matmul_unit("BF16"), able)
    assert "vdpbf16ps" in text and "vcvtneps2bf16" in text and "vfmadd" not in text
    for unit, target in (("F16", able), ("BF16", make_target("avx512"))):
        text = assembly(matmul.matmul_unit(unit), target)
        assert "vdpbf16ps" not in text and "vfmadd" in text


@pytest.mark.parametrize("target", ARM_SETS)
def test_instructions_of_aarch64(other_targets, target):
    """Compiled for AArch64, wherever this runs: no library is called for what it lacks."""
    for name in FORMATS:
        text = assembly(matmul.matmul_unit(name), make_target(target))
        assert f"tile_{name}:" in text
        assert not re.search(r"\tbl\t__", text)
        if name in BLOCK_FORMATS:
            assert re.search(r"\tsdot\tv\d+\.4s, v\d+\.16b, v\d+\.4b\[\d\]", text)
            assert ("\tsmmla\t" in text) == (target == "neon_i8mm")


@pytest.mark.parametrize("target", INSTRUCTION_SETS)
def test_the_kernels_tests_pass_on_every_target(other_targets, target):
    if target not in other_targets:
        own = target == host_target().name
        pytest.skip("it is this process's own" if own else "this processor cannot run it")
    output, _ = other_targets[target].communicate(timeout=900)
    assert other_targets[target].returncode == 0, output


def write_logits(folder):
    """Logits of tiny models on this process's target, for the test below."""
    for name in ("Q4_1", "mixed", "wide_heads"):
        model = (FLOAT_MODELS | BLOCK_MODELS)[name]
        path = folder / f"{name}.gguf"
        tiny.write(path, model)
        run = Runner(path)
        np.save(folder / f"{host_target().name}-{name}.npy", run.logits(token_ids(model, 24)))
        run.model.close()


def test_targets_agree(tmp_path):
    able = tried_targets()
    code = "import sys, pathlib, tests.machine.test_targets as t; "
    code += "t.write_logits(pathlib.Path(sys.argv[1]))"
    for target in able:
        stand_ins = "" if target in host_targets() else f"import {STAND_INS}; "
        subprocess.run(
            [sys.executable, "-c", stand_ins + code, str(tmp_path)],
            env=os.environ | {"CYCLEWISE_TARGET": target}, cwd=ROOT, check=True,
        )  # fmt: skip
    for name in ("Q4_1", "mixed", "wide_heads"):
        found = [np.load(tmp_path / f"{target}-{name}.npy") for target in able]
        for target, logits in zip(able, found, strict=True):
            if target == "plain":
                assert relative_error(logits, found[0]) <= 1e-2
            else:
                np.testing.assert_array_equal(logits, found[0])


def test_a_target_that_is_not_known_or_not_possible(monkeypatch):
    monkeypatch.setenv("CYCLEWISE_TARGET", "avx1024")
    with pytest.raises(InvalidParameterError, match=r"avx512, avxvnni, avx2, .*plain"):
        host_target.__wrapped__()
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", dict)
    monkeypatch.setenv("CYCLEWISE_TARGET", "avx2")
    with pytest.raises(InvalidParameterError, match="it can run plain"):
        host_target.__wrapped__()
    monkeypatch.setenv("CYCLEWISE_TARGET", "")
    assert host_target.__wrapped__().name == "plain"
