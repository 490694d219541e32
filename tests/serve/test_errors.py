"""Requests that are refused, each with the field that is wrong."""

from __future__ import annotations

import json

import pytest

from cyclewise.engine.scheduler import Limits
from cyclewise.errors import EngineError, InvalidParameterError, OverloadedError, TemplateError
from cyclewise.serve.errors import describe
from tests.serve.toys import error_of, wait_until

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def toy():
    from tests.serve.toys import Toy

    toy = Toy()
    yield toy
    toy.close()


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"presence_penalty": 10**400}, "presence_penalty"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"store": 0}, "store"),
        ({"store": True}, "store"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty"),
        ({"stream_options": {"x": 1}}, "stream_options.x"),
        ({"temprature": 1}, "temprature"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"regex": "("}, "regex"),
        ({"grammar": "start: x"}, "grammar"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a\0"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "y": 1}]}, "messages[0].y"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        (
            {
                "messages": [{"role": "user", "content": [
                    {"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]
            },
            "messages[0].content[0]",
        ),
        ({"priority": 11}, "priority"),
        ({"timeout": 0}, "timeout"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [100_000]}, "stop_token_ids"),
    ],
)  # fmt: skip
def test_a_field_that_is_wrong(toy, fields, param):
    assert error_of(toy.chat(**fields), 400)["param"] == param


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": [99_999]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 2, "n": 65}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_a_field_of_a_text_that_is_wrong(toy, fields, param):
    assert error_of(toy.complete(**fields), 400)["param"] == param


@pytest.mark.parametrize(
    "content, param, word",
    [
        (b"{", None, "no JSON"),
        (b"\xff", None, "not UTF-8"),
        (b"[]", None, "must be a JSON object"),
        (b'{"temperature": NaN}', None, "NaN"),
        (b'{"temperature": -Infinity}', None, "Infinity"),
        (b'{"temperature": 1e999}', "temperature", "too large"),
        (b'{"seed": ' + b"1" * 5000 + b"}", None, "no JSON"),
        (b'{"messages": [{"content": "\\ud800"}]}', "messages[0].content", "half a character"),
        (b'{"a\\u0000": 1}', None, "NUL"),
        (b'{"a": ' + b"[" * 250 + b"]" * 250 + b"}", "a", "levels"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", None, "levels"),
        (b'{"a": ' * 100_000, None, "levels"),
        (b'{"prompt": [' + b'{"a": 1},' * 60_000 + b"0]}", "prompt", "values"),
        (b"{" + b",".join(b'"a%d": 1' % i for i in range(60_000)) + b"}", None, "values"),
    ],
)
def test_a_body_that_is_wrong(toy, content, param, word):
    error = error_of(toy.request("POST", "/v1/completions", content=content), 400)
    assert error["param"] == param and word in error["message"]


def test_the_context_is_never_cut(toy):
    for fields in ({"prompt": "x" * 256}, {"prompt": "x" * 250, "max_tokens": 10}):
        error = error_of(toy.complete(**fields), 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert toy.complete("x" * 250, max_tokens=5).status_code == 200
    error = error_of(toy.chat("x" * 256), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    body = toy.chat("x" * 248).json()
    assert body["choices"][0]["finish_reason"] == "length"


def test_models_and_routes(toy):
    error = error_of(toy.chat(model="gpt-4"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert toy.request("GET", "/v1/models").json()["data"][0]["id"] == "toy"
    assert toy.request("GET", "/v1/models/toy").json()["object"] == "model"
    error_of(toy.request("GET", "/v1/models/a/b"), 404)
    error_of(toy.request("GET", "/nothing"), 404)
    error_of(toy.request("GET", "/docs"), 404)
    answer = toy.request("GET", "/v1/chat/completions")
    error_of(answer, 405)
    assert "POST" in answer.headers["allow"]
    answer = toy.request(
        "POST", "/v1/completions", content=b"{}", headers={"content-type": "text/plain"}
    )
    error_of(answer, 415)


def test_tokens(toy):
    answer = toy.post("/tokenize", prompt="hi").json()
    assert answer == {"count": 3, "max_model_len": 256, "tokens": [256, 104, 105]}
    assert toy.post("/tokenize", messages=MESSAGES).json()["count"] == 7
    assert toy.post("/detokenize", tokens=answer["tokens"]).json() == {
        "prompt": "hi",
        "content": "hi",
    }
    plain = {"count": 2, "max_model_len": 256, "tokens": [104, 105]}
    assert toy.post("/tokenize", content="hi").json() == plain
    assert toy.post("/tokenize", content="hi", add_special=True).json() == answer
    assert toy.post("/tokenize", prompt="hi", add_special=False).json() == plain
    pieces = toy.post("/tokenize", content="h\u00e4", with_pieces=True).json()["tokens"]
    assert pieces == [
        {"id": 104, "piece": "h"},
        {"id": 0xC3, "piece": [0xC3]},
        {"id": 0xA4, "piece": [0xA4]},
    ]
    assert error_of(toy.post("/tokenize", prompt="a", content="a"), 400)["param"] == "prompt"
    fields = {"messages": MESSAGES, "add_special": True}
    assert error_of(toy.post("/tokenize", **fields), 400)["param"] == "add_special"
    assert error_of(toy.post("/detokenize", tokens=[1000]), 400)["param"] == "tokens"
    assert error_of(toy.post("/tokenize"), 400)["param"] == "prompt"


def test_errors_of_the_engine(make):
    toy = make(limits=Limits(jobs=1))
    toy.prompts.error = OverloadedError("64 prompts wait", 7.2)
    answer = toy.chat()
    assert error_of(answer, 429)["code"] == "rate_limit_exceeded"
    assert answer.headers["retry-after"] == "7"
    toy.prompts.error = TemplateError("the chat template refuses this")
    assert error_of(toy.chat(), 400)["param"] == "messages"
    toy.prompts.error = EngineError("the process has ended")
    error_of(toy.chat(), 503)
    toy.prompts.error = RuntimeError("a secret")
    assert "secret" not in error_of(toy.chat(), 500)["message"]
    toy.prompts.error = None
    assert error_of(toy.complete(["a", "b"]), 429)
    wait_until(lambda: toy.service.runner.numbers().jobs == 0)  # the first of the two has gone
    assert toy.complete().status_code == 200
    assert toy.service.runner.numbers().pages_used == 0


def test_which_parameter_an_error_of_the_engine_is_about():
    for text, param in (("priority must be", "priority"), ("the prompt has no token", None)):
        assert describe(InvalidParameterError(text)).param == param
    assert describe(InvalidParameterError("json_schema x"), "tools").param == "tools"


def test_a_step_that_fails(make):
    toy = make()

    def fail():
        raise RuntimeError("out of luck")

    toy.model.machine.before_step = fail
    assert error_of(toy.chat(), 503)["code"] == "engine_unavailable"
    answer = toy.chat(stream=True)
    assert answer.status_code == 200 and "[DONE]" not in answer.text
    assert json.loads(answer.text.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    toy.model.machine.before_step = lambda: None
    assert toy.chat(max_tokens=2).status_code == 200


def test_a_timeout(make):
    import time

    toy = make()
    toy.model.machine.before_step = lambda: time.sleep(0.02)
    error = error_of(toy.complete(max_tokens=200, timeout=0.05), 408)
    assert (error["param"], error["code"]) == ("timeout", "timeout")


def test_an_engine_that_dies(make):
    toy = make()
    assert toy.request("GET", "/ready").json() == {"status": "ready"}

    def die():
        raise SystemExit

    toy.model.machine.before_step = die
    error_of(toy.chat(), 503)
    error_of(toy.request("GET", "/ready"), 503)
    assert toy.request("GET", "/health").status_code == 200
    error_of(toy.chat(), 503)


def test_metrics(make):
    toy = make()
    toy.complete(max_tokens=7)
    toy.complete(max_tokens=0)
    text = toy.request("GET", "/metrics").text
    for line in (
        'cyclewise_requests_total{route="/v1/completions",status="200"} 1.0',
        'cyclewise_requests_total{route="/v1/completions",status="400"} 1.0',
        "cyclewise_generated_tokens_total 7.0",
        "cyclewise_prompt_tokens_total 3.0",
        "cyclewise_pages_used 0.0",
        "cyclewise_time_to_first_token_seconds_count 1.0",
        "cyclewise_time_between_tokens_seconds_count 6.0",
        "cyclewise_answer_seconds_count 1.0",
    ):
        assert line in text.splitlines(), line
