"""An answer goes out, whole or piece by piece, for as long as the client stays.

`Reply` is what the routes for text return: it owns an `Exchange` and closes it whatever happens, so
that a client who leaves, or whose connection breaks, frees its pages within a step. A stream is
made of server-sent events (WHATWG HTML, section 9.2): chunks, comments while nothing comes, and
`[DONE]`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from cyclewise.errors import CyclewiseError
from cyclewise.serve.errors import describe

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from cyclewise.serve.layouts import Layout
    from cyclewise.serve.service import Exchange

log = logging.getLogger("cyclewise.serve")
COMMENT_SECONDS = 5.0
"""How long a stream may say nothing before it says that it is alive."""
_COMMENT = b": waiting\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes on what comes at once
]


class Reply(Response):
    """Answers, as an exchange brings them."""

    def __init__(self, exchange: Exchange, layout: Layout, *, stream: bool) -> None:
        self._exchange = exchange
        self._layout = layout
        self._stream = stream
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        write = self._write_stream if self._stream else self._write_whole
        writing = asyncio.create_task(write(scope, receive, send))
        watching = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({writing, watching}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            self._exchange.close()
            writing.cancel()
            watching.cancel()
            await asyncio.gather(writing, watching, return_exceptions=True)

    async def _write_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        deltas = await self._exchange.rest()

        def write() -> bytes:
            return _json(self._layout.whole(deltas, self._exchange.usage))

        scored = any(delta.prompt is not None for delta in deltas)  # then there may be much of it
        body = await asyncio.to_thread(write) if scored else write()
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _write_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})

        async def say(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async def say_all(events: list[dict[str, Any]]) -> None:
            for event in events:
                await say(_event(event))

        try:
            await say_all(self._layout.begin())
            while self._exchange.is_open:
                delta = await self._exchange.next(COMMENT_SECONDS)
                if delta is None:
                    await say(_COMMENT)
                else:
                    await say_all(self._layout.more(delta))
            await say_all(self._layout.finish(self._exchange.usage))
        except Exception as error:
            if not isinstance(error, CyclewiseError):
                log.exception("a stream failed")
            await say(_event(describe(error).body), more=False)
            return
        await say(self._layout.end, more=False)


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(value: dict[str, Any]) -> bytes:
    """An event; those of OpenAI's that have a type are named after it."""
    name = f"event: {value['type']}\n" if "type" in value else ""
    return b"%bdata: %b\n\n" % (name.encode(), _json(value))


def _json(value: object) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()
