"""What an attacker's hour came up with, against a toy at a real socket."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.serve.toys import WAIT, Running, Toy, connect, error_of, request, wait_until


@pytest.fixture(scope="module")
def running():
    running = Running(Toy(context=4096, max_batch_tokens=16, spare_pages=1024))
    yield running
    running.close()


@pytest.fixture(autouse=True)
def unharmed(running):
    """Whatever came, the server answers and holds nothing."""
    yield
    assert httpx.get(running.address + "/ready", timeout=WAIT).status_code == 200
    assert post(running, prompt="hi", max_tokens=2).status_code == 200
    wait_until(lambda: running.toy.service.runner.numbers().jobs == 0)
    assert running.toy.service.runner.numbers().pages_used == 0


def post(running, path="/v1/completions", **fields):
    body = {"model": "toy", **fields}
    return httpx.post(running.address + path, json=body, timeout=WAIT)


def send(running, data):
    """The first of what comes back; nothing, if the connection is closed without a word."""
    with connect(running) as connection:
        connection.sendall(data)
        try:
            return connection.recv(1 << 16)
        except ConnectionResetError:
            return b""


BODY = b'{"model": "toy", "prompt": "hi", "max_tokens": 1}'
JSON = b"content-type: application/json\r\n"
HOST = b"host: localhost\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)
CHUNKS = b"transfer-encoding: chunked\r\n"
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


@pytest.mark.parametrize(
    "head, body, status",
    [
        (HOST + JSON + LENGTH, BODY, 200),
        (HOST + JSON + CHUNKS, CHUNKED, 200),
        # two lengths, or a length and chunks: what one server takes for a body is another's request
        (HOST + JSON + LENGTH + b"content-length: 5\r\n", BODY, 400),
        (HOST + JSON + LENGTH + CHUNKS, CHUNKED, 400),
        (HOST + JSON + CHUNKS + b"content-length: 5\r\n", CHUNKED, 400),
        (HOST + JSON + b"transfer-encoding: chunked, identity\r\n", CHUNKED, 400),
        (HOST + JSON + b"transfer-encoding: gzip\r\n", CHUNKED, 400),
        (HOST + JSON + b"transfer-encoding : chunked\r\n", CHUNKED, 400),
        (HOST + JSON + b"content-length: +49\r\n", BODY, 400),
        (HOST + JSON + b"content-length: 4_9\r\n", BODY, 400),
        (HOST + JSON + b"content-length: -1\r\n", BODY, 400),
        (HOST + JSON + b"content-length: " + b"9" * 30 + b"\r\n", BODY, 400),
        (HOST + JSON + b"content-length: " + b"9" * 19 + b"\r\n", BODY, 413),
        (HOST + JSON + CHUNKS, b"f" * 21 + b"\r\n", 400),
        (HOST + JSON + CHUNKS, b"-1\r\n", 400),
        (HOST + JSON + CHUNKS, b"1;" + b"x" * 100_000, 400),
        (HOST + HOST + JSON + LENGTH, BODY, 400),
        (JSON + LENGTH, BODY, 400),  # no host
        (HOST + JSON + LENGTH + b"x\0y: z\r\n", BODY, 400),
        (HOST + JSON + LENGTH + b"x: y\0z\r\n", BODY, 400),
        (HOST + JSON + LENGTH + b"x: \r\n" * 5000, BODY, 431),
        (HOST + b"content-type: application/json; charset=utf-16\r\n" + LENGTH, BODY, 200),
        (HOST + b"content-type: text/plain\r\n" + LENGTH, BODY, 415),
    ],
)
def test_heads(running, head, body, status):
    answer = send(running, b"POST /v1/completions HTTP/1.1\r\n" + head + b"\r\n" + body)
    closed = status == 400 and not answer  # before all of it was read
    assert closed or answer.startswith(b"HTTP/1.1 %d " % status), answer


@pytest.mark.parametrize(
    "line, status",
    [
        (b"GET /health HTTP/1.0", 200),
        (b"GET http://other.example/health HTTP/1.1", 404),
        (b"GET //health HTTP/1.1", 404),
        (b"GET /health/../v1/models HTTP/1.1", 404),
        (b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1", 404),
        (b"GET /v1/models/%00 HTTP/1.1", 404),
        (b"GET /v1/models/%ff%fe HTTP/1.1", 404),
        (b"GET /" + b"a" * 10_000 + b" HTTP/1.1", 404),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1", 431),
        (b"GET /?" + b"a" * 20_000 + b" HTTP/1.1", 431),
        (b"CONNECT example.org:80 HTTP/1.1", 404),
        (b"TRACE /health HTTP/1.1", 405),
        (b"HEAD /health HTTP/1.1", 200),
        (b"get /health HTTP/1.1", 405),
        (b"PRI * HTTP/2.0", 404),
        (b"GET /health HTTP/1.1 HTTP/1.1", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
    ],
)
def test_lines(running, line, status):
    answer = send(running, line + b"\r\n" + HOST + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer


def test_a_web_socket_is_not_opened(running):
    head = (
        b"GET /health HTTP/1.1\r\n" + HOST + b"connection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
    )
    assert send(running, head).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_waits_to_be_asked_for_its_body(running):
    head = b"POST /v1/completions HTTP/1.1\r\nexpect: 100-continue\r\n" + HOST + JSON + LENGTH
    with connect(running) as connection:
        connection.sendall(head + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(BODY)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    too_long = head.replace(LENGTH, b"content-length: 99999999\r\n")
    assert send(running, too_long + b"\r\n").startswith(b"HTTP/1.1 413 ")  # it is not asked


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"stop": ["x" * 100_000] * 5}, "stop"),
        ({"stop": [f"{i}" for i in range(40_000)]}, "stop"),
        ({"logit_bias": {f"{i}": 1 for i in range(40_000)}}, "logit_bias"),
        ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias"),
        ({"logit_bias": {"\u0661": 1}}, "logit_bias"),  # an Arabic digit
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": 10**300}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"n": -1}, "n"),
        ({"n": 2**64}, "n"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 2**40}, "logprobs"),
        ({"top_k": -(10**30)}, "top_k"),
        ({"prompt": [1.0, 2.0]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [1e300]}, "prompt[0]"),
        ({"prompt": [[1], "a"]}, "prompt[0]"),
        ({"prompt": ["a"] * 64, "n": 128}, "n"),
        ({"prompt": [[1]] * 64, "n": 128}, "n"),
        ({"prompt": [1] * 100_000}, "prompt"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"user": ["a"]}, "user"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"timeout": 1e-400}, "timeout"),
        ({"__proto__": {}}, "__proto__"),
        ({"__class__": 1}, "__class__"),
        ({"\u202emodel": 1}, "\u202emodel"),
    ],
)  # fmt: skip
def test_fields(running, fields, param):
    answer = post(running, **{"prompt": "hi", "max_tokens": 1, **fields})
    assert error_of(answer, 400)["param"] == param


def test_nothing_is_fetched(running, monkeypatch):
    """Not an image, not a schema: no name is looked up."""

    def refuse(*args, **values):
        raise AssertionError("a name was looked up")

    url = "http://fetched.example/x"
    image = {"type": "image_url", "image_url": {"url": url}}
    schemas = [{"$ref": url}, {"$schema": url}, {"$id": url, "$ref": "y"}, {"$dynamicRef": url}]
    asked = [
        {"messages": [{"role": "user", "content": [image]}]},
        *(
            {
                "messages": [{"role": "user", "content": "hi"}],
                "response_format": {
                    "type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            }
            for schema in schemas
        ),
    ]  # fmt: skip
    with httpx.Client(base_url=running.address, timeout=WAIT) as client:
        assert client.get("/ready").status_code == 200  # it is connected by now
        monkeypatch.setattr("socket.getaddrinfo", refuse)
        for each in asked:
            answer = client.post("/v1/chat/completions", json={"model": "toy", **each})
            assert error_of(answer, 400)["param"] in ("messages[0].content[0]", "response_format")
        monkeypatch.undo()


@pytest.mark.parametrize(
    "model", ["TOY", "toy ", "t\u043ey", "\uff54oy", "", "../toy", "x" * 100_000]
)
def test_models(running, model):
    error = error_of(post(running, model=model, prompt="hi"), 404)
    assert error["code"] == "model_not_found" and len(error["message"]) < 500


def test_a_key_that_comes_twice(running):
    """The last one counts, as in most readers: for types and bounds as for the answer."""
    head = b'{"model": "toy", "prompt": "hi", "max_tokens": 3, "max_tokens": '
    for value, status in ((b"1}", 200), (b"-1}", 400)):
        answer = httpx.post(
            running.address + "/v1/completions", content=head + value, timeout=WAIT,
            headers={"content-type": "application/json"},
        )  # fmt: skip
        assert answer.status_code == status
        if status == 200:
            assert answer.json()["usage"]["completion_tokens"] == 1


def test_as_many_answers_as_there_may_be(running):
    answer = post(running, prompt=["a"] * 64, n=2, max_tokens=2).json()
    assert len(answer["choices"]) == 128
    answer = post(running, prompt="a", n=128, max_tokens=2, logprobs=5).json()
    assert answer["usage"]["completion_tokens"] == 256


def test_priorities_hold_nobody_up_for_ever(running):
    """Who asks without one is answered while those of the greatest keep coming."""
    toy = running.toy
    with connect(running) as last:
        floods = [connect(running) for _ in range(80)]
        for each in floods:
            each.sendall(request(max_tokens=60, priority=10))
        last.sendall(request(max_tokens=5, priority=-10, stream=False))
        assert last.recv(100).startswith(b"HTTP/1.1 200 ")
        for each in floods:
            each.close()
    wait_until(lambda: toy.service.runner.numbers().jobs == 0)


def test_more_than_is_taken_on(running):
    """Each is answered or refused, once."""
    statuses = []
    connections = [connect(running) for _ in range(300)]
    for each in connections:
        each.sendall(request(max_tokens=30))
    for each in connections:
        statuses.append(int(each.recv(1 << 16).split()[1]))
        each.close()
    assert set(statuses) <= {200, 429} and statuses.count(200) >= 200


def test_arguments_of_a_called_tool_that_are_hostile(running):
    for arguments in ("[" * 100_000, "9" * 5000, "", "\ufffd", json.dumps({"a": 1})):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "x"},
        ]
        answer = post(running, "/v1/chat/completions", messages=messages, max_tokens=1)
        assert answer.status_code == 200, answer.text
