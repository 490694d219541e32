"""Chats and texts, whole and as streams."""

from __future__ import annotations

import json

import pytest

from cyclewise.engine.engine import Engine
from cyclewise.engine.logprobs import score_prompt
from tests.engine.toy import ToyModel, scripted
from tests.serve.toys import error_of, events

CHAT = len("u:hi<end>a:") - len("<end>") + 1
TEXT = 1 + len("hi")


def test_a_chat(make):
    toy = make(logits=scripted("grün.", CHAT))
    answer = toy.chat(temperature=0)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert body["model"] == "toy"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "grün.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": CHAT,
        "completion_tokens": 6,
        "total_tokens": CHAT + 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert list(body["timings"]) == ["queue", "prefill", "decode"]
    assert min(body["timings"].values()) >= 0
    again = toy.chat(temperature=0).json()
    assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


def test_a_chat_as_a_stream(make):
    toy = make(logits=scripted("grün.", CHAT))
    chunks = events(toy.chat(temperature=0, stream=True, stream_options={"include_usage": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    *said, usage = chunks
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 6
    assert all(chunk["usage"] is None for chunk in said)
    deltas = [chunk["choices"][0]["delta"] for chunk in said]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert [delta["content"] for delta in deltas[1:-1]] == ["g", "r", "ü", "n", "."]
    assert deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in said] == [None] * 6 + ["stop"]
    assert "usage" not in events(toy.chat(temperature=0, stream=True))[0]


def test_texts(make):
    toy = make()
    body = toy.complete(["ab", "cd"], n=2, seed=-7, max_tokens=5, echo=True).json()
    assert body["object"] == "text_completion"
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][:2] for choice in body["choices"]] == ["ab", "ab", "cd", "cd"]
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
    assert body["usage"]["completion_tokens"] == 20
    ids = [toy.tokenizer.encode(text) for text in ("ab", "cd")]
    alike = toy.complete(ids, n=2, seed=-7, max_tokens=5, echo=True).json()
    assert [c["text"] for c in alike["choices"]] == [c["text"] for c in body["choices"]]
    one = toy.complete(ids[1], seed=-6, max_tokens=5).json()
    assert "cd" + one["choices"][0]["text"] == body["choices"][3]["text"]
    chunks = events(toy.complete(["ab", "cd"], n=2, seed=-7, max_tokens=5, echo=True, stream=True))
    texts = [""] * 4
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    # what is streamed may end within a character that the whole text shows as one that is broken
    assert texts == [choice["text"] for choice in body["choices"]]
    assert toy.complete().json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "stop, text", [("STOP", "one "), (["two", "ST"], "one "), ("never", "one STOP two")]
)
def test_stop_strings(make, stop, text, stream):
    toy = make(logits=scripted("one STOP two", TEXT))
    answer = toy.complete(temperature=0, stop=stop, stream=stream)
    choices = (
        [chunk["choices"][0] for chunk in events(answer)] if stream else answer.json()["choices"]
    )
    assert "".join(choice["text"] for choice in choices) == text
    assert choices[-1]["finish_reason"] == "stop"
    toy.complete()
    assert toy.service.runner.numbers().pages_used == 0


def test_logprobs_of_a_chat(make):
    toy = make(logits=scripted("ü!", CHAT))
    choice = toy.chat(temperature=0, logprobs=True, top_logprobs=2).json()["choices"][0]
    first, second, third = choice["logprobs"]["content"]
    assert (first["token"], first["bytes"]) == ("\ufffd", ["ü".encode()[0]])
    assert (third["token"], third["bytes"]) == ("!", [33])
    assert -0.001 < third["logprob"] <= 0
    assert len(third["top_logprobs"]) == 2 and third["top_logprobs"][0]["token"] == "!"
    assert second["top_logprobs"][1]["logprob"] < -20
    chunks = events(toy.chat(temperature=0, logprobs=True, stream=True))
    found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    tokens = [token["bytes"] for each in found if each for token in each["content"]]
    assert tokens == [[0xC3], [0xBC], [33]]
    assert toy.chat(temperature=0).json()["choices"][0]["logprobs"] is None


def test_logprobs_of_a_text(make):
    toy = make(logits=scripted("one", TEXT))
    want = toy.complete(temperature=0, logprobs=1).json()["choices"][0]["logprobs"]
    assert want["tokens"] == ["o", "n", "e"]
    assert want["text_offset"] == [0, 1, 2]
    assert [list(top) for top in want["top_logprobs"]] == [["o"], ["n"], ["e"]]
    assert all(value > -0.001 for value in want["token_logprobs"])
    chunks = events(toy.complete(temperature=0, logprobs=1, stream=True))
    offsets = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks]
    assert [offset for each in offsets for offset in each] == [0, 1, 2]


