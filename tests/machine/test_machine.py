from __future__ import annotations

import threading

import numpy as np
import pytest

from cyclewise.engine.engine import Engine
from cyclewise.errors import InvalidParameterError
from cyclewise.machine.host import available_cpus
from cyclewise.machine.kernels.compiler import callable_at, host_compiler
from cyclewise.machine.kernels.layout import LINEAR, LINEAR_PART
from cyclewise.machine.kernels.linear import MAX_BATCH_TOKENS
from cyclewise.machine.kernels.loop import STOP
from cyclewise.machine.machine import Chunk, Machine, resolve_threads
from cyclewise.machine.profile import Tuning
from cyclewise.models import load_model
from tests.models import tiny
from tests.models.tiny import Tiny

MODEL = Tiny(layers=3)
PAGES = np.arange(8, dtype=np.int32)
IDS = np.random.default_rng(0).integers(0, MODEL.vocab, 60).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("machine") / "model.gguf"
    tiny.write(path, MODEL)
    return path


@pytest.fixture
def machine(path):
    model = load_model(path, threads=2)
    yield model.machine
    model.close()


def logits(machine):
    """Of 20 tokens at once, then 40 one by one."""
    found = [machine.step(IDS[:20], [Chunk(0, 20, 0, PAGES)], range(20)).copy()]
    for at in range(20, 60):
        found.append(machine.step(IDS[at : at + 1], [Chunk(0, 1, at, PAGES)], [0]).copy())
    return np.concatenate(found)


def alive():
    return {t for t in threading.enumerate() if t.name.startswith("cyclewise-")}


def test_closing_ends_the_threads(path, monkeypatch):
    monkeypatch.setattr("cyclewise.machine.machine.available_cpus", lambda: 3)
    monkeypatch.setattr("cyclewise.machine.host.available_cpus", lambda: 3)
    before = alive()
    model = load_model(path, threads=3)
    assert len(alive() - before) == 2
    model.machine.step(IDS, [Chunk(0, 60, 0, PAGES)], [])
    model.close()
    assert alive() == before
    model.close()


def test_closing_before_any_step(path):
    before = alive()
    load_model(path, threads=2).close()
    assert alive() == before


def test_several_machines_at_once(path):
    """Eight threads on two cores: whoever sleeps, the logits are the same to the bit."""
    alone = load_model(path, threads=1)
    want = logits(alone.machine)
    alone.close()
    models = [load_model(path, threads=2) for _ in range(4)]
    wrong = []

    def run(machine):
        for _ in range(8):
            if not np.array_equal(logits(machine), want):
                wrong.append(machine)

    callers = [threading.Thread(target=run, args=(model.machine,)) for model in models]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for model in models:
        model.close()
    assert not wrong


def test_steps_of_any_size_follow_each_other(machine):
    """A replicated step's private buffers and a large step's shared ones do not meet."""
    want = logits(machine)
    rng = np.random.default_rng(1)
    for _ in range(40):
        at, count = int(rng.integers(0, 20)), int(rng.integers(1, 21))
        count = min(count, 20 - at)
        got = machine.step(IDS[at : at + count], [Chunk(0, count, at, PAGES)], range(count))
        np.testing.assert_array_equal(got, want[at : at + count])


def with_pages(*pages, dtype=np.int32):
    return np.array(pages, dtype)


