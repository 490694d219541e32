"""One connection: what uvicorn lets pass that a hostile client could hold the server up with.

uvicorn reads HTTP and calls the application; it sets no time limit for a request's head, nor for a
client that takes nothing of its answer, and does not look at a client that has sent its next
request too early. `Connection` stands in its place (`server.py` names it) and closes all three.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from cyclewise.serve.errors import RequestError

MAX_CONNECTIONS = 1000
"""Beyond these the one that has waited for longest without a request makes room."""
HEAD_SECONDS = 10.0
"""In which the head of a request must have come, from its first byte or the connection on."""
STALL_SECONDS = 30.0
"""In which a client that is behind must take enough to be written to again, or the last bytes."""
SEND_BUFFER = 128 << 10
"""Bytes that the system keeps of what a client has not taken; Python keeps 64 KiB more."""


def _refusal(status: int, phrase: str, message: str, code: str | None = None) -> bytes:
    body = json.dumps(RequestError(status, message, code=code).body).encode()
    head = (
        f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


_LATE = _refusal(408, "Request Timeout", "the headers did not come in time", "timeout")
_FULL = _refusal(503, "Service Unavailable", f"{MAX_CONNECTIONS} connections are being answered")


class Connection(H11Protocol):
    """uvicorn's, with limits of time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._late: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._idle_since = self.loop.time()

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS and not self._make_room():
            transport.write(_FULL)
            transport.close()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        for timer in (self._late, self._stalled):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self.is_busy and self.conn.their_state is h11.DONE:
            # The next request, too early. uvicorn would stop to read, and not see a client leave.
            self.cycle.keep_alive = False
            return
        super().data_received(data)
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_progress()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._expect_progress()

    def send_400_response(self, msg: str) -> None:
        """Of what is no HTTP: of a body, too, whose request is being refused or was answered."""
        if self.is_busy:
            self.cycle.disconnected = True  # what it has to say cannot be said any more
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()
        self._expect_progress()

    def _make_room(self) -> bool:
        others = [each for each in self.connections if isinstance(each, Connection)]
        idle = [each for each in others if not each.is_busy and each is not self]
        if idle:
            min(idle, key=_idle_since).transport.abort()
        return bool(idle)

    def _watch(self) -> None:
        if self.is_busy:
            if self._late is not None:
                self._late.cancel()
                self._late = None
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self._end_late)

    def _end_late(self) -> None:
        if self.conn.our_state is h11.IDLE and not self.transport.is_closing():
            self.transport.write(_LATE)
        self.transport.close()
        self._expect_progress()

    def _expect_progress(self) -> None:
        if self._stalled is None:
            self._stalled = self.loop.call_later(STALL_SECONDS, self._end_stalled)

    def _end_stalled(self) -> None:
        self._stalled = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()


def _idle_since(connection: Connection) -> float:
    return connection._idle_since
