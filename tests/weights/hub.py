"""A local stand-in for the Hugging Face hub: serves a few files, and refuses in its ways."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONTENT = bytes(range(256)) * 4000
FILE = "/owner/repo/resolve/main/folder/model.gguf"
PARTS = {
    f"/owner/repo/resolve/main/folder/large-{part:05}-of-00003.gguf": bytes([part]) * 1000 * part
    for part in (1, 2, 3)
}
"""A model in three files."""
ALONE = FILE.replace("model", "alone-00001-of-00002")
"""The first of two files; the second is not there."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path))  # type: ignore[attr-defined]
        if path.startswith("/owner/gated/"):
            self.refuse(403, "GatedRepo")
        elif path.startswith("/owner/private/"):
            self.refuse(401, "RepoNotFound")
        elif path.startswith("/owner/busy/"):
            self.refuse(418, "Teapot")
        elif path in (FILE, ALONE):
            self.send(CONTENT if with_body else b"", hashlib.sha256(CONTENT).hexdigest())
        elif path in PARTS:
            content = PARTS[path]
            digest = hashlib.sha256(content).hexdigest()
            self.send(content if with_body else b"", digest, len(content))
        elif path == FILE.replace("model", "damaged"):
            damaged = CONTENT[:-1] + b"!"
            self.send(damaged if with_body else b"", hashlib.sha256(CONTENT).hexdigest())
        elif path == FILE.replace("model", "short"):
            self.send(CONTENT[:1000] if with_body else b"", "0123")
            self.close_connection = True
        else:
            self.refuse(404, "EntryNotFound")

    def send(self, body: bytes, etag: str, length: int = len(CONTENT)) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def stand_in() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The address of a running server, and the list of the requests it has answered."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.requests  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
