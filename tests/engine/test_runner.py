from __future__ import annotations

import queue
import threading
import time

import pytest

from cyclewise.engine.engine import Engine
from cyclewise.engine.job import Job
from cyclewise.engine.request import SamplingParams
from cyclewise.engine.runner import Runner
from cyclewise.engine.scheduler import Limits
from cyclewise.errors import ContextLengthError, EngineError, OverloadedError
from cyclewise.models import load_model
from tests.engine.test_scheduler import alone, job, tokens
from tests.engine.toy import ToyModel
from tests.models.tiny import Tiny, write

WAIT = 20.0  # seconds until a test is taken for hung


class Client:
    """Collects what becomes of a job."""

    def __init__(self, one):
        self.job = one
        self.events = queue.SimpleQueue()
        self.tokens = [[] for _ in range(one.params.n)]

    def finish(self):
        """Waits for the end of all answers; why each ended."""
        ends = {}
        while len(ends) < self.job.params.n:
            event = self.events.get(timeout=WAIT)
            assert event.job is self.job and event.index not in ends
            self.tokens[event.index] += event.token_ids
            if event.is_last:
                ends[event.index] = event.error or event.finish_reason
        assert self.events.empty()
        return [ends[index] for index in range(self.job.params.n)]


def submit(runner, one):
    client = Client(one)
    runner.submit(one, client.events.put)
    return client


def make(**values):
    limits = values.pop("limits", None)
    model = ToyModel(**{"spare_pages": 20, **values})
    return Runner(Engine(model), limits), model.machine


class Gate:
    """Holds steps up until it is opened."""

    def __init__(self, machine):
        self.reached, self.opened = threading.Event(), threading.Event()
        machine.before_step = self.pass_

    def pass_(self):
        self.reached.set()
        assert self.opened.wait(WAIT)


