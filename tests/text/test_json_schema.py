"""Verdicts of JSON schemas: those of the specification's own test suite, and none wrong."""

from __future__ import annotations

import itertools
import json

import pytest

from cyclewise.errors import InvalidParameterError, UnsupportedSchemaError
from cyclewise.text.json_schema import prepare
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


def refused(schema):
    """The keyword for which a schema is refused."""
    with pytest.raises(UnsupportedSchemaError) as caught:
        prepare(json.dumps(schema))
    return caught.value.keyword


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"maxlength": 3}, "maxlength"),
        ({"properties": {"a": {"items": {"nullable": True}}}}, "nullable"),
        ({"uniqueItems": True}, "uniqueItems"),
        ({"contains": {}}, "contains"),
        ({"minProperties": 2}, "minProperties"),
        ({"multipleOf": 0.25}, "multipleOf"),
        ({"maximum": 1e18}, "maximum"),
        ({"exclusiveMinimum": 1, "maximum": 1.5}, "exclusiveMinimum"),
        ({"items": {"exclusiveMaximum": 1}, "minimum": 0.5}, "exclusiveMaximum"),
        ({"not": {"pattern": "a"}}, "not"),
        ({"if": {"multipleOf": 2}, "then": {"type": "string"}}, "if"),
        ({"$ref": "http://example.com/schema"}, "$ref"),
        ({"$ref": "#/title", "title": "x"}, "$ref"),
        ({"$ref": "#/$defs/0/x", "$defs": {"0": True}}, "$ref"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "$schema"),
        ({"anyOf": [{"not": {"allOf": [{"$ref": "#/anyOf/0/not"}]}}]}, "not"),
        (
            {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "definitions": {"a": {}},
                "properties": {"b": {"$ref": "#/definitions/a", "maxLength": 3}},
            },
            "maxLength",
        ),
    ],
)
def test_what_is_refused_by_name(schema, keyword):
    assert refused(schema) == keyword


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin"},
        {"type": []},
        {"required": "a"},
        {"minLength": -1},
        {"maxItems": 1.5},
        {"maximum": "3"},
        {"maximum": True},
        {"multipleOf": 0},
        {"anyOf": []},
        {"properties": []},
        {"items": [{}]},
        {"items": 3},
        {"pattern": 3},
        {"$ref": 3},
        {"uniqueItems": "yes"},
        {"dependentRequired": {"a": "b"}},
    ],
)
def test_what_is_no_schema(schema):
    with pytest.raises(InvalidParameterError, match="json_schema"):
        prepare(json.dumps(schema))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"minimum": NaN}', '{"a"}'])
def test_what_is_no_json(text):
    with pytest.raises(InvalidParameterError, match="json_schema"):
        prepare(text)


def test_limits():
    deep = {}
    for _ in range(65):
        deep = {"items": deep}
    with pytest.raises(InvalidParameterError, match="deeper than 64"):
        prepare(json.dumps(deep))
    with pytest.raises(InvalidParameterError, match="deeper than 64"):
        prepare('{"items":' * 100_000)
    with pytest.raises(InvalidParameterError, match="more than 20000"):
        prepare(json.dumps({"anyOf": [{"minLength": i} for i in range(20_001)]}))
    twice = {str(i): {"anyOf": [{"$ref": f"#/$defs/{i - 1}"}] * 2} for i in range(1, 30)}
    exploding = {"$defs": {"0": {"minLength": 1}, **twice}, "not": {"$ref": "#/$defs/29"}}
    with pytest.raises(InvalidParameterError, match="more than 20000 subschemas to follow"):
        prepare(json.dumps(exploding))
    names = [{"properties": {name: True}} for name in "abcdefghij"]
    assert refused({"anyOf": names, "unevaluatedProperties": False}) == "unevaluatedProperties"


def test_bounds_of_many_digits(structures):
    """Where the library alone would leave out what a bound begins with."""
    assert verdict(structures, {"maximum": 12.345}, 12.34, 12.3, 12, 12.345, 12.346) == [
        *[True] * 4,
        False,
    ]
    below = {"exclusiveMinimum": -0.51, "type": "number"}
    assert verdict(structures, below, -0.5, -0.51, -0.509, 0) == [True, False, True, True]


def test_strings_that_are_not_some(structures):
    schema = {"not": {"enum": ["", "ab", "abc", "b]", "é", None, 2]}, "type": ["string", "number"]}
    values = ["", "ab", "abc", "b]", "é", 2, "a", "abd", "abcd", "b", "]", "e", 1, 2.5]
    assert verdict(structures, schema, *values) == [False] * 6 + [True] * 8


def test_what_nothing_satisfies(structures):
    for schema in (False, {"type": "string", "const": 3}, {"allOf": [{"maximum": 1}, False]}):
        with pytest.raises(InvalidParameterError, match="allows nothing"):
            structures.compile("json_schema", json.dumps(schema))
    for schema in ({"$ref": "#"}, {"not": {"$ref": "#"}}):
        with pytest.raises(InvalidParameterError, match="allows nothing"):
            structures.compile("json_schema", json.dumps(schema))
    # elsewhere it only keeps away what it is asked of
    hopeless = {"$defs": {"no": {"type": "string", "const": 3}}, "items": {"$ref": "#/$defs/no"}}
    assert verdict(structures, hopeless, [], [3], "x") == [True, False, True]


def test_names_in_disguise(structures):
    schema = {"properties": {"a": {"type": "integer"}}}
    matcher = structures.compile("json_schema", json.dumps(schema))
    assert accepts(matcher, '{"a":1,"b":"x"}')
    assert not accepts(matcher, '{"\\u0061":"x"}')
    matcher = structures.compile("json_schema", json.dumps({"const": "a\0b"}))
    assert accepts(matcher, '"a\\u0000b"')
    with pytest.raises(UnsupportedSchemaError, match="control characters"):
        structures.compile("json_schema", json.dumps({**schema, "required": ["\1"]}))


def test_white_space_is_bounded(structures):
    matcher = structures.compile("json_schema", '{"type": ["array", "object"]}')
    value = {"a": [1, {"b": []}], "c": {}}
    for layout in ({}, {"indent": 2}, {"indent": "\t"}, {"separators": (",", ":")}):
        assert accepts(matcher, json.dumps(value, **layout))
    assert accepts(matcher, "[\r\n" + " " * 40 + "]")
    for text in ("[\n" + " " * 41 + "]", "[  ]", "[\n\n]", " []", "[] "):
        assert not accepts(matcher, text)


def test_references(structures):
    schema = {
        "$id": "http://example.com/tree",
        "type": "object",
        "properties": {
            "children": {"type": "array", "items": {"$ref": "tree"}},
            "name": {"$ref": "#/$defs/a~1b%25"},
            "kind": {"$ref": "urn:x#k"},
        },
        "additionalProperties": False,
        "$defs": {
            "a/b%": {"type": "string"},
            "other": {"$id": "urn:x", "$defs": {"k": {"$anchor": "k", "enum": [1, 2]}}},
        },
    }
    right = {"children": [{"children": []}, {"name": "x"}], "name": "y", "kind": 2}
    wrong = {"children": [{"children": [3]}]}
    assert verdict(structures, schema, right, wrong, {"kind": 3}) == [True, False, False]


def test_a_one_of_whose_branches_overlap(structures):
    schema = {"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"}
    values = [{}, {"a": 1}, {"b": 1}, {"a": 1, "b": 1}]
    assert verdict(structures, schema, *values) == [False, True, True, False]
