"""Who may ask, and at which door: keys, the address to listen at, the first gate of every request.

`Gate` stands before the application. It gives each request an id, asks for a key wherever there are
keys and the route is not `/health`, and refuses headers that are too long and, at a door without
keys, names of hosts that only a web page of somebody else would use (DNS rebinding).

Programs give a key as `Bearer`. A browser that opens a page of this server is asked for a name and
a password (`Basic`), the password being the key, and sends both with all that the page asks; also
with what pages of others ask, so that those are refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cyclewise.errors import InvalidParameterError
from cyclewise.serve.errors import RequestError, describe
from cyclewise.serve.limits import MAX_HEADER_BYTES
from cyclewise.serve.pages import is_page

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from cyclewise.serve.metrics import Metrics

log = logging.getLogger("cyclewise.serve")
OPEN_ROUTES = ("/health",)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHORTEST_KEY = 16


class Keys:
    """The keys that open the server; none: everyone may ask."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._secret = secrets.token_bytes(32)

    @classmethod
    def from_file(cls, path: Path) -> Keys:
        """One key a line; empty lines and those that begin with # are none.

        Raises InvalidParameterError if it cannot be read, holds no key, or a short one.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidParameterError(f"cannot read the keys {str(path)!r}: {error}") from None
        keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
        if not keys:
            raise InvalidParameterError(f"{str(path)!r} holds no key: write one on each line")
        if any(len(key) < _SHORTEST_KEY or not key.isascii() or " " in key for key in keys):
            raise InvalidParameterError(
                f"a key in {str(path)!r} is no key: it must have at least {_SHORTEST_KEY} ASCII "
                f"characters and no space"
            )
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def salt(self, given: str | None) -> bytes | None:
        """What the prefix cache is salted with for whoever gave this `Authorization` header; None
        if it opens nothing. Takes the same time for every wrong key.
        """
        if not self._digests:
            return b""
        scheme, _, key = (given or "").partition(" ")
        scheme = scheme.lower()
        if scheme == "basic":
            key = _password(key)
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = False
        for each in self._digests:
            found |= hmac.compare_digest(each, digest)
        if not found or scheme not in ("bearer", "basic"):
            return None
        return hmac.digest(self._secret, digest, "sha256")


def check_address(host: str, keys: Keys, insecure: bool) -> None:
    """Raise InvalidParameterError unless it is safe to listen there, or one says it shall be."""
    if not (is_loopback(host) or keys or insecure):
        raise InvalidParameterError(
            f"{host} can be reached from other computers, and there is no key: give --api-key-file,"
            f" or --insecure if everyone who reaches it may use it"
        )


def is_loopback(host: str) -> bool:
    """Whether only this computer can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Gate:
    """An ASGI application before another one."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics, *, local_only: bool) -> None:
        """local_only  refuse requests whose `Host` is not this computer"""
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._local_only = local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        request_id = headers.get("x-request-id", b"").decode("latin-1")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"req_{secrets.token_hex(16)}"
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            scope["state"]["salt"] = self._enter(scope, headers)
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if not isinstance(error, RequestError):
                log.exception("request %s failed", request_id)
            if not status:
                await _refuse(describe(error), scope, receive, send_with_id)
        finally:
            self._metrics.count_request(scope["path"], status)

    def _enter(self, scope: Scope, headers: dict[str, bytes]) -> bytes:
        """The salt of whoever asks."""
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > MAX_HEADER_BYTES:
            raise RequestError(431, f"the headers have more than {MAX_HEADER_BYTES} bytes")
        if "transfer-encoding" in headers and "content-length" in headers:
            # a proxy may have gone by the other one, and see two requests in this (RFC 9112, 6.1)
            raise RequestError(
                400, "give a content-length or a transfer-encoding", headers={"connection": "close"}
            )
        if self._local_only and not _is_local(headers.get("host", b"").decode("latin-1")):
            raise RequestError(421, "this server answers requests to localhost alone")
        given = headers.get("authorization", b"").decode("latin-1")
        salt = self._keys.salt(given)
        if salt is not None:
            if self._keys and given[:5].lower() == "basic" and _is_foreign(scope, headers):
                raise RequestError(403, "a page of another site may not ask in this one's name")
            return salt
        if scope["path"] in OPEN_ROUTES:
            return b""
        challenge = 'Basic realm="cyclewise", charset="UTF-8"' if is_page(scope["path"]) else None
        raise RequestError(
            401,
            "give a valid key: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"www-authenticate": challenge or "Bearer"},
        )


def _password(credentials: str) -> str:
    """Of Basic credentials (RFC 7617), whatever the name; none where they are malformed."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _is_foreign(scope: Scope, headers: dict[str, bytes]) -> bool:
    """Whether a browser asks on behalf of another site's page, other than to follow a link."""
    if scope["method"] in ("GET", "HEAD") and headers.get("sec-fetch-mode") == b"navigate":
        return False
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in (b"same-origin", b"none")
    origin = headers.get("origin")
    return origin is not None and origin.partition(b"://")[2] != headers.get("host")


def _is_local(host: str) -> bool:
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    return is_loopback(name.removeprefix("[").removesuffix("]").lower())


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    from starlette.responses import JSONResponse

    await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
