from __future__ import annotations

import numpy as np
import pytest

from cyclewise.clock import tuning as module
from cyclewise.clock.synthetic import synthetic_program
from cyclewise.clock.tuning import (
    TILES,
    choose,
    decode_seconds,
    measure_tuning,
    prefill_seconds,
    thread_candidates,
)
from cyclewise.machine.host import available_cpus
from cyclewise.machine.kernels.blocks import BLOCK_FORMATS
from cyclewise.machine.kernels.target import host_target, make_target
from cyclewise.machine.machine import Chunk, Machine


@pytest.fixture
def hasty(monkeypatch):
    for name in ("KERNEL_SECONDS", "ENGINE_SECONDS"):
        monkeypatch.setattr(module, name, 0.0)
    monkeypatch.setattr(module, "TURNS", 1)
    monkeypatch.setattr(module, "PROMPT_TOKENS", 16)
    monkeypatch.setattr(module, "KERNEL_TOKENS", 12)


def test_the_first_tiles_are_the_targets_own():
    for name, candidates in TILES.items():
        assert candidates[0] == make_target(name).token_tiles


def test_thread_candidates():
    assert [thread_candidates(n) for n in (1, 2, 4)] == [[1], [2, 1], [4, 3, 2, 1]]
    assert thread_candidates(16) == [16, 12, 8, 4, 2, 1]
    assert thread_candidates(6) == [6, 4, 3, 1]


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"default": [1.0], "slower": [1.1]}, "default"),
        ({"default": [1.0], "faster": [0.9]}, "faster"),
        ({"default": [1.0], "hardly": [0.99]}, "default"),
        ({"default": [1.0], "faster": [0.9], "fastest": [0.8]}, "fastest"),
        ({"alone": [1.0]}, "alone"),
        # The machine becomes slower and slower, and once something else came between.
        ({"default": [1.0, 2.0, 4.0, 1.0], "faster": [0.9, 1.8, 3.6, 9.0]}, "faster"),
        ({"default": [1.0, 2.0, 4.0, 9.0], "slower": [1.1, 2.2, 4.4, 1.1]}, "default"),
    ],
)
def test_a_default_gives_way_only_to_what_is_clearly_better(monkeypatch, seconds, chosen):
    monkeypatch.setattr(module, "TURNS", max(len(values) for values in seconds.values()))
    turns = {name: iter(values) for name, values in seconds.items()}
    assert choose({name: turns[name].__next__ for name in seconds}, 0.0) == chosen


def test_a_program_without_a_file_runs():
    program = synthetic_program(1, "Q8_0", ffn_gate="Q4_1")
    assert program.num_layers == 30
    machine = Machine(program.prefix(2), 1)
    assert prefill_seconds(machine, 70, 32) > 0
    assert decode_seconds(machine, 3, 70) > 0
    ids, pages = np.zeros(1, np.int32), np.arange(32, dtype=np.int32)
    assert np.isfinite(machine.step(ids, [Chunk(0, 1, 0, pages)], [0])).all()
    machine.close()


def test_the_choices_are_candidates(hasty, monkeypatch):
    best_tiles, asked = module.best_tiles, []

    def tiles(name, compilers):
        asked.append(name)
        assert best_tiles(name, compilers) in TILES[host_target().name]
        return (2, 1) if name == "Q8_0" else TILES[host_target().name][0]

    monkeypatch.setattr(module, "best_tiles", tiles)
    found = measure_tuning()
    assert found.num_threads in thread_candidates(available_cpus())
    assert found.prefill_chunk in module.CHUNKS
    assert asked == list(BLOCK_FORMATS)
    assert found.token_tiles == {"Q8_0": (2, 1)}