BAD = {
    "nothing": ([], [], []),
    "too_many": (IDS * 9, [Chunk(0, 540, 0, PAGES)], [0]),
    "token_negative": ([3, -1], [Chunk(0, 2, 0, PAGES)], [0]),
    "token_beyond_the_vocabulary": ([3, 100], [Chunk(0, 2, 0, PAGES)], [0]),
    "no_chunk": (IDS[:4], [], [0]),
    "chunks_end_early": (IDS[:4], [Chunk(0, 3, 0, PAGES)], [0]),
    "chunks_end_late": (IDS[:4], [Chunk(0, 5, 0, PAGES)], [0]),
    "a_gap": (IDS[:4], [Chunk(0, 1, 0, PAGES), Chunk(2, 2, 40, PAGES)], [0]),
    "an_overlap": (IDS[:4], [Chunk(0, 3, 0, PAGES), Chunk(2, 2, 40, PAGES)], [0]),
    "an_empty_chunk": (IDS[:4], [Chunk(0, 0, 0, PAGES), Chunk(0, 4, 0, PAGES)], [0]),
    "a_negative_chunk": (IDS[:4], [Chunk(0, -1, 0, PAGES), Chunk(-1, 5, 0, PAGES)], [0]),
    "position_negative": (IDS[:4], [Chunk(0, 4, -1, PAGES)], [0]),
    "beyond_the_context": (IDS[:4], [Chunk(0, 4, 253, np.zeros(9, np.int32))], [0]),
    "too_few_pages": (IDS[:4], [Chunk(0, 4, 30, with_pages(5))], [0]),
    "no_pages": (IDS[:1], [Chunk(0, 1, 0, with_pages())], [0]),
    "page_negative": (IDS[:4], [Chunk(0, 4, 30, with_pages(5, -1))], [0]),
    "page_beyond_the_cache": (IDS[:4], [Chunk(0, 4, 30, with_pages(8, 5))], [0]),
    "pages_of_64_bits": (IDS[:4], [Chunk(0, 4, 0, with_pages(0, dtype=np.int64))], [0]),
    "pages_with_holes": (IDS[:4], [Chunk(0, 4, 31, PAGES[::2])], [0]),
    "logit_row_negative": (IDS[:4], [Chunk(0, 4, 0, PAGES)], [-1]),
    "logit_row_beyond_the_batch": (IDS[:4], [Chunk(0, 4, 0, PAGES)], [0, 4]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_batch_is_refused_before_any_kernel_runs(machine, name):
    want = machine.step(IDS[:20], [Chunk(0, 20, 0, PAGES)], range(20))
    kept = want.copy()
    with pytest.raises(InvalidParameterError):
        machine.step(*BAD[name])
    np.testing.assert_array_equal(want, kept)
    # And the cache is as it was.
    after = machine.step(IDS[20:21], [Chunk(0, 1, 20, PAGES)], [0]).copy()
    machine.step(IDS[:20], [Chunk(0, 20, 0, PAGES)], [])
    again = machine.step(IDS[20:21], [Chunk(0, 1, 20, PAGES)], [0])
    np.testing.assert_array_equal(after, again)


@pytest.fixture
def tuned(monkeypatch):
    """Pretends that the machine profile made a choice."""

    def pretend(**choices):
        monkeypatch.setattr("cyclewise.machine.machine.load_tuning", lambda: Tuning(**choices))

    return pretend


def test_the_number_of_threads(tuned):
    tuned()
    assert resolve_threads(None) == available_cpus() >= 1
    assert resolve_threads(1) == 1
    assert resolve_threads(1000) == available_cpus()
    for count in (0, -1):
        with pytest.raises(InvalidParameterError, match="at least 1"):
            resolve_threads(count)


def test_the_profile_chooses_threads_unless_a_number_is_given(tuned, monkeypatch):
    monkeypatch.setattr("cyclewise.machine.machine.available_cpus", lambda: 8)
    tuned(num_threads=6)
    assert [resolve_threads(n) for n in (None, 1, 8, 9)] == [6, 1, 8, 8]
    tuned(num_threads=9)
    assert resolve_threads(None) == 8


def test_the_profile_chooses_the_prefill_chunk(path, tuned):
    found = []
    for chunk in (None, 16, 1 << 15):
        tuned(prefill_chunk=chunk)
        model = load_model(path, threads=2)
        engine = Engine(model)
        found.append((model.machine.max_batch_tokens, engine.evaluate(engine.new_sequence(), IDS)))
        model.close()
    assert [most for most, _ in found] == [MAX_BATCH_TOKENS, 16, MAX_BATCH_TOKENS]
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_the_profile_chooses_the_register_tiles(tmp_path, monkeypatch):
    tiny.write(tmp_path / "model.gguf", Tiny(format="Q8_0"))
    found = []
    for tiles in ({}, {"Q8_0": (2, 1)}):
        monkeypatch.setattr(
            "cyclewise.machine.builder.load_tuning", lambda tiles=tiles: Tuning(token_tiles=tiles)
        )
        model = load_model(tmp_path / "model.gguf", threads=2)
        output = model.program.moments[-1]
        kernel = output.record[len(LINEAR) + LINEAR_PART.index("tile_kernel")]
        found.append((kernel, logits(model.machine)))
        model.close()
    assert found[0][0] != found[1][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_reading_bandwidth_leaves_the_machine_as_it_was(machine, monkeypatch):
    monkeypatch.setattr("cyclewise.machine.machine.PROBE_BYTES", 1 << 22)
    want = logits(machine)
    assert machine.read_bandwidth(0.01) > 1e6
    monkeypatch.setattr("cyclewise.machine.machine.LEAST_PROBE_BYTES", 1 << 20)
    assert machine.read_bandwidth(0.01, 1) > 1e6
    np.testing.assert_array_equal(logits(machine), want)


def test_a_machine_of_one_thread_runs_the_same_program(machine):
    want = logits(machine)
    machine.close()
    single = Machine(machine.program, 1)
    np.testing.assert_array_equal(logits(single), want)
    single.close()


def test_a_helper_that_has_ended_holds_no_step_up(machine):
    want = logits(machine)
    threads = machine.threads
    assert threads.alive
    callable_at(host_compiler().address("post"), 2)(threads._shared.ctypes.data, STOP)
    for helper in threads._helpers:
        helper.join()
    threads._posted[0] = threads._epoch  # as if nobody had told them to
    assert not threads.alive
    np.testing.assert_array_equal(logits(machine), want)


def test_the_epoch_may_wrap_around(machine):
    want = logits(machine)
    for epoch in (0x7FFFFFF0, 0xFFFFFFE0):  # 41 steps from the last of them lead past zero
        machine._threads._epoch = epoch
        np.testing.assert_array_equal(logits(machine), want)
    assert machine._threads._epoch < 41


def test_a_machine_of_more_threads_than_the_program_is_refused(machine):
    with pytest.raises(InvalidParameterError, match="built for"):
        Machine(machine.program, machine.program.num_threads + 1)
