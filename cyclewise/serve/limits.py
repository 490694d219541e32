"""How much of a request is read, and what its JSON may hold: the first look at what comes in.

A body comes in as chunks of bytes; a dictionary goes out whose texts are whole Unicode, whose
numbers are finite and whose depth is bounded. `protocol.py` then says what the fields mean.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect

from cyclewise.errors import OverloadedError
from cyclewise.serve.errors import RequestError, bad

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_BODY_BYTES = 4 << 20
MAX_HELD_BYTES = 128 << 20
"""Of all bodies that are being read."""
MAX_HEADER_BYTES = 16 << 10
MAX_DEPTH = 200
"""Of lists and objects within one another: a schema has at most 64 within one another, with two
levels of JSON for each."""
MAX_VALUES = 50_000
"""Texts, names, lists and objects of a body; whole numbers, which token ids are, do not count."""
_BODY_SECONDS = 60.0
_SMALL = 1 << 16  # bytes that are read in less time than it takes to hand them to a thread


class Bodies:
    """Reads the bodies of requests, and knows how much of them is held at once."""

    def __init__(self, max_bytes: int = MAX_BODY_BYTES) -> None:
        """max_bytes  of a body"""
        self._max_bytes = max_bytes
        self._held = 0

    async def read_json(self, request: Request) -> dict[str, Any]:
        """The object that the body of a request holds.

        Raises RequestError: 413 where it is too long, 415 where it is not said to be JSON, 408
        where it does not come in time, 429 where too much comes at once, 400 where it is no JSON or
        none that can be meant.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(415, "the body must be JSON: set content-type to application/json")
        body = bytearray()
        try:
            await asyncio.wait_for(self._read(request, body), _BODY_SECONDS)
            if len(body) < _SMALL:
                return parse(body)
            return await asyncio.to_thread(parse, body)
        except TimeoutError:
            raise RequestError(408, "the body did not come in time", code="timeout") from None
        except ClientDisconnect:
            raise bad("the client left before its body was complete") from None
        finally:
            self._held -= len(body)

    async def _read(self, request: Request, body: bytearray) -> None:
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            raise _too_long(self._max_bytes)
        async for chunk in request.stream():
            if self._held + len(chunk) > MAX_HELD_BYTES:
                raise OverloadedError("too many long bodies are being read", 1.0)
            body += chunk
            self._held += len(chunk)
            if len(body) > self._max_bytes:
                raise _too_long(self._max_bytes)


def _too_long(max_bytes: int) -> RequestError:
    # what is still to come is not read
    return RequestError(
        413, f"the body is longer than {max_bytes} bytes", headers={"connection": "close"}
    )


def parse(body: bytes | bytearray) -> dict[str, Any]:
    """The object that a JSON text holds. Raises RequestError (400)."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise bad(f"the body is not UTF-8: byte {error.start} cannot be read") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise bad(f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad("the body must be a JSON object")
    _check(value)
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _too_deep(param: str | None = None) -> RequestError:
    return bad(f"the body is nested more than {MAX_DEPTH} levels deep", param)


def _check(value: dict[str, Any]) -> None:
    """Refuse what Python's reader lets through: half characters, NUL, infinities, depth."""
    todo: list[tuple[Any, tuple[str | int, ...]]] = [(value, ())]
    left = MAX_VALUES
    while todo:
        item, path = todo.pop()
        if isinstance(item, str):
            _check_text(item, path)
        elif isinstance(item, float):
            if item in (float("inf"), -float("inf")):
                raise bad("a number is too large", name(path))
        elif isinstance(item, dict | list):
            if len(path) >= MAX_DEPTH:
                raise _too_deep(name(path[:1]))
            values = item.values() if isinstance(item, dict) else item
            left -= sum(not isinstance(each, int) for each in values)
            if left < 0 or (isinstance(item, dict) and len(item) > left):
                raise bad(f"the body holds more than {MAX_VALUES} values", name(path[:1]))
            pairs = item.items() if isinstance(item, dict) else enumerate(item)
            todo += [(each, (*path, key)) for key, each in pairs if not isinstance(each, int)]
            if isinstance(item, dict):
                for key in item:
                    _check_text(key, path)


def _check_text(text: str, path: tuple[str | int, ...]) -> None:
    if "\0" in text:
        raise bad("a text holds the character NUL", name(path))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad("a text holds half a character (a lone surrogate)", name(path)) from None


def name(path: tuple[str | int, ...]) -> str | None:
    """A place in a body, as `param` says it: `messages[0].content`; None for the whole."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")[:200].encode(errors="replace").decode() or None
