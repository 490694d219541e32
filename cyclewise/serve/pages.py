"""The pages for people: a chat that shows what its tokens cost, and the running batch.

They are files of `page/`, read once and sent as they are: what they show comes from the routes of
the API, as for any other client. A content security policy keeps them to this server: no script or
style but its own files, nothing from elsewhere, and no other page around them.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING

from starlette.responses import Response

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request

_PAGES = {"/": "chat.html", "/batch": "batch.html"}
_FOLDER = "/page/"
_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asked for again each time, and sent if it has changed
}


def is_page(path: str) -> bool:
    """Whether a browser comes here that has no key to send: it is asked for one."""
    return path in _PAGES or path.startswith(_FOLDER)


def add_pages(app: FastAPI) -> None:
    """Add the pages' routes."""
    folder = files("cyclewise.serve") / "page"
    contents = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    routes = _PAGES | {_FOLDER + name: name for name in contents if not name.endswith(".html")}
    for path, name in routes.items():
        app.add_route(path, _File(name, contents[name]).send, methods=["GET"])


class _File:
    def __init__(self, name: str, content: bytes) -> None:
        self._content = content
        self._tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        self._kind = f"{_KINDS[name.rpartition('.')[2]]}; charset=utf-8"

    async def send(self, request: Request) -> Response:
        headers = {**_HEADERS, "etag": self._tag}
        if request.headers.get("if-none-match") == self._tag:
            return Response(None, 304, headers)
        return Response(self._content, 200, headers, self._kind)
