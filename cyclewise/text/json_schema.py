"""A JSON schema, draft 2020-12, becomes one that `llguidance` follows to the letter.

In: the text of a schema as a user wrote it. Out: the text of an equivalent schema of those keywords
that the library follows exactly, without `$id`, anchors and references to elsewhere; or an error
that names the keyword which cannot be followed. `structure.py` calls `prepare`.

The library leaves some keywords out and refuses others. What can be said by means of the others is
rewritten (`json_schema_rules.py`); every keyword that is neither known here nor begins with `x-` is
refused, so that no constraint is silently lost. `format` and the keywords about content are
annotations, as the specification has it by default: they constrain nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from cyclewise.errors import InvalidParameterError, UnsupportedSchemaError

Schema = bool | dict[str, Any]

NOTHING = "json_schema allows nothing: no JSON text satisfies it"
DEEPEST = 64  # subschemas within one another
MOST_SUBSCHEMAS = 20_000  # read, or written

TYPES = ("null", "boolean", "object", "array", "number", "string", "integer")


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


ANNOTATIONS = words(
    "$schema $comment $vocabulary title description default examples deprecated readOnly writeOnly "
    "format contentEncoding contentMediaType contentSchema"
)
IN_PLACE = words("$id $anchor $dynamicAnchor $defs definitions")
"""Where things are: read by `Document`, and written anew."""

SINGLE = words(
    "additionalProperties items contains not if then else propertyNames unevaluatedItems "
    "unevaluatedProperties"
)
LISTS = words("allOf anyOf oneOf prefixItems")
MAPS = words("properties patternProperties $defs definitions dependentSchemas")
COUNTS = words(
    "maxLength minLength maxItems minItems maxProperties minProperties maxContains minContains"
)
NUMBERS = words("multipleOf maximum exclusiveMaximum minimum exclusiveMinimum")
OTHERS = words("type enum const pattern required uniqueItems dependentRequired $ref $dynamicRef")
KNOWN = SINGLE | LISTS | MAPS | COUNTS | NUMBERS | OTHERS | ANNOTATIONS | IN_PLACE

_DRAFTS = (
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "http://json-schema.org/draft-07/schema",
    "http://json-schema.org/draft-06/schema",
)
_SIBLINGS_COUNT = _DRAFTS[:2]  # before these, nothing counted beside a $ref


def prepare(text: str, *, expand_one_of: bool = False) -> dict[str, Any]:
    """The schema as the library is to be given it.

    expand_one_of  say of each branch of a `oneOf` that the others do not hold: for where the
                   library cannot see by itself that they exclude one another

    Raises UnsupportedSchemaError, which names the keyword, where it cannot be followed;
    InvalidParameterError where the text is no schema, allows nothing or is too large.
    """
    from cyclewise.text.json_schema_rules import Writer

    return Writer(Document(_parse(text)), expand_one_of=expand_one_of).write()


def without(schema: Any, reference: str) -> Any:
    """A prepared schema in which nothing satisfies what is referred to."""
    if isinstance(schema, list):
        return [without(each, reference) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema == {"$ref": reference}:
        return False
    return {
        key: value if key in ("const", "enum") else without(value, reference)
        for key, value in schema.items()
    }


def _parse(text: str) -> Schema:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        schema = json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise InvalidParameterError(f"json_schema is no JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise InvalidParameterError("json_schema must be a JSON object, true or false")
    return schema


def _too_deep() -> InvalidParameterError:
    return InvalidParameterError(f"json_schema is nested deeper than {DEEPEST} subschemas")


class Document:
    """A schema and all of its subschemas, checked, with what they can be referred to by."""

    def __init__(self, root: Schema) -> None:
        self.root = root
        self.draft = root.get("$schema", _DRAFTS[0]) if isinstance(root, dict) else _DRAFTS[0]
        self._resources: dict[str, Schema] = {"": root}
        self._anchors: dict[tuple[str, str], Schema] = {}
        self._dynamic: dict[str, int] = {}  # how many dynamic anchors have a name
        self._bases: dict[int, str] = {}  # of each subschema, by the identity of its dictionary
        self._read(root, "", 0)

    def resolve(self, node: dict[str, Any], key: str) -> Schema:
        """The subschema that the `$ref` or `$dynamicRef` of a subschema refers to.

        Where no two dynamic anchors have one name, the second is nothing but the first.
        """
        reference = node[key]
        base = self._bases[id(node)]
        if reference.startswith("#"):  # a URN as base would confuse `urljoin`
            url, fragment = base, reference[1:]
        else:
            url, fragment = urldefrag(urljoin(base, reference))
        if key == "$dynamicRef" and self._dynamic.get(unquote(fragment), 0) > 1:
            raise UnsupportedSchemaError(key, f"there is more than one $dynamicAnchor {fragment!r}")
        if url not in self._resources:
            raise UnsupportedSchemaError(key, f"{reference!r} refers to another document")
        if fragment and not fragment.startswith("/"):
            found = self._anchors.get((url, unquote(fragment)))
        else:
            found = self._at(self._resources[url], unquote(fragment))
        if isinstance(found, bool) or (isinstance(found, dict) and id(found) in self._bases):
            return found
        raise UnsupportedSchemaError(key, f"{reference!r} refers to no subschema")

    @staticmethod
    def _at(node: Any, pointer: str) -> Any:
        for part in pointer.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict):
                node = node.get(key)
            elif isinstance(node, list):
                node = node[int(key)] if key.isdecimal() and int(key) < len(node) else None
            else:
                return None
        return node

    def _read(self, node: Any, base: str, depth: int) -> None:
        if isinstance(node, bool):
            return
        if not isinstance(node, dict):
            raise InvalidParameterError(
                f"json_schema has {json.dumps(node)[:60]} where a schema should be"
            )
        if depth > DEEPEST:
            raise _too_deep()
        if len(self._bases) >= MOST_SUBSCHEMAS:
            raise InvalidParameterError(
                f"json_schema has more than {MOST_SUBSCHEMAS} subschemas: make it smaller"
            )
        if isinstance(identifier := node.get("$id"), str):
            base = urldefrag(urljoin(base, identifier)).url
            self._resources[base] = node
        self._bases[id(node)] = base
        for name in ("$anchor", "$dynamicAnchor"):
            if name in node:
                if not isinstance(node[name], str):
                    raise InvalidParameterError(f"json_schema is no schema: `{name}` is no name")
                self._anchors[base, node[name]] = node
        if "$dynamicAnchor" in node:
            name = node["$dynamicAnchor"]
            self._dynamic[name] = self._dynamic.get(name, 0) + 1
        _check(node, self.draft)
        for child in children(node):
            self._read(child, base, depth + 1)


def children(node: dict[str, Any]) -> Iterator[Any]:
    """The subschemas of a schema."""
    for key, value in node.items():
        if key in SINGLE:
            yield value
        elif key in LISTS:
            yield from value
        elif key in MAPS:
            yield from value.values()


def _check(node: dict[str, Any], draft: object) -> None:
    """Every keyword is known, and its value of the right kind."""
    if node.get("$schema", draft) != draft or str(draft).removesuffix("#") not in _DRAFTS:
        raise UnsupportedSchemaError(
            "$schema", f"{node.get('$schema', draft)!r} is not a draft known here"
        )
    for key, value in node.items():
        if key not in KNOWN:
            if not key.startswith("x-"):
                raise UnsupportedSchemaError(key, "it is not known")
        elif not _sound(key, value):
            raise InvalidParameterError(
                f"json_schema is no schema: `{key}` cannot be {json.dumps(value)[:60]}"
            )
    if "$ref" in node and str(draft).removesuffix("#") not in _SIBLINGS_COUNT:
        beside = [key for key in node if key in KNOWN - ANNOTATIONS - IN_PLACE - {"$ref"}]
        if beside:
            raise UnsupportedSchemaError(beside[0], "in this draft, nothing counts beside `$ref`")


def _sound(key: str, value: Any) -> bool:
    if key in LISTS:
        return isinstance(value, list) and bool(value)
    if key in MAPS:
        return isinstance(value, dict)
    if key in COUNTS:
        return is_number(value) and value >= 0 and value == int(value)
    if key in NUMBERS:
        return is_number(value) and (key != "multipleOf" or value > 0)
    match key:
        case "type":
            names = value if isinstance(value, list) else [value]
            return bool(names) and all(name in TYPES for name in names)
        case "enum":
            return isinstance(value, list)
        case "required":
            return _are_strings(value)
        case "dependentRequired":
            return isinstance(value, dict) and all(map(_are_strings, value.values()))
        case "uniqueItems":
            return isinstance(value, bool)
        case "$ref" | "$dynamicRef" | "$id" | "$anchor" | "$dynamicAnchor" | "pattern" | "$schema":
            return isinstance(value, str)
    return True


def is_number(value: object) -> bool:
    """Whether a JSON value is a number; to Python, true is one too."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