def scores_of(toy, token_ids, num_top):
    engine = Engine(ToyModel(context=256, page_tokens=4))
    return list(score_prompt(engine, engine.new_sequence(), token_ids, num_top))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_logprobs_of_a_prompt(make, max_tokens, n):
    toy = make()
    texts = ["grün und blau " * 8, "x"]
    values = {"echo": True, "logprobs": 2, "max_tokens": max_tokens, "n": n, "seed": 5}
    for _ in range(2):  # the second time the cache holds it
        body = toy.complete(texts, **values).json()
        assert body["usage"]["completion_tokens"] == 2 * n * max_tokens
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        for i, choice in enumerate(body["choices"]):
            text = texts[i // n]
            token_ids = toy.tokenizer.encode(text)
            want = scores_of(toy, token_ids, 2)
            found = choice["logprobs"]
            assert choice["text"].startswith(text) and choice["finish_reason"] == "length"
            assert {len(each) for each in found.values()} == {len(token_ids) + max_tokens}
            assert found["tokens"][: len(token_ids)] == list(map(toy.tokenizer.show, token_ids))
            assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
            count = len(token_ids)
            assert found["token_logprobs"][1:count] == [score.logprob for score in want]
            assert found["top_logprobs"][1:count] == [
                {toy.tokenizer.show(token_id): value for token_id, value in reversed(score.top)}
                for score in want
            ]
            # half a character begins where the whole one does
            places = [
                0,
                *(len(text.encode()[:k].decode(errors="ignore")) for k in range(count - 1)),
            ]
            assert found["text_offset"][:count] == places
            assert found["text_offset"][count : count + 1] in ([], [len(text)])
        streamed = [{name: [] for name in found} for _ in body["choices"]]
        for chunk in events(toy.complete(texts, stream=True, **values)):
            (choice,) = chunk["choices"]
            for name, values_ in choice["logprobs"].items():
                streamed[choice["index"]][name] += values_
        assert streamed == [choice["logprobs"] for choice in body["choices"]]
    alone = toy.complete(texts, n=n, seed=5, logprobs=2, max_tokens=3).json()["choices"]
    for choice, with_prompt in zip(alone, body["choices"], strict=True):
        if max_tokens:
            tail = with_prompt["logprobs"]["token_logprobs"][-max_tokens:]
            assert choice["logprobs"]["token_logprobs"] == tail


def test_no_answer_at_all(make):
    toy = make(context=16)
    token_ids = toy.tokenizer.encode("x" * 15)
    for prompt in ("x" * 15, token_ids):  # as much as the context holds
        choice = toy.complete(prompt, echo=True, max_tokens=0).json()["choices"][0]
        assert choice == {
            "index": 0, "text": "x" * 15, "logprobs": None, "finish_reason": "length"
        }  # fmt: skip
    assert error_of(toy.complete(max_tokens=0), 400)["param"] == "max_tokens"
    assert error_of(toy.chat(max_tokens=0), 400)["param"] == "max_tokens"
    long = error_of(toy.complete("x" * 16, echo=True, max_tokens=0), 400)
    assert long["code"] == "context_length_exceeded"


def test_extra_fields_and_openais_defaults(make):
    toy = make()
    plain = toy.complete(seed=1, max_tokens=12).json()["choices"][0]["text"]
    same = toy.complete(
        seed=1, max_tokens=12, temperature=1, top_p=1, top_k=0, min_p=0, typical_p=1,
        repetition_penalty=1, user="me", metadata={"a": "b"}, priority=3, timeout=60,
    ).json()["choices"][0]["text"]  # fmt: skip
    assert plain == same
    greedy = toy.complete(temperature=0, max_tokens=12).json()["choices"][0]["text"]
    assert toy.complete(top_k=1, max_tokens=12).json()["choices"][0]["text"] == greedy
    assert toy.complete(top_p=0, max_tokens=12).json()["choices"][0]["text"] == greedy
    ruled = toy.complete(logit_bias={"65": 100}, max_tokens=3).json()["choices"][0]["text"]
    assert ruled == "AAA"
    ended = toy.complete(logit_bias={"65": 100}, stop_token_ids=[65]).json()
    assert ended["choices"][0] == {
        "index": 0, "text": "", "logprobs": None, "finish_reason": "stop"
    }  # fmt: skip
    assert toy.complete(regex="[0-9]{4}").json()["choices"][0]["text"].isdecimal()


def test_an_answer_of_a_schema(make):
    toy = make()
    schema = {
        "type": "object", "properties": {"age": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["age"], "additionalProperties": False,
    }  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for stream in (False, True):
        answer = toy.chat(response_format=wanted, stream=stream, max_tokens=200)
        text = (
            "".join(c["choices"][0]["delta"].get("content", "") for c in events(answer))
            if stream
            else answer.json()["choices"][0]["message"]["content"]
        )
        assert 0 <= json.loads(text)["age"] <= 99
    error = error_of(
        toy.chat(response_format={"type": "json_schema",
                                  "json_schema": {"name": "x", "schema": {"type": "nothing"}}}),
        400,
    )  # fmt: skip
    assert error["param"] == "response_format"


def test_developers_and_parts(make):
    toy = make()
    toy.chat(
        max_tokens=1,
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [
                {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": [
                {"id": "1", "type": "function",
                 "function": {"name": "f", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "tool_call_id": "1", "content": "42"},
        ],
    )  # fmt: skip
    assert toy.prompts.asked == [
        (
            [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "ab"},
                {"role": "assistant", "content": "", "tool_calls": [
                    {"id": "1", "type": "function",
                     "function": {"name": "f", "arguments": {"a": 1}}}]},
                {"role": "tool", "content": "42", "tool_call_id": "1"},
            ],
            {},
        )
    ]  # fmt: skip
