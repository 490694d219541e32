"""Text becomes token ids in a process of its own, so that no answer waits for another's prompt.

Rendering a template and encoding a long prompt take tens of milliseconds, in which a thread of this
process would hold Python's lock, or take it whenever the engine's thread lets go of it. So a child
process does both, on the model's own files; requests and ids go through pipes. A server asks here
for the ids that it makes a job of (`engine/job.py`); the number of prompts under way is limited.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cyclewise import errors
from cyclewise.errors import CyclewiseError, EngineError, OverloadedError

if TYPE_CHECKING:
    from cyclewise.text.chat import ChatTemplate
    from cyclewise.text.tokenizer import Tokenizer

_THREADS = 4
"""Of the child: a template that takes its whole second holds up no other prompt for long."""
_CLOSE_SECONDS = 5.0
_LENGTH = struct.Struct("<Q")
_NUMBER = struct.Struct("<q")  # of a request; of one that failed, minus that
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from importlib import import_module; import_module(sys.argv[2]).serve(*sys.argv[3:])"
)
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class TextProcess:
    """Encodes prompts for one model. Any thread may ask; what is given back is to be waited for."""

    def __init__(self, path: Path, max_pending: int = 64) -> None:
        """Start the child; it takes a second or two to be ready.

        path         the model's, as it was loaded
        max_pending  prompts that may be under way at once
        """
        self._path = path
        self._max_pending = max_pending
        self._lock = threading.Lock()
        self._num_asked = 0
        self._closed = False
        self._child = self._start()

    @property
    def ready(self) -> bool:
        """Whether a prompt would be read at once. A child that has ended is replaced."""
        with self._lock:
            if not self._closed:
                self._replace()
            return self._child.is_ready

    def encode(self, text: str, *, add_special: bool = True) -> Future[list[int]]:
        """The ids of a text, as `Tokenizer.encode` makes them: the future has them, or the error.

        Raises OverloadedError if too many prompts are under way.
        """
        return self._ask({"text": text, "add_special": add_special})

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], **variables: Any
    ) -> Future[list[int]]:
        """The ids of a chat, as `ChatTemplate.render` and `Tokenizer.encode_chat` make them of
        values that JSON can hold.
        """
        return self._ask({"messages": messages, "variables": variables})

    def close(self) -> None:
        """End the child. What it has not answered by then ends with EngineError."""
        with self._lock:
            self._closed = True
        self._child.close()

    def _ask(self, request: dict[str, Any]) -> Future[list[int]]:
        with self._lock:
            if self._closed:
                raise EngineError("the process that reads prompts was closed")
            self._replace()
            if self._child.num_pending >= self._max_pending:
                raise OverloadedError(f"{self._max_pending} prompts wait to be read", 1.0)
            self._num_asked += 1
            return self._child.ask(self._num_asked, request)

    def _replace(self) -> None:
        if self._child.ended:
            self._child.close()
            self._child = self._start()

    def _start(self) -> Child:
        return Child("cyclewise.text.process", [str(self._path)])


class Child:
    """One child process, from its start to its end: requests in JSON go in, whole numbers or an
    error come out.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], *, single_threaded: bool = False
    ) -> None:
        """Start it.

        module           whose `serve`, given the arguments, answers the requests of standard input
        single_threaded  libraries start no threads in it: it may make copies of itself
        """
        command = [sys.executable, "-c", _START, json.dumps(sys.path), module, *arguments]
        # a session of its own: Ctrl-C is the parent's, and the child ends when its input does
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            env={**os.environ, **_ONE_THREAD} if single_threaded else None,
        )  # fmt: skip
        self.ready: Future[None] = Future()  # done when it has begun to answer, or has ended
        self._lock = threading.Lock()
        self._pending: dict[int, Future[list[int]]] = {}
        self.ended = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="cyclewise-text-in")
        self._reader = threading.Thread(target=self._read, name="cyclewise-text-out", daemon=True)
        self._reader.start()

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    @property
    def is_ready(self) -> bool:
        return self.ready.done() and not self.ended

    def ask(self, number: int, request: dict[str, Any]) -> Future[list[int]]:
        future: Future[list[int]] = Future()
        with self._lock:
            if self.ended:
                future.set_exception(_ended())
                return future
            self._pending[number] = future
        self._writer.submit(self._write, number, request)
        return future

    def forget(self, number: int) -> None:
        """What was asked is wanted no more."""
        with self._lock:
            self._pending.pop(number, None)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def _write(self, number: int, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            data = json.dumps(request).encode()
        except (TypeError, ValueError) as error:
            self._resolve(number, CyclewiseError(f"a prompt is no JSON: {error}"))
            return
        try:
            write_frame(self._process.stdin, number, data)
        except (OSError, ValueError):
            return  # it has ended, or was closed: the reader finds out

    def _read(self) -> None:
        import numpy as np

        assert self._process.stdout is not None
        while frame := read_frame(self._process.stdout):
            number, data = frame
            if number == 0:
                self.ready.set_result(None)
            elif number > 0:
                self._resolve(number, np.frombuffer(data, "<i4").tolist())
            else:
                name, message = json.loads(data)
                kind = getattr(errors, name, EngineError)
                self._resolve(-number, kind(message))
        with self._lock:
            self.ended = True
        if not self.ready.done():
            self.ready.set_exception(_ended())
        for number in list(self._pending):
            self._resolve(number, _ended())

    def _resolve(self, number: int, answer: list[int] | Exception) -> None:
        with self._lock:
            future = self._pending.pop(number, None)
        if future is None or not future.set_running_or_notify_cancel():
            return
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def close(self) -> None:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        self._writer.submit(process.stdin.close)  # behind what is still to be written
        try:
            process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # a write that waits for it fails then
            process.wait()
        self._writer.shutdown()
        self._reader.join()
        process.stdout.close()


def _ended() -> EngineError:
    return EngineError("a process of the server's has ended: ask again")


def write_frame(pipe: IO[bytes], number: int, data: bytes) -> None:
    """Write an answer, or a request; with the number 0: that the child has begun to answer."""
    pipe.write(_LENGTH.pack(len(data)) + _NUMBER.pack(number) + data)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> tuple[int, bytes] | None:
    """A number and what belongs to it; None at the end."""
    head = pipe.read(_LENGTH.size + _NUMBER.size)
    if len(head) < _LENGTH.size + _NUMBER.size:
        return None
    (length,), (number,) = _LENGTH.unpack(head[:8]), _NUMBER.unpack(head[8:])
    data = pipe.read(length)
    return (number, data) if len(data) == length else None


# In the child


def serve(path: str) -> None:
    """Answer the requests of standard input until it ends."""
    from cyclewise.text.tokenizer import Tokenizer
    from cyclewise.weights.source import open_source

    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nobody else's words among the answers
    with open_source(path) as source:
        metadata = source.metadata
    reader = _Reader(metadata, Tokenizer.from_metadata(metadata), output)
    write_frame(output, 0, b"")
    with ThreadPoolExecutor(_THREADS) as pool:
        while frame := read_frame(sys.stdin.buffer):
            pool.submit(reader.answer, *frame)


class _Reader:
    """Reads prompts as the model does."""

    def __init__(self, metadata: dict[str, Any], tokenizer: Tokenizer, output: IO[bytes]) -> None:
        self._metadata, self._tokenizer, self._output = metadata, tokenizer, output
        self._template: ChatTemplate | None = None
        self._lock = threading.Lock()

    def answer(self, number: int, data: bytes) -> None:
        import numpy as np

        try:
            token_ids = self._encode(json.loads(data))
            found = np.array(token_ids, "<i4").tobytes()
        except Exception as error:
            number = -number
            name = type(error).__name__ if isinstance(error, CyclewiseError) else "EngineError"
            message = str(error) if isinstance(error, CyclewiseError) else repr(error)
            found = json.dumps([name, message]).encode()
        with self._lock:
            write_frame(self._output, number, found)

    def _encode(self, request: dict[str, Any]) -> list[int]:
        if "text" in request:
            return self._tokenizer.encode(request["text"], add_special=request["add_special"])
        with self._lock:
            if self._template is None:
                from cyclewise.text.chat import ChatTemplate

                self._template = ChatTemplate.for_model(self._metadata, self._tokenizer)
        rendered = self._template.render(request["messages"], **request["variables"])
        return self._tokenizer.encode_chat(rendered)
