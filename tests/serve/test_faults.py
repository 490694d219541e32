"""Clients that leave in every phase, and parts of the server that fail."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import httpx
import pytest

from cyclewise.engine.scheduler import Limits
from tests.serve.toys import WAIT, Running, Toy, connect, error_of, request, wait_until

SOON = 1.0  # second, in which a server that has failed says so


def run(**values):
    running = Running(
        Toy(**{"context": 4096, "max_batch_tokens": 16, "spare_pages": 512, **values})
    )
    running.toy.model.machine.before_step = lambda: time.sleep(0.002)
    return running


@pytest.fixture
def running():
    running = run()
    yield running
    running.close()


@pytest.fixture
def alone():
    """One answer runs at a time."""
    running = run(limits=Limits(running=1))
    yield running
    running.close()


def emptied(running, ended=0):
    """Nothing is left of those who have left."""
    numbers = running.toy.service.runner.numbers
    wait_until(lambda: not running.server.server_state.tasks)
    wait_until(lambda: numbers().jobs == 0)
    assert (numbers().pages_used, numbers().queued_tokens) == (0, 0)
    assert numbers().ended == ended
    running.toy.service.runner._scheduler.check()


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_the_prompt_is_encoded(running, stream):
    toy, encoded = running.toy, Future()
    toy.prompts.encode = lambda text: encoded
    with connect(running) as connection:
        connection.sendall(request(stream=stream, max_tokens=4000))
        wait_until(lambda: running.server.server_state.tasks)
    encoded.set_result([104, 105])
    emptied(running)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_a_structure_is_compiled(running, monkeypatch, stream):
    structures = running.toy.service._structures
    compiling, go, compile = threading.Event(), threading.Event(), structures.compile

    def slow(*asked):
        compiling.set()
        assert go.wait(WAIT)
        return compile(*asked)

    monkeypatch.setattr(structures, "compile", slow)
    with connect(running) as connection:
        connection.sendall(request(regex="a{3000}", stream=stream, max_tokens=4000))
        assert compiling.wait(WAIT)
    go.set()
    emptied(running)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_waiting_for_ones_turn(alone, stream):
    numbers = alone.toy.service.runner.numbers
    with connect(alone) as first:
        first.sendall(request(max_tokens=4000))
        wait_until(lambda: numbers().generated_tokens)
        with connect(alone) as second:
            second.sendall(request(stream=stream))
            wait_until(lambda: numbers().waiting == 1)
        wait_until(lambda: numbers().jobs == 1)
        assert numbers().ended == 0
    emptied(alone)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_leaving_while_being_answered(running, phase, stream):
    """`test_server.py` counts the steps."""
    numbers = running.toy.service.runner.numbers
    prompt = "x" * (4000 if phase == "prefill" else 5)
    with connect(running) as connection:
        connection.sendall(request(prompt=prompt, stream=stream, n=2, max_tokens=90))
        wait_until(lambda: numbers().steps > 5)
    emptied(running)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_between_two_answers(alone, stream):
    numbers = alone.toy.service.runner.numbers
    with connect(alone) as connection:
        connection.sendall(request(n=3, max_tokens=200, stream=stream))
        wait_until(lambda: numbers().ended == 1)
    emptied(alone, ended=1)


def test_leaving_in_the_midst_of_a_body(running, caplog):
    with connect(running) as connection:
        connection.sendall(request(prompt="x" * 1000)[:-500])
        wait_until(lambda: running.server.server_state.tasks)
    wait_until(lambda: not running.server.server_state.tasks)
    emptied(running)
    assert caplog.records == []  # or whoever likes fills the log


def get(running, path="/ready"):
    return httpx.get(running.address + path, timeout=WAIT)


def test_a_dead_engine_hangs_nobody(running):
    toy, numbers = running.toy, running.toy.service.runner.numbers
    answers = []

    def ask(**fields):
        body = {"model": "toy", "prompt": "hi", "max_tokens": 4000, **fields}
        with httpx.stream(
            "POST", running.address + "/v1/completions", json=body, timeout=WAIT
        ) as answer:
            answer.read()
        answers.append((answer.status_code, answer.text))

    threads = [
        threading.Thread(target=ask, kwargs={"stream": i % 2 == 0, "n": 1 + i % 3})
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: numbers().jobs == 8)
    assert get(running).status_code == 200

    def die():
        raise SystemExit

    toy.model.machine.before_step = die
    died = time.monotonic()
    wait_until(lambda: get(running).status_code == 503)
    for thread in threads:
        thread.join(WAIT)
    assert time.monotonic() - died < SOON
    for status, text in answers:
        assert (status == 200 and "engine_unavailable" in text) or status == 503
    assert len(answers) == 8
    assert error_of(get(running), 503)["code"] == "engine_unavailable"
    assert get(running, "/health").status_code == 200


def test_what_else_makes_a_server_not_ready(make):
    alive = SimpleNamespace(threads=True)
    toy = make()
    toy.service._threads_alive = lambda: alive.threads
    assert toy.request("GET", "/ready").json() == {"status": "ready"}
    alive.threads = False
    assert "thread" in error_of(toy.request("GET", "/ready"), 503)["message"]
    alive.threads, toy.prompts.ready = True, False
    assert "prompts" in error_of(toy.request("GET", "/ready"), 503)["message"]
    toy.prompts.ready, toy.service.draining = True, True
    assert "ended" in error_of(toy.request("GET", "/ready"), 503)["message"]


@pytest.mark.parametrize(
    "place",
    [
        "cyclewise.serve.limits.parse", "cyclewise.serve.protocol.read",
        "cyclewise.serve.service.Exchange.submit", "cyclewise.serve.service.Exchange._read",
        "cyclewise.serve.layouts.TextLayout.whole", "cyclewise.engine.scheduler.Generation",
    ],
)  # fmt: skip
def test_a_request_that_runs_out_of_memory(make, monkeypatch, place):
    toy = make()

    def fail(*args, **values):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        answer = toy.complete(n=2, max_tokens=20)
        error_of(answer, 503 if "engine" in place else 500)
    wait_until(lambda: toy.service.runner.numbers().jobs == 0)
    assert toy.service.runner.numbers().pages_used == 0
    assert toy.complete(n=2).status_code == 200


def test_a_stream_that_runs_out_of_memory(make, monkeypatch):
    toy = make()

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr("cyclewise.serve.layouts.TextLayout.more", fail)
    answer = toy.complete(stream=True, max_tokens=100)
    assert answer.status_code == 200 and "[DONE]" not in answer.text
    assert json.loads(answer.text.removeprefix("data: "))["error"]["type"] == "server_error"
    wait_until(lambda: toy.service.runner.numbers().jobs == 0)
    assert toy.service.runner.numbers().pages_used == 0
