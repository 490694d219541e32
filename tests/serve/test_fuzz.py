"""Requests with fields of all kinds: answered, or refused with the name of the field."""

from __future__ import annotations

import random

import pytest

from cyclewise.serve.protocol import ChatRequest, CompletionRequest
from cyclewise.serve.responses import ResponsesRequest
from tests.serve.toys import wait_until

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
