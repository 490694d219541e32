from __future__ import annotations

import numpy as np
import pytest

from cyclewise.clock import tuning as module
from cyclewise.clock.tuning import (
    TILES,
    choose,
    decode_seconds,
    meaningless_program,
    measure_tuning,
    prefill_seconds,
    retiled,
    thread_candidates,
)
from cyclewise.machine.host import available_cpus
from cyclewise.machine.kernels.target import host_target, make_target
from cyclewise.machine.machine import Chunk, Machine
from cyclewise.machine.profile import Tuning
from cyclewise.models import load_model
from tests.models import tiny
from tests.models.tiny import Tiny

MIXED = Tiny(
    hidden=256, heads=4, head_dim=64, feed_forward=512, format="Q4_0",
    formats={"ffn_gate": "Q8_0", "ffn_up": "Q8_0", "ffn_down": "Q6_K", "attn_output": "Q5_0"},
)  # fmt: skip
MODELS = {"mixed": MIXED, "floats": Tiny(format="F16")}
IDS = np.random.default_rng(0).integers(0, 100, 64).astype(np.int32)
PAGES = np.arange(8, dtype=np.int32)


def all_logits(program):
    """Of prompts of many lengths: every tile comes to work, and every rest."""
    machine = Machine(program, 2)
    found = []
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 16, 23, 29, 64):
        found.append(machine.step(IDS[:count], [Chunk(0, count, 0, PAGES)], range(count)).copy())
    machine.close()
    return np.concatenate(found)


@pytest.mark.parametrize("name", MODELS)
def test_bits_do_not_depend_on_the_tiles(tmp_path, name, monkeypatch):
    tiny.write(tmp_path / "model.gguf", MODELS[name])
    monkeypatch.setattr("cyclewise.machine.machine.available_cpus", lambda: 2)
    model = load_model(tmp_path / "model.gguf", threads=2)
    want = all_logits(model.program)
    for tiles in (*TILES[host_target().name], (12, 1)):
        program = retiled(model.program, tiles)
        changed = [
            not np.array_equal(ours.record, theirs.record)
            for ours, theirs in zip(model.program.moments, program.moments, strict=True)
        ]
        matrices = [moment.kind == "matmul" for moment in program.moments]
        own = tiles == host_target().token_tiles
        assert changed == matrices or own
        np.testing.assert_array_equal(all_logits(program), want)
    model.close()


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
    monkeypatch.setattr(module, "STAGE_SECONDS", 0.0)
    monkeypatch.setattr(module, "TURNS", max(len(values) for values in seconds.values()))
    turns = {name: iter(values * 3) for name, values in seconds.items()}
    assert choose({name: turns[name].__next__ for name in seconds}) == chosen


def test_a_program_without_a_file_runs():
    program = meaningless_program(1)
    assert program.num_layers == 30
    machine = Machine(program.prefix(2), 1)
    assert prefill_seconds(machine, 70, 32) > 0
    assert decode_seconds(machine, 3, 70) > 0
    logits = machine.step(IDS[:1], [Chunk(0, 1, 0, np.arange(32, dtype=np.int32))], [0])
    assert np.isfinite(logits).all()
    machine.close()


def test_the_choices_are_candidates(monkeypatch):
    for name, value in (("STAGE_SECONDS", 0.0), ("TURNS", 1), ("PROMPT_TOKENS", 16)):
        monkeypatch.setattr(module, name, value)
    found = measure_tuning()
    assert isinstance(found, Tuning)
    assert found.num_threads in thread_candidates(available_cpus())
    assert found.prefill_chunk in module.CHUNKS
    assert found.token_tiles in TILES[host_target().name]
