"""What goes wrong for one job is that job's affair: the others go on, and no page is lost."""

from __future__ import annotations

import pytest

from cyclewise.engine.generation import Sampler
from cyclewise.errors import EngineError
from tests.engine.test_scheduler import Bench, check_answers, job, tokens

BAD = 13  # seed


def fail_at(monkeypatch, target, name, number):
    """The call of this number, from 0 on, of a function runs out of memory."""
    inner, calls = getattr(target, name), []

    def maybe(*args, **values):
        calls.append(args)
        if len(calls) == number + 1:
            raise MemoryError
        return inner(*args, **values)

    monkeypatch.setattr(target, name, maybe)
    return calls


@pytest.mark.parametrize("answer", [0, 1, 2])
def test_beginning_an_answer(monkeypatch, answer):
    def sampler(params):
        if params.seed == BAD + answer:
            raise MemoryError
        return Sampler(params)

    bench = Bench(spare_pages=40)
    good = [job(tokens(9, 1)), job(tokens(30, 2), n=2)]
    with monkeypatch.context() as patch:
        patch.setattr("cyclewise.engine.generation.Sampler", sampler)
        bad = job(tokens(20, 3), n=3, seed=BAD)
        bench.submit(good[0], bad, good[1])
        bench.run().emptied()
    check_answers(bench, good)
    for index in range(3):
        end = bench.ends[bad, index]
        assert isinstance(end, EngineError) and "beginning an answer failed" in str(end)


@pytest.mark.parametrize("number", [3, 8])
def test_taking_pages(monkeypatch, number):
    bench = Bench(spare_pages=40)
    jobs = [job(tokens(9, i), n=2, max_tokens=20) for i in range(3)]
    bench.submit(*jobs)
    with monkeypatch.context() as patch:
        fail_at(patch, bench.engine.pool, "take", number)
        bench.run().emptied()
    failed = [key for key, end in bench.ends.items() if isinstance(end, EngineError)]
    assert len(failed) == 2 and len({one for one, _ in failed}) == 1
    check_answers(bench, [one for one in jobs if one is not failed[0][0]])


def test_going_on_after_a_pause(monkeypatch):
    """The other answers of the job are about to run in the same step."""

    def fail(self):
        raise MemoryError

    bench = Bench(spare_pages=0)
    jobs = [job(tokens(9, i), n=2, max_tokens=24) for i in range(2)]
    bench.submit(*jobs)
    with monkeypatch.context() as patch:
        patch.setattr("cyclewise.engine.scheduler.Generation.resume", fail)
        numbers = bench.run().emptied()
    assert numbers.preemptions
    failed = [one for one in jobs if isinstance(bench.ends[one, 0], EngineError)]
    assert failed
    for one in failed:
        assert str(bench.ends[one, 1]).startswith("beginning an answer failed")
    check_answers(bench, [one for one in jobs if one not in failed])


def test_looking_for_a_prompt(monkeypatch):
    bench = Bench(spare_pages=40)
    jobs = [job(tokens(20, 1), max_tokens=4) for _ in range(3)]
    bench.submit(jobs[0])
    bench.run()
    bench.submit(*jobs[1:])
    with monkeypatch.context() as patch:
        fail_at(patch, bench.engine.pool, "find", 2)
        bench.run().emptied()
    assert isinstance(bench.ends[jobs[1], 0], EngineError)
    check_answers(bench, [jobs[0], jobs[2]])


def test_choosing_a_token(monkeypatch):
    bench = Bench(spare_pages=40)
    jobs = [job(tokens(9, i), max_tokens=20) for i in range(3)]
    bench.submit(*jobs)
    with monkeypatch.context() as patch:
        fail_at(patch, Sampler, "sample", 10)
        bench.run().emptied()
    failed = [one for one in jobs if isinstance(bench.ends[one, 0], EngineError)]
    assert len(failed) == 1 and "choosing a token failed" in str(bench.ends[failed[0], 0])
    check_answers(bench, [one for one in jobs if one not in failed])
