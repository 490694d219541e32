"""Verdicts of JSON schemas: those of the specification's own test suite, and none wrong."""

from __future__ import annotations

import itertools
import json

import pytest

from cyclewise.engine.request import SamplingParams
from cyclewise.errors import InvalidParameterError, UnsupportedSchemaError
from cyclewise.text.structure import Structures
from tests.engine.toy import VOCAB_SIZE, ToyTokenizer


@pytest.fixture(scope="module")
def structures():
    made = Structures(ToyTokenizer(), VOCAB_SIZE)
    yield made
    made.close()


def canonical(value):
    """As RFC 8785 writes numbers: 1.0 is 1."""
    if isinstance(value, float) and value == int(value):
        return int(value)
    if isinstance(value, list):
        return list(map(canonical, value))
    if isinstance(value, dict):
        return {key: canonical(each) for key, each in value.items()}
    return value


def orders(value):
    """The same value with its properties in every order: that of a schema is kept by grammars."""
    if isinstance(value, dict):
        for names in itertools.permutations(value):
            for each in itertools.product(*(list(orders(value[name])) for name in names)):
                yield dict(zip(names, each, strict=True))
    elif isinstance(value, list):
        yield from map(list, itertools.product(*map(list, map(orders, value))))
    else:
        yield value


def accepts(matcher, text):
    matcher = matcher.deep_copy()
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def verdict(structures, schema, *values):
    """Whether a schema allows values; None where it allows nothing at all."""
    try:
        matcher = structures.compile("json_schema", json.dumps(schema))
    except UnsupportedSchemaError:
        raise
    except InvalidParameterError as error:
        assert "allows nothing" in str(error)
        return [False for _ in values]
    compact = {"separators": (",", ":"), "ensure_ascii": False}
    return [
        any(
            accepts(matcher, json.dumps(order, **compact))
            for order in itertools.islice(orders(canonical(value)), 5000)
        )
        for value in values
    ]


def suite(shared_data):
    folder = shared_data / "json-schema-test-suite" / "tests" / "draft2020-12"
    files = sorted(folder.glob("*.json"))
    assert files
    for file in files:
        for group in json.loads(file.read_text(encoding="utf-8")):
            yield file.stem, group


def test_no_verdict_of_the_suite_is_wrong(structures, shared_data):
    followed = total = 0
    for name, group in suite(shared_data):
        tests = group["tests"]
        total += len(tests)
        try:
            got = verdict(structures, group["schema"], *(test["data"] for test in tests))
        except UnsupportedSchemaError as error:
            assert f"`{error.keyword}`" in str(error)
            assert error.keyword in json.dumps(group["schema"])
            continue
        followed += len(tests)
        want = [test["valid"] for test in tests]
        assert got == want, (name, group["description"])
    assert total == 1299
    assert followed / total > 0.8
