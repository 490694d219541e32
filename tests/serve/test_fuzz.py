"""Requests with fields of all kinds: answered, or refused with the name of the field."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from cyclewise.serve.protocol import ChatRequest, CompletionRequest
from cyclewise.serve.responses import ResponsesRequest
from tests.serve.toys import Running, Toy, connect, request, wait_until

SOUND = {
    "messages": [{"role": "user", "content": "hi"}], "prompt": "x", "input": "x", "stop": ["a"],
    "temperature": 0.5, "logit_bias": {"3": 1}, "n": 1, "stream": False, "seed": 1,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "response_format": {"type": "json_object"}, "tool_choice": "auto", "logprobs": True,
    "top_logprobs": 1, "max_tokens": 3, "max_output_tokens": 3,
}  # fmt: skip
NEEDED = ("messages", "prompt", "input", "max_tokens", "max_output_tokens")
JUNK = [
    None, True, False, 0, -1, 1.5, 2**63, 10**30, 1e308, "", "x", "\u202e", [], {}, [[]], [None],
    {"a": None}, {"type": "function"}, "0" * 5000, list(range(200)), {"include_usage": True},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}},
    [{"role": "user", "content": None}], [{"role": "assistant", "tool_calls": []}],
    [{"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"a": {"$ref": "#/$defs/q"}}}}}],
]  # fmt: skip
ROUTES = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
}


@pytest.mark.parametrize("path", ROUTES)
def test_every_request_is_answered_or_refused_by_a_field(make, path):
    toy, rng = make(context=2048), random.Random(path)
    fields = [field for field in ROUTES[path].model_fields if field != "model"]
    counts = {200: 0, 400: 0}
    for _ in range(250):
        body = {
            field: SOUND[field]
            for field in fields
            if field in SOUND and (field in NEEDED or rng.random() < 0.4)
        }
        for field in rng.sample(fields, rng.randint(1, 2)):
            body[field] = rng.choice(JUNK)
        answer = toy.post(path, **body)
        counts[answer.status_code] += 1
        if answer.status_code == 400:
            assert answer.json()["error"]["param"], (body, answer.text)
    assert min(counts.values()) > 5
    wait_until(lambda: toy.service.runner.numbers().jobs == 0)
    numbers = toy.service.runner.numbers()
    assert (numbers.jobs, numbers.pages_used, numbers.failed) == (0, 0, 0)


PIECES = (
    b"\r\n", b"\r\n\r\n", b"\n", b"\0", b": ", b"9" * 20, b"-", b"transfer-encoding: chunked\r\n",
    b"content-length: 3\r\n",
)  # fmt: skip


def damaged(data, rng):
    """The bytes of a request with some changed, left out, doubled or put in between."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randrange(1, 20)]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 8))
            case 3:
                data[at:at] = data[max(0, at - 30) : at]
            case _:
                data[at:at] = rng.choice(PIECES)
        data = data or bytearray(b"x")
    return bytes(data)


def test_bytes_of_all_kinds(caplog):
    """Nothing is logged, nothing is held, and the server goes on."""
    running, rng = Running(Toy(context=512, max_batch_tokens=16)), random.Random(0)
    asked = [
        request(max_tokens=5),
        request(stream=True, max_tokens=5, n=2) * 3,
        b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n" * 2,
        request(max_tokens=5).replace(b"content-length", b"transfer-encoding: chunked\r\nx"),
    ]
    for _ in range(120):
        with connect(running) as connection:
            connection.settimeout(0.01)
            with suppress(OSError):  # it waits for more, or has closed the connection
                connection.sendall(damaged(rng.choice(asked), rng))
                connection.recv(4096)
    wait_until(lambda: not running.server.server_state.tasks)
    wait_until(lambda: running.toy.service.runner.numbers().jobs == 0)
    assert running.toy.service.runner.numbers().pages_used == 0
    with connect(running) as connection:
        connection.sendall(request(max_tokens=2))
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    running.close()
    assert [each for each in caplog.records if each.name != "asyncio"] == []