def test_jobs_of_many_threads():
    runner, _ = make()
    jobs = [job(tokens(1 + i, i), seed=i, n=1 + i % 3, temperature=1.5) for i in range(24)]
    clients = []

    def ask(mine):
        for one in mine:
            client = submit(runner, one)
            clients.append(client)
            client.finish()

    threads = [threading.Thread(target=ask, args=(jobs[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert len(clients) == len(jobs)
    for client in clients:
        for index, got in enumerate(client.tokens):
            assert got == alone(client.job, index=index)[0]
    numbers = runner.numbers()
    assert (numbers.jobs, numbers.pages_used, numbers.ended) == (0, 0, 48)
    runner.close()
    assert not runner.failed


def test_it_sleeps_when_there_is_nothing_to_do(monkeypatch):
    runner, machine = make()
    submit(runner, job()).finish()
    steps, waits = len(machine.steps), []
    wait = threading.Condition.wait
    monkeypatch.setattr(
        threading.Condition, "wait", lambda self, *a: (waits.append(a), wait(self, *a))[1]
    )
    submit(runner, job()).finish()
    runner.cancel(job())
    runner.close()
    assert len(machine.steps) == 2 * steps
    assert all(not arguments or arguments[0] in (None, WAIT) for arguments in waits)


def test_who_waits_for_all_of_a_step_is_woken_once():
    told: list[int] = []

    def count():
        told.append(sum(client.events.qsize() for client in clients))

    runner = Runner(Engine(ToyModel(spare_pages=20)), after_step=count)
    gate = Gate(runner._scheduler._engine.machine)
    one, other = job([1, 2], max_tokens=12), job([3, 4], max_tokens=12)
    clients = [submit(runner, one)]
    assert gate.reached.wait(WAIT)
    clients.append(submit(runner, other))
    gate.opened.set()
    runner.close(WAIT)
    assert told == sorted(set(told)) and told[-1] == 24
    assert len(told) < 24  # in some steps both gained one


def test_errors_come_at_once():
    runner, machine = make(limits=Limits(jobs=1))
    with pytest.raises(ContextLengthError):
        submit(runner, job(tokens(64)))
    gate = Gate(machine)
    client = submit(runner, job())
    with pytest.raises(OverloadedError):
        submit(runner, job())
    gate.opened.set()
    assert client.finish() == ["length"]
    runner.close()


def test_cancel_while_a_step_runs():
    runner, machine = make()
    gate = Gate(machine)
    client = submit(runner, job(tokens(30), max_tokens=None))
    assert gate.reached.wait(WAIT)
    runner.cancel(client.job)
    gate.opened.set()
    assert client.finish() == ["cancelled"]
    assert machine.steps == [8]
    runner.cancel(client.job)
    assert runner.numbers().pages_used == 0
    runner.close()


def test_a_deadline():
    runner, machine = make()
    gate = Gate(machine)
    client = submit(runner, job(tokens(30), deadline=runner.clock()))
    other = submit(runner, job())
    gate.opened.set()
    assert "not complete in time" in str(client.finish()[0])
    assert other.finish() == ["length"]
    runner.close()


def test_a_listener_that_fails_ends_its_job_alone():
    runner, machine = make()
    gate = Gate(machine)
    heard = []

    def listen(event):
        heard.append(event)
        raise ValueError

    runner.submit(job(n=2, max_tokens=40), listen)
    other = submit(runner, job())
    gate.opened.set()
    assert other.finish() == ["length"]
    runner.close(drain_seconds=WAIT)
    assert len(heard) == 1 and not runner.failed
    assert runner.numbers().cancelled == 2


def test_a_step_that_fails_does_not_end_the_engine():
    runner, machine = make()
    gate = Gate(machine)
    client = submit(runner, job(n=2))
    assert gate.reached.wait(WAIT)

    def fail():
        raise RuntimeError("out of luck")

    machine.before_step = fail
    gate.opened.set()
    assert [str(end) for end in client.finish()] == ["a step of the engine failed: out of luck"] * 2
    machine.before_step = lambda: None
    assert not runner.failed
    again = submit(runner, job())
    assert again.finish() == ["length"]
    runner.close()


@pytest.mark.parametrize("kind", ["machine", "scheduler"])
def test_a_thread_that_dies_is_seen_and_hangs_nobody(kind):
    runner, machine = make()
    gate = Gate(machine)
    clients = [submit(runner, job(tokens(9, i), n=2)) for i in range(3)]
    assert gate.reached.wait(WAIT)

    def die():
        raise SystemExit

    if kind == "machine":
        machine.before_step = die
    else:
        runner._scheduler._update = die
    gate.opened.set()
    for client in clients:
        for end in client.finish():
            assert isinstance(end, EngineError) and "has failed: SystemExit()" in str(end)
    assert runner.failed
    with pytest.raises(EngineError, match="has failed"):
        submit(runner, job())
    runner.close()
    assert runner.failed


def test_close_waits_for_what_runs_and_takes_nothing_on():
    runner, machine = make()
    gate = Gate(machine)
    client = submit(runner, job())
    assert gate.reached.wait(WAIT)
    closing = threading.Thread(target=runner.close, args=(WAIT,))
    closing.start()
    while runner._close_at is None:
        time.sleep(0.001)
    with pytest.raises(EngineError, match="being closed"):
        submit(runner, job())
    gate.opened.set()
    assert client.finish() == ["length"]
    closing.join(WAIT)
    assert not closing.is_alive() and not runner.failed


def test_close_ends_what_takes_too_long():
    runner, machine = make()
    gate = Gate(machine)
    clients = [submit(runner, job(tokens(30), n=2)), submit(runner, job(tokens(30)))]
    assert gate.reached.wait(WAIT)
    closing = threading.Thread(target=runner.close)
    closing.start()
    while runner._close_at is None:
        time.sleep(0.001)
    gate.opened.set()
    for client in clients:
        assert all("was closed" in str(end) for end in client.finish())
    closing.join(WAIT)
    assert not runner.failed
    assert runner.numbers().pages_used == 0
    assert machine.steps == [8]
    runner.close()


def test_many_greedy_answers_of_a_real_model_are_those_of_each_alone(tmp_path):
    write(tmp_path / "tiny.gguf", Tiny(context=2048, format="Q8_0"))
    model = load_model(tmp_path / "tiny.gguf", threads=2)
    try:
        jobs = [
            Job(
                [id % 100 for id in tokens(1 + 7 * (i % 16), i % 20)],
                SamplingParams(temperature=0, max_tokens=24, logprobs=2),
            )
            for i in range(32)
        ]
        runner = Runner(Engine(model))
        want = []
        for each in jobs:
            runner.submit(alike := Job(each.prompt_ids, each.params, salt=b"%d" % len(want)),
                          (client := Client(alike)).events.put)  # fmt: skip
            assert client.finish() == ["length"]
            want.append(client.tokens)
        assert runner.numbers().reused_tokens == 0
        clients = [submit(runner, each) for each in jobs]
        for client, tokens_alone in zip(clients, want, strict=True):
            assert client.finish() == ["length"]
            assert client.tokens == tokens_alone
        numbers = runner.numbers()
        assert numbers.reused_tokens > 0 and numbers.pages_used == 0
        runner.close()
    finally:
        model.close()
