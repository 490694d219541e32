"""What each keyword of a JSON schema becomes: `json_schema.py` says why.

`Writer.schema` writes a subschema, `Writer.negation` its opposite, and `_Cases` takes it apart into
alternatives of which each says what it has evaluated, for `unevaluatedProperties` and
`unevaluatedItems`. Where there is no exact way to say something, the keyword is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_DOWN, Decimal
from itertools import product
from typing import Any

from cyclewise.errors import InvalidParameterError, UnsupportedSchemaError
from cyclewise.text.json_schema import (
    ANNOTATIONS,
    COUNTS,
    IN_PLACE,
    MOST_SUBSCHEMAS,
    NOTHING,
    Document,
    Schema,
    is_number,
    words,
)

_MOST_CASES = 64
_GREATEST = 2**53
_BOUNDS = words("maximum exclusiveMaximum minimum exclusiveMinimum")
_KEPT = words(
    "type enum const multipleOf maximum exclusiveMaximum minimum exclusiveMinimum maxLength "
    "minLength pattern maxItems minItems maxProperties minProperties required"
)
_SIX = ("null", "boolean", "object", "array", "number", "string")
_NO_OBJECT: Schema = {"type": [name for name in _SIX if name != "object"]}


class Writer:
    """Writes the schema that the library is given."""

    def __init__(self, document: Document, *, expand_one_of: bool = False) -> None:
        """`expand_one_of` says of each branch of a `oneOf` that the others do not hold, for where
        the library cannot see that by itself.
        """
        self._document = document
        self._expand_one_of = expand_one_of
        self._names: dict[int, str] = {}  # of the definitions, by the identity of what they write
        self._waiting: list[dict[str, Any]] = []
        self._open: list[int] = []  # subschemas that are being negated or taken apart
        self._num_written = 0
        self._bounds: dict[str, list[float]] = {}  # all that are written, by keyword

    def write(self) -> dict[str, Any]:
        """The whole schema, with `$defs`."""
        root = self.schema(self._document.root)
        if root is False:
            raise InvalidParameterError(NOTHING)
        definitions: dict[str, Schema] = {}
        while self._waiting:
            node = self._waiting.pop()
            definitions[self._names[id(node)]] = self.schema(node)
        self._check_bounds()
        return {"$defs": definitions, **({} if root is True else root)}

    def schema(self, node: Schema) -> Schema:
        """A subschema."""
        if isinstance(node, bool):
            return node
        self._count()
        written: dict[str, Any] = {}
        also: list[Schema] = []
        for key, value in node.items():
            if key in COUNTS & _KEPT:
                written[key] = int(value)
            elif key in _BOUNDS and (wider := self._bounded(key, value)):
                written.setdefault("allOf", also)
                also.append(wider)
            elif key in _KEPT:
                _check_multiple(key, value)
                written[key] = value
            elif key in ("properties", "patternProperties"):
                written[key] = {name: self.schema(child) for name, child in value.items()}
            elif key in ("anyOf", "prefixItems"):
                written[key] = [self.schema(child) for child in value]
            elif key in ("additionalProperties", "items"):
                written[key] = self.schema(value)
            elif key == "oneOf" and not (self._expand_one_of or any(map(_is_bare, value))):
                written[key] = [self.schema(child) for child in value]
            elif more := self._rewritten(key, value, node):
                written.setdefault("allOf", also)  # in its place, for the order of properties
                also += more
        self._check_min_properties(written)
        if False in also:
            return False
        return also[0] if list(written) == ["allOf"] and len(also) == 1 else written

    def _rewritten(self, key: str, value: Any, node: dict[str, Any]) -> list[Schema]:
        """What must hold besides, because of a keyword that the library does not have."""
        match key:
            case "$ref" | "$dynamicRef":
                return [self._reference(self._document.resolve(node, key))]
            case "allOf":
                return [self.schema(child) for child in value]
            case "oneOf":
                with _naming(key):
                    return [self._one_of(value)]
            case "not":
                return _needed(self.negation(value))
            case "if":
                with _naming(key):
                    return _needed(self._conditional(node))
            case "dependentRequired":
                return [
                    _any_of([_NO_OBJECT, _without(name), _with(name, *others)])
                    for name, others in value.items()
                ]
            case "dependentSchemas":
                return [
                    _any_of(
                        [_NO_OBJECT, _without(name), _all_of([_with(name), self.schema(child)])]
                    )
                    for name, child in value.items()
                ]
            case "propertyNames":
                return _needed(self._property_names(value))
            case "unevaluatedProperties" | "unevaluatedItems":
                with _naming(key):
                    return _needed(self._unevaluated(key, value, node))
            case "uniqueItems" if value:
                raise UnsupportedSchemaError(key, "a grammar cannot compare items")
            case "contains" if node.get("minContains") != 0 or "maxContains" in node:
                raise UnsupportedSchemaError(key, "a grammar cannot count items of a kind")
        return []

    def _bounded(self, key: str, value: float) -> Schema | None:
        """A bound, where it needs saying otherwise.

        Of a bound like 12.345 the library leaves out 12.34 and 12.3, though not 12.340.
        """
        if abs(value) >= _GREATEST:
            raise UnsupportedSchemaError(key, f"of {value}, beyond {_GREATEST}")
        self._bounds.setdefault(key, []).append(value)
        if (value > 0) != (key in ("maximum", "exclusiveMaximum")):
            return None
        exact = Decimal(repr(value))
        exponent = exact.as_tuple().exponent
        shorter = [
            float(exact.quantize(Decimal(1).scaleb(-digits), ROUND_DOWN))
            for digits in range(1, -exponent if isinstance(exponent, int) else 0)
        ]
        inclusive = key.removeprefix("exclusive").lower()
        return _any_of([{key: value}, *({inclusive: bound} for bound in shorter)])

    def _check_bounds(self) -> None:
        """Between a whole number that is excluded and a bound less than 1 from it, the library
        allows the number itself; and the two may meet from anywhere in the schema.
        """
        for key, ends, side in (
            ("exclusiveMinimum", ("maximum", "exclusiveMaximum"), 1),
            ("exclusiveMaximum", ("minimum", "exclusiveMinimum"), -1),
        ):
            for excluded in self._bounds.get(key, ()):
                for end in (end for name in ends for end in self._bounds.get(name, ())):
                    if excluded == int(excluded) and 0 < (end - excluded) * side < 1:
                        raise UnsupportedSchemaError(
                            key, f"{excluded} beside a bound of {end}, less than 1 from it"
                        )

    def _reference(self, target: Schema) -> Schema:
        if isinstance(target, bool):
            return target
        if id(target) not in self._names:
            self._names[id(target)] = str(len(self._names))
            self._waiting.append(target)
        return {"$ref": f"#/$defs/{self._names[id(target)]}"}

    def _one_of(self, branches: list[Schema]) -> Schema:
        alternatives = []
        for place, branch in enumerate(branches):
            others = [self.negation(other) for other in branches[:place] + branches[place + 1 :]]
            alternatives.append(_all_of([self.schema(branch), *others]))
        return _any_of(alternatives)

    def _conditional(self, node: dict[str, Any]) -> Schema:
        condition = node["if"]
        if "then" not in node and "else" not in node:
            return True
        if "else" not in node:
            return _any_of([self.negation(condition), self.schema(node["then"])])
        if "then" not in node:
            return _any_of([self.schema(condition), self.schema(node["else"])])
        return _any_of(
            [
                _all_of([self.schema(condition), self.schema(node["then"])]),
                _all_of([self.negation(condition), self.schema(node["else"])]),
            ]
        )

    def _property_names(self, names: Schema) -> Schema:
        """What holds of all names becomes a pattern outside of which there are no properties."""
        if names is True:
            return True
        if names is False:
            return {"maxProperties": 0}
        keys = {key for key in names if not _is_silent(key)} - {"type"}
        if "type" in names and "string" not in names["type"]:
            return {"maxProperties": 0}
        if not keys:
            return True
        if keys <= {"minLength", "maxLength"}:
            least, most = int(names.get("minLength", 0)), names.get("maxLength")
            pattern = f"^[\\s\\S]{{{least},{'' if most is None else int(most)}}}$"
        elif keys == {"pattern"}:
            pattern = names["pattern"]
        elif keys in ({"const"}, {"enum"}):
            values = names["enum"] if "enum" in names else [names["const"]]
            known = [value for value in values if isinstance(value, str)]
            return {"properties": dict.fromkeys(known, True), "additionalProperties": False}
        else:
            raise UnsupportedSchemaError("propertyNames", f"of {' and '.join(sorted(keys))}")
        return {"patternProperties": {pattern: True}, "additionalProperties": False}

    # The opposite

    def negation(self, node: Schema) -> Schema:
        """What every JSON value satisfies that does not satisfy `node`."""
        if isinstance(node, bool):
            return not node
        self._count()
        with self._once(node, "not"):
            return _any_of([each for key in node for each in self._broken(key, node)])

    def _broken(self, key: str, node: dict[str, Any]) -> Iterator[Schema]:
        """The ways in which one keyword of a schema is not satisfied."""
        value = node[key]
        match key:
            case "$ref" | "$dynamicRef":
                yield self.negation(self._document.resolve(node, key))
            case "not":
                yield self.schema(value)
            case "allOf":
                yield from map(self.negation, value)
            case "anyOf":
                yield _all_of([self.negation(child) for child in value])
            case "if":
                yield _all_of([self.schema(value), self.negation(node.get("then", True))])
                yield _all_of([self.negation(value), self.negation(node.get("else", True))])
            case "type":
                yield _other_types(value)
            case "const" | "enum":
                yield self._other_values(value if key == "enum" else [value])
            case "required":
                yield from map(_without, value)
            case "properties":
                for name, child in value.items():
                    opposite = self.negation(child)
                    if opposite is not False:
                        yield {**_with(name), "properties": {name: opposite}}
            case "prefixItems":
                for place, child in enumerate(value):
                    opposite = self.negation(child)
                    if opposite is not False:
                        items = [*[True] * place, opposite]
                        yield {"type": "array", "prefixItems": items, "minItems": place + 1}
            case "items" if value is False:
                yield {"type": "array", "minItems": len(node.get("prefixItems", [])) + 1}
            case "items" | "additionalProperties" | "unevaluatedItems" | "unevaluatedProperties":
                if value is not True and value != {}:
                    raise UnsupportedSchemaError("not", f"of `{key}`")
            case "contains" if "minContains" not in node and "maxContains" not in node:
                yield {"type": "array", "items": self.negation(value)}
            case "minContains" | "maxContains" if "contains" not in node:
                pass
            case "dependentRequired":
                for name, others in value.items():
                    for other in others:
                        yield _all_of([_with(name), _without(other)])
            case "dependentSchemas":
                for name, child in value.items():
                    yield _all_of([_with(name), self.negation(child)])
            case "uniqueItems" if not value:
                pass
            case "minProperties" | "maxProperties" | "minItems" | "maxItems":
                yield from self._other_count(key, int(value))
            case "minLength" | "maxLength":
                yield from self._other_count(key, int(value))
            case "minimum":
                yield self._number(exclusiveMaximum=value)
            case "maximum":
                yield self._number(exclusiveMinimum=value)
            case "exclusiveMinimum":
                yield self._number(maximum=value)
            case "exclusiveMaximum":
                yield self._number(minimum=value)
            case _ if _is_silent(key):
                pass
            case _:
                raise UnsupportedSchemaError("not", f"of `{key}`")

    def _other_values(self, values: list[Any]) -> Schema:
        """All JSON values but these, of which none may be an object or an array."""
        if any(isinstance(value, dict | list) for value in values):
            raise UnsupportedSchemaError("not", "of `const` or `enum` with an object or an array")
        left: list[Schema] = [{"type": ["object", "array"]}]
        left += [{"const": value} for value in (None, True, False) if value not in _plain(values)]
        left.append({"type": "string", "pattern": _other_strings(sorted(_strings(values)))})
        numbers = sorted({value for value in values if is_number(value)})
        lows = [{}, *({"exclusiveMinimum": number} for number in numbers)]
        highs = [*({"exclusiveMaximum": number} for number in numbers), {}]
        left += [self._number(**low, **high) for low, high in zip(lows, highs, strict=True)]
        return _any_of(left)

    def _number(self, **bounds: float) -> Schema:
        """A number within bounds."""
        return self.schema({"type": "number", **bounds})

    def _other_count(self, key: str, count: int) -> Iterator[Schema]:
        kind = {"Properties": "object", "Items": "array", "Length": "string"}[key[3:]]
        if key.startswith("max"):
            schema: dict[str, Any] = {"type": kind, f"min{key[3:]}": count + 1}
            self._check_min_properties(schema)
            yield schema
        elif count:
            yield {"type": kind, f"max{key[3:]}": count - 1}

    # What is left unevaluated

    def _unevaluated(self, key: str, value: Schema, node: dict[str, Any]) -> Schema:
        rest = self.schema(value)
        if rest is True:
            return True
        kind = _PROPERTIES if key == "unevaluatedProperties" else _ITEMS
        alternatives: list[Schema] = []
        for schemas, evaluated in self._cases(node, kind, skip=key):
            alternatives.append(_all_of([*schemas, kind.close(evaluated, rest)]))
        return _any_of(alternatives)

    def _cases(self, node: Schema, kind: _Kind, skip: str = "") -> list[_Case]:
        """Alternatives that cover a schema; each says what it has evaluated where it holds."""
        if isinstance(node, bool):
            return [([], _Evaluated())]
        cases: list[_Case] = [([], kind.of_keywords(node, skip))]
        with self._once(node, skip or "unevaluated"):
            for key, value in node.items():
                for options in self._options(key, value, node, kind):
                    if all(evaluated == _Evaluated() for _, evaluated in options):
                        continue
                    cases = [
                        ([*before, *schemas], first.joined(second))
                        for (before, first), (schemas, second) in product(cases, options)
                    ]
                    if len(cases) > _MOST_CASES:
                        raise UnsupportedSchemaError(
                            "anyOf", f"more than {_MOST_CASES} combinations beside unevaluated"
                        )
        return cases

    def _options(
        self, key: str, value: Any, node: dict[str, Any], kind: _Kind
    ) -> Iterator[list[_Case]]:
        """Of each subschema that applies in place: what may be the case."""
        match key:
            case "allOf":
                for child in value:
                    yield self._cases(child, kind)
            case "$ref" | "$dynamicRef":
                yield self._cases(self._document.resolve(node, key), kind)
            case "anyOf":
                for child in value:
                    yield self._whether(child, kind)
            case "oneOf":
                yield [
                    ([self.schema(child), *schemas], evaluated)
                    for child in value
                    for schemas, evaluated in self._cases(child, kind)
                ]
            case "if":
                then = self._cases(node.get("then", True), kind)
                others = self._cases(node.get("else", True), kind)
                held = [
                    ([self.schema(value), *first, *second], one.joined(other))
                    for (first, one), (second, other) in product(self._cases(value, kind), then)
                ]
                if any(each != _Evaluated() for _, each in [*held, *others]):
                    opposite = self.negation(value)
                    yield held + [([opposite, *schemas], each) for schemas, each in others]
            case "dependentSchemas":
                for name, child in value.items():
                    absent = _any_of([_NO_OBJECT, _without(name)])
                    yield [
                        *(([_with(name), *s], each) for s, each in self._cases(child, kind)),
                        ([absent], _Evaluated()),
                    ]

    def _whether(self, child: Schema, kind: _Kind) -> list[_Case]:
        held = self._cases(child, kind)
        if all(evaluated == _Evaluated() for _, evaluated in held):
            return held
        return [
            *(([self.schema(child), *schemas], evaluated) for schemas, evaluated in held),
            ([self.negation(child)], _Evaluated()),
        ]

    @contextmanager
    def _once(self, node: dict[str, Any], keyword: str) -> Iterator[None]:
        if id(node) in self._open:
            raise UnsupportedSchemaError(keyword, "it refers to itself")
        self._open.append(id(node))
        try:
            yield
        finally:
            self._open.pop()

    def _count(self) -> None:
        self._num_written += 1
        if self._num_written > MOST_SUBSCHEMAS:
            raise InvalidParameterError(
                f"json_schema would take more than {MOST_SUBSCHEMAS} subschemas to follow: make "
                f"it simpler"
            )

    @staticmethod
    def _check_min_properties(schema: dict[str, Any]) -> None:
        """The library lets a name come twice that is not listed, and counts it twice."""
        least = schema.get("minProperties", 0)
        if len(set(schema.get("required", ()))) >= least > 0:
            del schema["minProperties"]
        elif least > 1:
            raise UnsupportedSchemaError(
                "minProperties", "more than 1 is counted only where so many are `required`"
            )


_SILENT = ANNOTATIONS | IN_PLACE | {"then", "else"}


def _check_multiple(key: str, value: Any) -> None:
    """Of multiples of 0.25 the library leaves out 0.5, though not 0.50."""
    if key == "multipleOf" and value != int(value):
        _, digits, exponent = Decimal(repr(value)).as_tuple()
        if int(exponent) < -1 and digits != (1,):
            raise UnsupportedSchemaError(key, f"of {value}: only whole numbers, tenths, 0.01, ...")


def _is_bare(schema: Schema) -> bool:
    """Whether a schema allows everything or nothing: the library miscounts those in `oneOf`."""
    return isinstance(schema, bool) or all(map(_is_silent, schema))


def _is_silent(key: str) -> bool:
    """Whether there is nothing that does not satisfy a keyword by itself."""
    return key in _SILENT or key.startswith("x-")


@dataclass(frozen=True, slots=True)
class _Evaluated:
    """What of an object or array is evaluated: names and patterns, or a number of items."""

    everything: bool = False
    names: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    items: int = 0

    def joined(self, other: _Evaluated) -> _Evaluated:
        return _Evaluated(
            self.everything or other.everything,
            tuple(dict.fromkeys([*self.names, *other.names])),
            tuple(dict.fromkeys([*self.patterns, *other.patterns])),
            max(self.items, other.items),
        )


_Case = tuple[list[Schema], _Evaluated]
"""Schemas that hold, and what they and those around them have evaluated then."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """Objects or arrays."""

    of_keywords: Callable[[dict[str, Any], str], _Evaluated]
    close: Callable[[_Evaluated, Schema], Schema]


def _evaluated_properties(node: dict[str, Any], skip: str) -> _Evaluated:
    ends = {"additionalProperties", "unevaluatedProperties"} - {skip}
    return _Evaluated(
        not ends.isdisjoint(node),
        tuple(node.get("properties", ())),
        tuple(node.get("patternProperties", ())),
    )


def _close_properties(evaluated: _Evaluated, rest: Schema) -> Schema:
    if evaluated.everything:
        return True
    return {
        "properties": dict.fromkeys(evaluated.names, True),
        "patternProperties": dict.fromkeys(evaluated.patterns, True),
        "additionalProperties": rest,
    }


def _evaluated_items(node: dict[str, Any], skip: str) -> _Evaluated:
    if "contains" in node:
        raise UnsupportedSchemaError("contains", "beside `unevaluatedItems`")
    ends = {"items", "unevaluatedItems"} - {skip}
    return _Evaluated(not ends.isdisjoint(node), items=len(node.get("prefixItems", ())))


def _close_items(evaluated: _Evaluated, rest: Schema) -> Schema:
    if evaluated.everything:
        return True
    prefix = {"prefixItems": [True] * evaluated.items} if evaluated.items else {}
    return {**prefix, "items": rest}


_PROPERTIES = _Kind(_evaluated_properties, _close_properties)
_ITEMS = _Kind(_evaluated_items, _close_items)


def _any_of(schemas: list[Schema]) -> Schema:
    if True in schemas:
        return True
    left = [schema for schema in schemas if schema is not False]
    return {"anyOf": left} if len(left) > 1 else left[0] if left else False


def _all_of(schemas: list[Schema]) -> Schema:
    if False in schemas:
        return False
    left = [schema for schema in schemas if schema is not True]
    return {"allOf": left} if len(left) > 1 else left[0] if left else True


def _needed(schema: Schema) -> list[Schema]:
    return [] if schema is True else [schema]


def _with(*names: str) -> dict[str, Any]:
    return {"type": "object", "required": list(dict.fromkeys(names))}


def _without(name: str) -> Schema:
    return {"type": "object", "properties": {name: False}}


def _other_types(given: str | list[str]) -> Schema:
    names = [given] if isinstance(given, str) else given
    if "integer" in names and "number" not in names:
        raise UnsupportedSchemaError("not", "a grammar cannot say which numbers are no integers")
    others = [name for name in _SIX if name not in names]
    return {"type": others} if others else False


def _plain(values: list[Any]) -> list[bool | None]:
    return [value for value in values if value is None or isinstance(value, bool)]


def _strings(values: list[Any]) -> set[str]:
    return {value for value in values if isinstance(value, str)}


def _other_strings(strings: list[str]) -> str:
    """A regular expression of all strings but these, which are sorted."""
    return f"^{_others_after(strings, 0)}$"


def _others_after(strings: list[str], place: int) -> str:
    """The same of what follows the first characters, which `strings` have in common."""
    if not strings:
        return r"[\s\S]*"
    following: dict[str, list[str]] = {}
    for text in strings:
        if len(text) > place:
            following.setdefault(text[place], []).append(text)
    ways = [
        f"{_literal(first)}{_others_after(rest, place + 1)}" for first, rest in following.items()
    ]
    if following:
        ways.append(f"[^{''.join(map(_literal, following))}][\\s\\S]*")
    else:
        ways.append(r"[\s\S]+")
    if len(strings[0]) > place:  # the empty rest is none of them
        ways.append("")
    return f"({'|'.join(ways)})"


def _literal(character: str) -> str:
    return f"\\x{{{ord(character):x}}}"


@contextmanager
def _naming(keyword: str) -> Iterator[None]:
    """What cannot be said in another's place is that keyword's fault."""
    try:
        yield
    except UnsupportedSchemaError as error:
        if error.keyword == keyword:
            raise
        why = f"it takes a `{error.keyword}`, and {error.reason}"
        raise UnsupportedSchemaError(keyword, why) from None
