"""Structures that explode, asked of a server that answers others meanwhile."""

from __future__ import annotations

import json
import signal
import threading
import time

import httpx
import pytest

from tests.serve.test_server import end, path, start  # noqa: F401 (a fixture)
from tests.serve.toys import WAIT, error_of
from tests.text.test_trial import BOMBS, LIMIT


@pytest.fixture(scope="module")
def client(path):  # noqa: F811
    process, address = start(path, "--threads", "1")
    with httpx.Client(base_url=address.removesuffix("/v1"), timeout=WAIT) as client:
        yield client
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 0


def fields_of(kind, text):
    """How a request asks for a structure, and the field that is at fault."""
    if kind != "json_schema":
        return {kind: text}, kind
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": text}}
    return {"response_format": wanted}, "response_format"


@pytest.mark.parametrize("values", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_in_time(client, values):
    ((kind, text),) = values.items()
    fields, field = fields_of(kind, text)
    begin = time.monotonic()
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "hello", **fields})
    assert time.monotonic() - begin < LIMIT
    assert error_of(answer, 400)["param"] == field


def test_others_are_answered_meanwhile(client):
    """A stream goes on, plain requests and small structures are answered."""
    bombs = [fields_of(*next(iter(each.items())))[0] for each in BOMBS.values()]
    body = {"model": "tiny", "prompt": "hello"}
    statuses = []

    def explode(fields):
        statuses.append(client.post("/v1/completions", json={**body, **fields}).status_code)

    ask = {**body, "stream": True, "max_tokens": 900, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json=ask) as stream:
        lines = stream.iter_lines()
        next(lines)
        threads = [threading.Thread(target=explode, args=[each]) for each in bombs]
        for thread in threads:
            thread.start()
        answered = 0
        while any(thread.is_alive() for thread in threads):
            small = {"regex": "[a-z]{1,5}"} if answered % 2 else {}
            answer = client.post("/v1/completions", json={**body, "max_tokens": 2, **small})
            assert answer.status_code == 200
            answered += 1
        *_, last = (line for line in lines if line)
    assert answered and statuses == [400] * 3
    assert last == "data: [DONE]"


def test_a_flood_of_schemas(client):
    """Each is compiled anew; what is held after the last is little (`text/test_trial.py`)."""
    for i in range(40):
        names = {f"p{i}_{j}": {"type": "integer"} for j in range(5)}
        fields, _ = fields_of("json_schema", {"type": "object", "properties": names})
        answer = client.post(
            "/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 40, **fields}
        )
        choice = answer.json()["choices"][0]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)
