"""Clients that send slowly, take slowly, or come in too great a number."""

from __future__ import annotations

import json
import select
import time

import pytest

from tests.serve.toys import Running, Toy, connect, request, wait_until


@pytest.fixture
def running():
    running = Running(Toy(context=4096, max_batch_tokens=16, spare_pages=1024))
    yield running
    running.close()


def set_limit(monkeypatch, name, value):
    monkeypatch.setattr(f"cyclewise.serve.connection.{name}", value)


def read_all(connection):
    """What comes until the server closes the connection, in whatever way."""
    found = b""
    try:
        while data := connection.recv(1 << 16):
            found += data
    except ConnectionResetError:
        pass
    return found


def drip(connection, data):
    """Send byte after byte until the connection is closed."""
    try:
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
    except OSError:
        return
    raise AssertionError("all of it was taken")


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nhost: loc"])
def test_headers_that_do_not_come(running, monkeypatch, sent):
    set_limit(monkeypatch, "HEAD_SECONDS", 0.1)
    with connect(running) as connection:
        connection.sendall(sent)
        head, body = read_all(connection).split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["error"]["code"] == "timeout"


def test_headers_that_come_byte_after_byte(running, monkeypatch):
    set_limit(monkeypatch, "HEAD_SECONDS", 0.2)
    with connect(running) as connection:
        drip(connection, b"GET /health HTTP/1.1\r\nx: " + b"y" * 1000)
    with connect(running) as connection:  # the second request of a connection
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        drip(connection, b"GET /health HTTP/1.1\r\nx: " + b"y" * 1000)
    with connect(running) as connection:  # a body that nobody reads
        head = b"GET /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        drip(connection, b"x" * 999)


def test_an_answer_may_take_longer_than_headers(running, monkeypatch):
    set_limit(monkeypatch, "HEAD_SECONDS", 0.1)
    running.toy.model.machine.before_step = lambda: time.sleep(0.05)
    with connect(running) as connection:
        connection.sendall(request(max_tokens=10))
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_who_says_nothing_more_is_let_go(running):
    running.server.config.timeout_keep_alive = 0.1
    with connect(running) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert read_all(connection).endswith(b'{"status":"ok"}')


@pytest.mark.parametrize("stream", [True, False])
def test_who_takes_nothing_is_let_go(running, monkeypatch, stream):
    set_limit(monkeypatch, "STALL_SECONDS", 0.3)
    toy = running.toy
    fields = {"max_tokens": 4000, "n": 8, "logprobs": 5}
    if stream:
        toy.model.machine.before_step = lambda: time.sleep(0.001)
    else:
        fields = {"max_tokens": 500, "n": 2, "logprobs": 5}
    with connect(running, receive_buffer=4096) as connection:
        connection.sendall(request(stream=stream, **fields))
        wait_until(lambda: toy.service.runner.numbers().jobs == 1)
        wait_until(lambda: toy.service.runner.numbers().jobs == 0)
        wait_until(lambda: not running.server.server_state.connections)
        numbers = toy.service.runner.numbers()
        assert numbers.pages_used == 0
        if stream:  # what was still to come was not worked out
            assert (numbers.cancelled, numbers.ended) == (8, 0)


def test_who_takes_it_slowly_gets_it_all(running, monkeypatch):
    set_limit(monkeypatch, "STALL_SECONDS", 1.0)
    with connect(running, receive_buffer=4096) as connection:
        connection.sendall(request(stream=True, max_tokens=1500, logprobs=5))
        found = b""
        while not found.endswith(b"0\r\n\r\n"):
            found += connection.recv(8192)
            time.sleep(0.005)
    assert b"data: [DONE]" in found


@pytest.mark.parametrize("stream", [True, False])
def test_who_sends_the_next_request_too_early_and_leaves(running, stream):
    toy = running.toy
    toy.model.machine.before_step = lambda: time.sleep(0.01)
    with connect(running) as connection:
        connection.sendall(request(max_tokens=2000, stream=stream))
        wait_until(lambda: toy.model.machine.steps)
        for _ in range(5):
            connection.sendall(request(prompt="x" * 100_000))
    wait_until(lambda: toy.service.runner.numbers().jobs == 0)
    numbers = toy.service.runner.numbers()
    assert (numbers.pages_used, numbers.ended) == (0, 0)


@pytest.mark.parametrize("kind", ["text/plain", "application/json"])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_body_that_is_no_http(running, caplog, kind, at_once):
    """Whether its request is refused, was answered or is still being read: nothing is logged."""
    for line in ("GET /health", "POST /v1/completions"):
        head = f"{line} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\n"
        head += "transfer-encoding: chunked\r\n\r\n"
        with connect(running) as connection:
            if at_once:
                connection.sendall(head.encode() + b"nonsense\r\n")
            else:
                connection.sendall(head.encode() + b"1\r\n{\r\n")
                time.sleep(0.05)
                connection.sendall(b"nonsense\r\n")
            assert read_all(connection).startswith(b"HTTP/1.1 ")
        wait_until(lambda: not running.server.server_state.connections)
    wait_until(lambda: not running.server.server_state.tasks)
    assert caplog.records == []


def test_requests_one_after_the_other_without_waiting(running):
    ask = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with connect(running) as connection:
        connection.sendall(ask * 3)
        found = b""
        while found.count(b'{"status":"ok"}') < 3:
            found += connection.recv(1000)
        running.toy.model.machine.before_step = lambda: time.sleep(0.001)
        connection.sendall(request(max_tokens=200))
        wait_until(lambda: running.toy.service.runner.numbers().jobs)
        connection.sendall(ask)  # too early
        found = read_all(connection)
    assert found.count(b"HTTP/1.1 200 ") == 1


def test_more_connections_than_there_may_be(running, monkeypatch):
    set_limit(monkeypatch, "MAX_CONNECTIONS", 3)
    toy = running.toy
    toy.model.machine.before_step = lambda: time.sleep(0.01)
    idle = [connect(running) for _ in range(3)]
    wait_until(lambda: len(running.server.server_state.connections) == 3)
    busy = []
    for i in range(3):  # whoever has a request takes the place of who has none
        busy.append(connect(running))
        busy[-1].sendall(request(max_tokens=2000, prompt="x" * (i + 1)))
        assert read_all(idle[i]) == b""
        wait_until(lambda: toy.service.runner.numbers().jobs == len(busy))
    with connect(running) as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 503 ")
    busy.pop().close()
    wait_until(lambda: toy.service.runner.numbers().jobs == 2)
    with connect(running) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    for each in (*idle, *busy):
        each.close()


def test_many_bodies_that_do_not_end(running, monkeypatch):
    """They are not held without limit; a body that fits is read, and what is left is given back."""
    monkeypatch.setattr("cyclewise.serve.limits.MAX_HELD_BYTES", 1 << 20)
    halves = [connect(running) for _ in range(4)]
    for each in halves:
        each.sendall(request(prompt="x" * 400_000)[:350_000])
    wait_until(lambda: len(select.select(halves, [], [], 0)[0]) == 2)
    for each in select.select(halves, [], [], 0)[0]:
        assert each.recv(100).startswith(b"HTTP/1.1 429 ")
    with connect(running) as connection:
        connection.sendall(request(max_tokens=1))
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    for each in halves:
        each.close()
    wait_until(lambda: not running.server.server_state.tasks)
    with connect(running) as connection:
        connection.sendall(request(prompt="x" * 900_000))
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")  # more than the context
