"""The server's life: a socket, a model, uvicorn, and the end.

Called by `cyclewise serve`. The address is taken before the model is loaded, so that one that is
taken is known at once. SIGTERM and Ctrl-C end it: nothing new is taken on, what runs may end within
`drain` seconds, and the process exits with 0.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cyclewise.engine.request import check_integer, check_number
from cyclewise.errors import CyclewiseError, InvalidParameterError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

    from cyclewise.models import Model
    from cyclewise.serve.security import Keys
    from cyclewise.serve.service import Service

SEQUENCES = 8
"""Requests of the whole context that the KV cache holds at once."""
_TEMPLATES = "tokenizer.chat_template"
_HEADER_BYTES = 64 << 10  # beyond which a connection is closed
_FILES = 4096  # that the process may have open, where the system lets it


@dataclass(frozen=True, slots=True)
class Settings:
    """What one may choose of a server."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    api_key_file: Path | None = None
    insecure: bool = False  # a public address without keys
    cors: Sequence[str] = ()
    names: Sequence[str] = ()  # of the model; none: as it was asked for
    context: int | None = None  # most tokens of a request; None: the model's own, at most 4096
    sequences: int = SEQUENCES
    threads: int | None = None
    kv: str = "f16"  # what the KV cache holds: see `load_model`
    adapters: Mapping[str, str] = field(default_factory=dict)  # paths of LoRA adapters by name
    quantize: str | None = None  # see `load_model`
    drain: float = 30.0  # seconds


def serve(model: str, settings: Settings) -> None:
    """Load a model and answer until a signal ends it.

    Raises CyclewiseError if it cannot begin, OSError if the address cannot be had.
    """
    for package in ("fastapi", "llguidance", "prometheus_client", "uvicorn"):
        if find_spec(package) is None:
            raise CyclewiseError(
                f"serving needs the package {package}, which is not installed: "
                f"pip install 'cyclewise[serve]'"
            )
    from cyclewise.serve.security import Keys, check_address

    check_integer("port", settings.port, 0, 65535, "0: any that is free")
    check_integer("parallel", settings.sequences, 1, 4096, "requests of the whole context")
    check_number("drain", settings.drain, 0, 86400, "seconds")
    path = settings.api_key_file
    keys = Keys() if path is None else Keys.from_file(path)
    check_address(settings.host, keys, settings.insecure)
    with closing(_socket(settings.host, settings.port)) as listener:
        service = load(model, settings)
        try:
            _run(service, settings, keys, listener)
        finally:
            service.close()


def load(model: str, settings: Settings) -> Service:
    """Load a model, and start the engine's thread and the process that reads prompts."""
    from cyclewise.machine.names import cache_kind
    from cyclewise.models import load_model
    from cyclewise.weights.sources import resolve

    names, kind = settings.names or [_name(model)], cache_kind(settings.kv)
    for name in settings.adapters:
        if name in names:
            raise InvalidParameterError(
                f"the model and an adapter are both called {name!r}: give one of them another name"
            )
    loaded = load_model(
        resolve(model), context=settings.context, threads=settings.threads, kv=kind,
        adapters=settings.adapters, quantize=settings.quantize, sequences=settings.sequences,
    )  # fmt: skip
    try:
        return _service(names, list(settings.adapters), loaded)
    except BaseException:
        loaded.close()
        raise


def _service(names: Sequence[str], adapters: Sequence[str], loaded: Model) -> Service:
    from cyclewise.clock.live import LiveClock
    from cyclewise.engine.engine import Engine
    from cyclewise.serve.service import Service
    from cyclewise.text.process import TextProcess
    from cyclewise.text.structure import Structures
    from cyclewise.text.tokenizer import Tokenizer
    from cyclewise.text.trial import Trials

    template = loaded.metadata.get("tokenizer.chat_template")
    templates = [value for key, value in loaded.metadata.items() if key.startswith(_TEMPLATES)]
    with ExitStack() as opened:
        prompts = TextProcess(loaded.path)
        opened.callback(prompts.close)
        tokenizer = Tokenizer.from_metadata(loaded.metadata)
        structures = None
        if tokenizer.stop_ids:
            trials = Trials(loaded.path, loaded.config.vocab_size)
            opened.callback(trials.close)
            # now, since it holds Python's lock for as long as it takes
            structures = Structures(tokenizer, loaded.config.vocab_size, trials)
            trials.wait()
        prompts.encode("").result()  # it has read the model by then
        service = Service(
            names[0], Engine(loaded), tokenizer, prompts,
            template=template if isinstance(template, str) else None, aliases=names[1:],
            adapters=adapters, timeless="strftime_now" not in str(templates),
            structures=structures, threads_alive=lambda: loaded.machine.threads.alive,
            clock=LiveClock(loaded.machine), on_close=loaded.close,
        )  # fmt: skip
        opened.pop_all()
        return service


def _name(model: str) -> str:
    """What requests call a model: as it was asked for, or a file's name."""
    path = Path(model)
    return path.name.removesuffix(".gguf") if path.exists() else model


def _socket(host: str, port: int) -> socket.socket:
    from cyclewise.serve.connection import SEND_BUFFER

    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        raise InvalidParameterError(f"cannot listen at {host} port {port}: {error}") from None
    return listener


def uvicorn_config(app: ASGIApp, drain: float) -> uvicorn.Config:
    """How uvicorn is to serve the application."""
    import uvicorn

    from cyclewise.serve.connection import Connection

    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # what no client can bring about
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_graceful_shutdown=max(1, round(drain)),
    )


def _allow_files() -> None:
    """Let the process have a file open for each connection."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _run(service: Service, settings: Settings, keys: Keys, listener: socket.socket) -> None:
    import uvicorn

    from cyclewise.serve.app import make_app
    from cyclewise.serve.security import is_loopback

    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of clients that have left
    local_only = is_loopback(settings.host) and not keys
    app = make_app(service, keys, local_only=local_only, cors=settings.cors)
    _allow_files()
    config = uvicorn_config(app, settings.drain)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            with suppress(OSError):  # a full disk; Python would keep it, and fail at the end too
                os.write(1, f"serving {service.name} at http://{shown}:{port}/v1\n".encode())

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            service.draining = True
            await super().shutdown(sockets)

    # uvicorn raises the signal that ended it once more, for whoever handled it before
    before = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(Server(config).serve([listener]))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(number: int, frame: object) -> None:
    """A handler that does nothing."""
