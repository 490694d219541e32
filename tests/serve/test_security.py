from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest

import cyclewise
from cyclewise.errors import InvalidParameterError
from cyclewise.serve.security import Keys, check_address
from tests.serve.toys import error_of

KEYS = ["a-key-of-the-first-user", "a-key-of-the-second-one"]
ROUTES = [
    ("GET", "/v1/models"), ("GET", "/v1/models/toy"), ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/ready"),
    ("GET", "/metrics"), ("GET", "/nothing"), ("GET", "/health/"), ("OPTIONS", "/v1/models"),
]  # fmt: skip


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def test_every_route_but_one_asks_for_a_key(make):
    toy = make(keys=Keys(KEYS))
    for method, path in ROUTES:
        for headers in ({}, bearer("wrong"), bearer(""), {"authorization": f"Basic {KEYS[0]}"}):
            answer = toy.request(method, path, headers=headers)
            assert error_of(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    assert toy.request("GET", "/health").json() == {"status": "ok"}
    for key in KEYS:
        assert toy.request("GET", "/v1/models", headers=bearer(key)).status_code == 200


def test_who_has_another_key_finds_nothing_in_the_cache(make):
    toy = make(keys=Keys(KEYS))

    def cached(key):
        body = {"model": "toy", "prompt": "x" * 40, "max_tokens": 1}
        answer = toy.request("POST", "/v1/completions", body, headers=bearer(key)).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(KEYS[0]) == 0
    assert cached(KEYS[0]) == 40
    assert cached(KEYS[1]) == 0
    assert cached(KEYS[1]) == 40


def test_a_wrong_key_is_compared_with_all_and_at_full_length(monkeypatch):
    compared = []

    def compare(first, second):
        compared.append((len(first), len(second)))
        return first == second

    monkeypatch.setattr("cyclewise.serve.security.hmac.compare_digest", compare)
    keys = Keys(KEYS)
    for given in (KEYS[0], KEYS[1], KEYS[0][:-1], "", "x" * 10_000):
        keys.salt(f"Bearer {given}")
        assert compared == [(32, 32)] * 2
        compared.clear()


def test_nothing_is_unpickled():
    unsafe = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    for path in Path(cyclewise.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not unsafe & {name.name.partition(".")[0] for name in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in unsafe, path
            elif isinstance(node, ast.keyword):
                assert node.arg not in ("allow_pickle", "weights_only"), path


def test_files_of_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# who may ask\n{KEYS[0]}\n\n  {KEYS[1]}  \n")
    keys = Keys.from_file(path)
    first, second = (keys.salt(f"bearer {key}") for key in KEYS)
    assert first and second and first != second
    assert keys.salt("bearer # who may ask") is None and keys.salt(None) is None
    assert Keys.from_file(path).salt(f"Bearer {KEYS[0]}") != first  # of this server alone
    for text, word in (
        ("# none\n", "holds no key"),
        ("short\n", "at least"),
        ("with a space in it\n", "space"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidParameterError, match=word):
            Keys.from_file(path)
    with pytest.raises(InvalidParameterError, match="cannot read"):
        Keys.from_file(tmp_path / "missing")


def test_addresses():
    for host in ("127.0.0.1", "::1", "localhost", "127.8.0.1"):
        check_address(host, Keys(), False)
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(InvalidParameterError, match="--api-key-file"):
            check_address(host, Keys(), False)
        check_address(host, Keys(KEYS), False)
        check_address(host, Keys(), True)


def test_a_page_of_somebody_else(make):
    toy = make(app={"local_only": True})
    for host in ("localhost", "localhost:8000", "127.0.0.1:80", "[::1]:8000", "LOCALHOST"):
        assert toy.request("GET", "/v1/models", headers={"host": host}).status_code == 200
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
        error_of(toy.request("GET", "/v1/models", headers={"host": host}), 421)


def test_cors_is_off_unless_asked_for(make):
    asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert (
        "access-control-allow-origin" not in make().request("GET", "/health", headers=asks).headers
    )
    toy = make(keys=Keys(KEYS), app={"cors": ["https://page.example"]})
    answer = toy.request("OPTIONS", "/v1/chat/completions", headers=asks)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    other = {**asks, "origin": "https://other.example"}
    assert toy.request("OPTIONS", "/v1/chat/completions", headers=other).status_code == 400
    assert error_of(toy.request("GET", "/v1/models", headers=asks), 401)


def test_what_is_too_long(make):
    toy = make(app={"max_body_bytes": 1000})
    body = b'{"model": "toy", "prompt": "' + b"x" * 2000 + b'"}'
    assert error_of(toy.request("POST", "/v1/completions", content=body), 413)

    async def pieces():
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    assert error_of(toy.request("POST", "/v1/completions", content=pieces()), 413)
    assert error_of(toy.request("GET", "/health", headers={"x-long": "x" * 20_000}), 431)


def test_a_body_that_does_not_come(make, monkeypatch):
    monkeypatch.setattr("cyclewise.serve.limits._BODY_SECONDS", 0.05)

    async def pieces():
        yield b"{"
        await asyncio.sleep(1)

    toy = make()
    assert error_of(toy.request("POST", "/v1/completions", content=pieces()), 408)


def test_ids_of_requests(make):
    toy = make()
    first, second = (toy.request("GET", "/health").headers["x-request-id"] for _ in range(2))
    assert first != second and first.startswith("req_")
    for given, kept in (("a-1.b_C", True), ("x" * 65, False), ("a b", False), ("", False)):
        answer = toy.request("GET", "/health", headers={"x-request-id": given})
        assert (answer.headers["x-request-id"] == given) is kept
