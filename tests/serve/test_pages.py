"""What the pages come with, and what they are told: files, headers, keys, JSON."""

from __future__ import annotations

import base64
import json

import pytest

from cyclewise.clock.live import LiveClock
from cyclewise.engine.engine import Engine
from cyclewise.models import load_model
from cyclewise.serve.app import make_app
from cyclewise.serve.security import Keys
from cyclewise.serve.service import Service
from tests.engine.toy import ToyTokenizer, scripted
from tests.models.tiny import Tiny, write
from tests.serve.toys import InlinePrompts, Toy, error_of, events, wait_until

KEY = "a-key-of-sufficient-length"


def basic(password, name="anybody"):
    return {"authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


def test_what_comes_with_a_page(make):
    toy = make()
    for path in ("/", "/batch", "/page/chat.js", "/page/page.css", "/page/icon.svg"):
        answer = toy.request("GET", path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        tag = {"if-none-match": answer.headers["etag"]}
        assert toy.request("GET", path, headers=tag).status_code == 304
        for word in ("style=", "onclick", "http://", "https://", "innerHTML"):
            assert word not in answer.text.replace("http://www.w3.org/2000/svg", "")
    for path in ("/page/", "/page/chat.html", "/page/../pages.py", "/page/none.js"):
        assert toy.request("GET", path).status_code == 404


def test_the_batch_as_json(make):
    toy = make()
    batch = toy.request("GET", "/v1/batch").json()
    assert batch["answers"] == [] and batch["pages"]["used"] == 0
    toy.complete("x" * 9, max_tokens=4)
    wait_until(lambda: toy.service.runner.numbers().jobs == 0)
    batch = toy.request("GET", "/v1/batch").json()
    assert batch["totals"]["generated_tokens"] == 4 and batch["answers"] == []
    assert (
        sum(batch["pages"][name] for name in ("used", "cached", "free"))
        == (batch["pages"]["total"])
    )
    assert json.dumps(batch)


def test_a_browser_is_asked_for_a_name_and_a_password(make):
    toy = make(keys=Keys([KEY]))
    for path in ("/", "/batch", "/page/chat.js", "/page/none"):
        for headers in ({}, basic("wrong"), {"authorization": "Basic ???"}):
            answer = toy.request("GET", path, headers=headers)
            assert error_of(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"].startswith("Basic realm=")
    assert toy.request("GET", "/v1/batch").headers["www-authenticate"] == "Bearer"
    for path in ("/", "/v1/batch", "/metrics"):
        for name in ("anybody", ""):
            assert toy.request("GET", path, headers=basic(KEY, name)).status_code == 200
    assert error_of(toy.request("GET", "/", headers=basic("", KEY)), 401)
    # whoever gives the same key in either way finds the same beginnings in the cache
    body = {"model": "toy", "prompt": "x" * 40, "max_tokens": 1}
    for headers, cached in (({"authorization": f"Bearer {KEY}"}, 0), (basic(KEY), 40)):
        answer = toy.request("POST", "/v1/completions", body, headers=headers).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "same-origin", "origin": "http://localhost"}, 200),
        ({"origin": "http://localhost"}, 200),
        ({}, 200),
    ],
)
def test_a_page_of_another_site_does_not_ask_with_a_browsers_key(make, headers, status):
    toy = make(keys=Keys([KEY]))
    body = {"model": "toy", "prompt": "x", "max_tokens": 1}
    answer = toy.request("POST", "/v1/completions", body, headers={**basic(KEY), **headers})
    assert answer.status_code == status
    assert toy.request("GET", "/metrics", headers={**basic(KEY), **headers}).status_code == status
    bearer = {"authorization": f"Bearer {KEY}", **headers}  # no browser sends it by itself
    assert toy.request("POST", "/v1/completions", body, headers=bearer).status_code == 200


def test_a_link_from_another_site_may_be_followed(make):
    toy = make(keys=Keys([KEY]))
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert toy.request("GET", "/", headers={**basic(KEY), **link}).status_code == 200
    form = toy.request("POST", "/tokenize", {"prompt": "x"}, headers={**basic(KEY), **link})
    error_of(form, 403)


# Where the time of a token went


def test_timings_of_tokens(make):
    toy = make()
    fields = {"max_tokens": 3, "temperature": 0, "timings_per_token": True}
    plain = toy.chat("x" * 30, max_tokens=3, temperature=0).json()["choices"][0]
    assert "timings" not in plain
    whole = toy.chat("x" * 30, **fields).json()["choices"][0]
    assert whole["message"] == plain["message"]
    first, *rest = whole["timings"]
    assert [timing["tokens"] for timing in whole["timings"]] == [1, 1, 1]
    assert first["cached_tokens"] == 32
    for timing in rest:
        assert (timing["steps"], timing["batch"], timing["batch_tokens"]) == (1, 1, 1)
        assert (timing["queue"], timing["cached_tokens"]) == (0, 0)
        assert timing["moments"] is timing["cycles"] is timing["limits"] is None  # no clock
        assert 0 <= timing["sampling"] + timing["step_seconds"] <= timing["seconds"]
    chunks = events(toy.chat("x" * 30, stream=True, n=2, seed=1, **fields | {"temperature": 1}))
    for index in (0, 1):
        choices = [each for chunk in chunks for each in chunk["choices"] if each["index"] == index]
        timed = [timing for choice in choices for timing in choice.get("timings", [])]
        assert [timing["tokens"] for timing in timed] == [1, 1, 1]
        assert timed[0]["steps"] >= 1 and timed[1]["batch"] == 2
    text = toy.complete("hi", **fields).json()["choices"][0]
    assert len(text["timings"]) == 3


def test_the_token_that_ends_an_answer_has_a_time_too(make):
    toy = make(logits=scripted("ab", 3))
    choice = toy.complete("hi", timings_per_token=True, temperature=0).json()["choices"][0]
    assert choice["text"] == "ab"
    assert [timing["tokens"] for timing in choice["timings"]] == [1, 1, 0]
    choice = toy.complete("hi", timings_per_token=True, temperature=0, stop="b").json()["choices"][
        0
    ]
    assert choice["text"] == "a" and sum(each["tokens"] for each in choice["timings"]) == 2


def test_timings_with_a_clock(tmp_path):
    path = tmp_path / "tiny.gguf"
    write(path, Tiny(vocab=260, context=1024, format="Q8_0"))
    loaded = load_model(path, threads=2)
    toy = Toy()
    toy.close()
    tokenizer = ToyTokenizer()
    toy.service = Service(
        "toy", Engine(loaded), tokenizer, InlinePrompts(tokenizer), template=None,
        clock=LiveClock(loaded.machine), on_close=loaded.close,
    )  # fmt: skip
    toy.app = make_app(toy.service)
    try:
        fields = {"max_tokens": 8, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        plain = toy.complete("hello there", **fields).json()["choices"][0]
        timed = toy.complete("hello there", timings_per_token=True, **fields).json()["choices"][0]
        timings = timed.pop("timings")
        assert timed == plain
        assert all(each["moments"] for each in timings)
        again = toy.complete("hello there", **fields).json()["choices"][0]
        assert again == plain
        for timing in timings:
            assert next(iter(timing["moments"])) == "embed" and "ffn.down" in timing["moments"]
            assert sum(timing["moments"].values()) <= timing["step_seconds"]
            assert timing["cycles"] is None or timing["cycles"] > 0
    finally:
        toy.close()
