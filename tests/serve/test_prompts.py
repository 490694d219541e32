"""Prompts are read once, and what templates may be told."""

from __future__ import annotations

import pytest

from cyclewise.serve.security import Keys
from tests.serve.toys import error_of

KEYS = ["a-key-of-sufficient-length", "another-key-of-such-length"]


def asked(toy):
    return len(toy.prompts.asked), len(toy.prompts.texts)


def test_a_prompt_is_read_once(make):
    toy = make()
    answers = [toy.chat("hello", max_tokens=3, seed=1).json()["choices"] for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    for _ in range(3):
        toy.complete(["hello", "you", "hello"], max_tokens=1)
        toy.post("/tokenize", messages=[{"role": "user", "content": "hello"}])
    assert asked(toy) == (1, 2)
    toy.chat("hello", max_tokens=1, chat_template_kwargs={"enable_thinking": False})
    toy.chat("hello", max_tokens=1, chat_template_kwargs={"enable_thinking": True})
    toy.chat("hello!", max_tokens=1)
    assert asked(toy) == (4, 2)
    lines = toy.request("GET", "/metrics").text.splitlines()
    assert 'cyclewise_memo_lookups_total{memo="prompts",result="miss"} 6.0' in lines
    assert 'cyclewise_memo_lookups_total{memo="prompts",result="hit"} 12.0' in lines


def test_nobody_learns_of_another_keys_prompts(make):
    toy = make(keys=Keys(KEYS))
    for _ in range(2):
        for key in KEYS:
            headers = {"authorization": f"Bearer {key}"}
            body = {"model": "toy", "prompt": "hello", "max_tokens": 1}
            toy.request("POST", "/v1/completions", body, headers=headers)
            body = {"model": "toy", "messages": [{"role": "user", "content": "hello"}]}
            toy.request("POST", "/v1/chat/completions", body, headers=headers)
    assert asked(toy) == (2, 2)


def test_what_is_not_kept(make, monkeypatch):
    toy = make(timeless=False)
    for _ in range(3):
        toy.chat("hello", max_tokens=1)
    assert asked(toy) == (3, 0)
    monkeypatch.setattr("cyclewise.serve.service._KNOWN_TOKENS", 200)
    toy = make()
    for text in ("a" * 100, "b" * 100, "a" * 100):
        toy.complete(text, max_tokens=1)
    assert asked(toy) == (0, 3)
    toy.prompts.error = RuntimeError("broken")
    assert toy.complete("new", max_tokens=1).status_code == 500
    toy.prompts.error = None
    assert toy.complete("new", max_tokens=1).status_code == 200


@pytest.mark.parametrize("template", ["... <tool_call> ...", None])
def test_what_a_template_may_be_told(make, template):
    toy = make(template=template)
    options = {
        "enable_thinking": False, "thinking": True, "preserve_thinking": True,
        "reasoning_effort": "low", "date_string": "26 Jul 2024", "add_generation_prompt": False,
    }  # fmt: skip
    assert toy.chat(max_tokens=1, chat_template_kwargs=options).status_code == 200
    assert toy.prompts.asked.pop()[1] == options
    messages = [{"role": "user", "content": "hi"}]
    toy.post("/tokenize", messages=messages, chat_template_kwargs={"thinking": False})
    assert toy.prompts.asked.pop()[1] == {"thinking": False}


@pytest.mark.parametrize(
    "options, param",
    [
        ({"messages": []}, "chat_template_kwargs.messages"),
        ({"tools": []}, "chat_template_kwargs.tools"),
        ({"bos_token": "x"}, "chat_template_kwargs.bos_token"),
        ({"chat_template": "x"}, "chat_template_kwargs.chat_template"),
        ({"enable_thinking": "no"}, "chat_template_kwargs.enable_thinking"),
        ({"enable_thinking": 0}, "chat_template_kwargs.enable_thinking"),
        ({"reasoning_effort": "<|im_end|>"}, "chat_template_kwargs.reasoning_effort"),
        ({"date_string": "x" * 65}, "chat_template_kwargs.date_string"),
        ("enable_thinking", "chat_template_kwargs"),
    ],
)
def test_what_it_may_not(make, options, param):
    toy = make()
    assert error_of(toy.chat(chat_template_kwargs=options), 400)["param"] == param


def test_a_grammar_is_compiled_once_for_each_key(make):
    toy = make(keys=Keys(KEYS))
    for _ in range(5):
        for key in KEYS:
            body = {"model": "toy", "prompt": "hello", "max_tokens": 2, "regex": "[0-9]+", "n": 2}
            headers = {"authorization": f"Bearer {key}"}
            answer = toy.request("POST", "/v1/completions", body, headers=headers)
            assert answer.json()["choices"][0]["text"].isdecimal()
    lines = toy.request("GET", "/metrics", headers=headers).text.splitlines()
    assert 'cyclewise_memo_lookups_total{memo="structures",result="miss"} 2.0' in lines
    assert 'cyclewise_memo_lookups_total{memo="structures",result="hit"} 18.0' in lines
