"""The description of the server, held against what it says."""

from __future__ import annotations

import json

import pytest

from cyclewise.serve import openapi
from cyclewise.serve.pages import is_page
from cyclewise.serve.security import Keys
from tests.serve.toys import Toy, error_of

KEY = "a-key-of-the-first-user"
MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def toy():
    toy = Toy()
    yield toy
    toy.close()


def test_it_is_behind_the_key(make):
    toy = make(keys=Keys([KEY]))
    error_of(toy.request("GET", "/openapi.json"), 401)
    headers = {"authorization": f"Bearer {KEY}"}
    document = toy.request("GET", "/openapi.json", headers=headers).json()
    assert document["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert document["paths"]["/health"]["get"]["security"] == []


def test_it_names_every_route(toy):
    document = toy.request("GET", "/openapi.json").json()
    assert "security" not in document
    described = sorted(_described(document))
    without_prefix = [
        (path.removeprefix("/v1"), method)
        for path, method in described
        if path.startswith(openapi.WITHOUT_PREFIX)
    ]
    routes = [route for route in _routes(toy.service) if not is_page(route[0])]
    assert sorted(described + without_prefix) == sorted(routes)


def test_every_reference_leads_somewhere():
    document = openapi.document("toy", keyed=True)
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    places = [place.partition('"')[0] for place in text.split('"#/components/schemas/')[1:]]
    assert places and all(place in schemas for place in places)


def _described(document):
    for path, operations in document["paths"].items():
        yield from ((path, method.upper()) for method in operations if method != "parameters")


def _routes(service):
    from fastapi import FastAPI

    from cyclewise.serve.app import _Routes

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    _Routes(service, 1, keyed=False).add_to(app)
    for route in app.routes:
        yield from ((route.path.replace(":path", ""), each) for each in route.methods - {"HEAD"})


@pytest.mark.parametrize(
    "path, fields",
    [
        ("/v1/chat/completions", {}),
        ("/v1/chat/completions", {"n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}),
        ("/v1/chat/completions", {"tools": [TOOL], "tool_choice": "required"}),
        ("/v1/completions", {}),
        ("/v1/completions", {"logprobs": 2, "echo": False, "n": 2}),
        ("/v1/chat/completions", {"timings_per_token": True, "max_tokens": 3}),
        ("/v1/completions", {"timings_per_token": True, "max_tokens": 3}),
        ("/v1/responses", {}),
        ("/v1/responses", {"max_output_tokens": 2, "instructions": "x", "user": "u"}),
        (
            "/v1/responses",
            {
                "tools": [{"type": "function", "name": "f"}],
                "tool_choice": {"type": "function", "name": "f"},
                "service_tier": "auto",
            },
        ),
        ("/tokenize", {"with_pieces": True}),
        ("/tokenize", {}),
        ("/detokenize", {}),
    ],
)
def test_answers_are_as_described(toy, path, fields):
    given = {
        "/v1/chat/completions": {"messages": MESSAGES},
        "/v1/completions": {"prompt": "hi"},
        "/v1/responses": {"input": "hi"},
        "/tokenize": {"prompt": "hi"},
        "/detokenize": {"tokens": [104]},
    }[path]
    answer = toy.post(path, **given, **fields)
    assert answer.status_code == 200, answer.text
    _, kind, _ = openapi._REQUESTS[path]
    kind.model_validate_json(answer.text)


def test_what_is_looked_up_is_as_described(toy):
    for path, (kind, _, _) in openapi._LOOKS.items():
        answer = toy.request("GET", path.replace("{name}", "toy"))
        assert answer.status_code == 200
        if kind is not None:
            kind.model_validate_json(answer.text)


def test_errors_are_as_described(toy):
    for answer in (toy.chat(n=0), toy.request("GET", "/v1/models/x"), toy.chat(model="x")):
        openapi.ErrorAnswer.model_validate_json(answer.text)
