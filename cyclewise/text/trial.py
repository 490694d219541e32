"""Structures are tried out in a process that can be killed, before this one follows them.

The library that follows structures cannot be interrupted, and some texts keep it busy for minutes
or take all memory: a `multipleOf` of eight digits, patterns that must hold at once. So a child
process reads the model's vocabulary once, and makes a copy of itself (`fork`) for each text, with a
limit of time and memory; what comes through can be compiled here. `structure.py` asks.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from concurrent.futures import TimeoutError as LateError
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cyclewise.errors import CyclewiseError, InvalidParameterError
from cyclewise.text.process import Child, read_frame, write_frame

if TYPE_CHECKING:
    from cyclewise.text.structure import Structures

SECONDS = 1.25
"""For a text to be compiled."""
_GRACE = 0.15  # seconds for the answer to come
MOST_BYTES = 256 << 20
"""That a text may be compiled to."""
_FORKS = hasattr(os, "fork")


class Trials:
    """Any thread may ask; several texts may be under way at once."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Start the child; it takes as long to be ready as reading the vocabulary does.

        path        the model's, as it was loaded
        vocab_size  the number of logits of a token
        """
        self._arguments = [str(path), str(vocab_size)]
        self._lock = threading.Lock()
        self._num_asked = 0
        self._child = self._start()

    def wait(self) -> None:
        """Return when the child is ready. Raises EngineError if it has ended."""
        self._child.ready.result()

    def run(self, kind: str, text: str) -> int:
        """The bytes that a text is compiled to.

        Raises InvalidParameterError if that takes too long or too much memory. What is wrong with
        it otherwise is not said: whoever compiles it finds out, in as little time.
        """
        with self._lock:
            if self._child.ended:
                self._child.close()
                self._child = self._start()
            child = self._child
            self._num_asked += 1
            number = self._num_asked
        child.ready.result()
        answer = child.ask(number, {"kind": kind, "text": text})
        try:
            return answer.result(SECONDS + _GRACE)[0] << 10
        except LateError:
            child.forget(number)
            if not _FORKS:
                child.kill()
            raise InvalidParameterError(
                f"{kind} takes more than {SECONDS} seconds or {MOST_BYTES >> 20} MiB to be "
                f"compiled: make it simpler"
            ) from None

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def _start(self) -> Child:
        return Child("cyclewise.text.trial", self._arguments, single_threaded=True)


# In the child


def serve(path: str, vocab_size: str) -> None:
    """Try out the texts of standard input until it ends."""
    from cyclewise.text.structure import Structures
    from cyclewise.text.tokenizer import Tokenizer
    from cyclewise.weights.source import open_source

    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with open_source(path) as source:
        tokenizer = Tokenizer.from_metadata(source.metadata)
    structures = Structures(tokenizer, int(vocab_size))
    structures.compile("json_schema", "{}")  # so that no copy has to import what this one has
    gc.freeze()
    if _FORKS:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    write_frame(output, 0, b"")
    while frame := read_frame(sys.stdin.buffer):
        if _FORKS and os.fork():
            continue
        number, request = frame
        size = _try(structures, **json.loads(request))
        write_frame(output, number, np.array([size], "<i4").tobytes())
        if _FORKS:
            os._exit(0)


def _try(structures: Structures, kind: str, text: str) -> int:
    """The kibibytes that a text is compiled to."""
    if not _FORKS:
        with suppress(CyclewiseError):
            structures.compile(kind, text)
        return 0
    import resource

    signal.setitimer(signal.ITIMER_REAL, SECONDS)  # ends the process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = _memory()
    if before:
        resource.setrlimit(resource.RLIMIT_AS, (before + MOST_BYTES, resource.RLIM_INFINITY))
    try:
        compiled = structures.compile(kind, text)  # held while its size is read
    except CyclewiseError:
        return 0
    except MemoryError:
        os._exit(1)
    size = _memory() - before
    del compiled
    return size >> 10


def _memory() -> int:
    """Bytes of this process's address space, where the system says so."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
