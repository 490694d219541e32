"""Other engines, each in a process of its own, driven in turns with ours.

`bench.py` and the scripts in `benchmarks/` come here with a peer's name, a model file and a thread
count, and get a `Peer` that times its own prefill and decode. The process runs `peer_worker.py` in
an interpreter that has the peer: the present one, or the one that CYCLEWISE_PEERS_PYTHON names,
because peers need packages that Cyclewise does not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import TracebackType
from typing import Any

from cyclewise.errors import InvalidParameterError, PeerError

ENVIRONMENT_VARIABLE = "CYCLEWISE_PEERS_PYTHON"
_WORKER = pathlib.Path(__file__).with_name("peer_worker.py")


@dataclass(frozen=True, slots=True)
class PeerKind:
    """What there is to know about a peer before it runs."""

    name: str
    module: str  # what an interpreter must be able to import
    install: str  # the command that installs it


PEERS = {
    kind.name: kind
    for kind in (
        PeerKind(
            "llama.cpp",
            "llama_cpp",
            'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python==0.3.36',
        ),
        PeerKind(
            "openvino",
            "openvino_genai",
            "pip install openvino-genai openvino-tokenizers",
        ),
    )
}


def peer_kind(name: str) -> PeerKind:
    """The peer of that name; InvalidParameterError with the nearest if there is none."""
    if name in PEERS:
        return PEERS[name]
    near = get_close_matches(name, PEERS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(PEERS)}."
    raise InvalidParameterError(f"unknown peer {name!r}: {hint}")


def find_interpreter(kind: PeerKind) -> str:
    """An interpreter that can import the peer; PeerError that says what to install if none can."""
    if importlib.util.find_spec(kind.module) is not None:
        return sys.executable
    advice = (
        f"install it with `{kind.install}`, here or in another environment, and set "
        f"{ENVIRONMENT_VARIABLE} to the path of that environment's python"
    )
    other = os.environ.get(ENVIRONMENT_VARIABLE)
    if not other:
        raise PeerError(f"{kind.name} is not installed beside {sys.executable}: {advice}.")
    probe = (
        "import importlib.util as u, sys; "
        f"sys.exit(0 if u.find_spec({kind.module!r}) is not None else 3)"
    )
    try:
        status = subprocess.run(
            [other, "-c", probe], stdin=subprocess.DEVNULL, capture_output=True, check=False
        ).returncode
    except OSError as error:
        raise PeerError(
            f"{ENVIRONMENT_VARIABLE} is {other!r}, which cannot be run: {error.strerror}."
        ) from None
    if status == 3:
        raise PeerError(f"{kind.name} is not installed beside {other}: {advice}.")
    if status != 0:
        raise PeerError(f"{ENVIRONMENT_VARIABLE} is {other!r}, which is not a working Python.")
    return other


class Peer:
    """One peer with one model loaded. A context manager; between calls its process is idle."""

    def __init__(
        self, name: str, model: str | os.PathLike[str], *, num_threads: int, context: int,
        **settings: Any,
    ) -> None:  # fmt: skip
        """Start the peer's process and load the model.

        context  tokens that its KV cache must hold
        settings of this peer alone: of llama.cpp `flash_attention=True`, not what is faster at load

        Raises PeerError if the peer is not installed, refuses the file (in its own words) or dies.
        """
        self.kind = peer_kind(name)
        interpreter = find_interpreter(self.kind)
        self._stderr = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [interpreter, str(_WORKER), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        self._answered: tuple[float, float] | None = None  # the last time: its CPU clock, our clock
        self.idle_seconds = 0.0  # between requests, so far
        self.idle_cpu_seconds = 0.0  # processor time that it used in them
        try:
            details = self._ask(
                "load", model=os.fspath(model), threads=num_threads, context=context, **settings
            )
        except BaseException:
            self.close()
            raise
        del details["cpu_seconds"]
        self.version: str = details.pop("version")
        self.details: dict[str, Any] = details  # whatever else the peer says of itself

    @property
    def cpu_seconds(self) -> float:
        """Processor time that its process had used when it last answered."""
        return self._answered[0] if self._answered else 0.0

    def prefill(self, token_ids: Sequence[int]) -> float:
        """Evaluate a prompt from an empty context; seconds until its last token's logits."""
        return float(self._ask("prefill", tokens=list(token_ids))["seconds"])

    def decode(self, before: Sequence[int], token_ids: Sequence[int]) -> float:
        """Evaluate `token_ids` one at a time after the context `before`; seconds for them all.

        OpenVINO GenAI takes only their number: it feeds itself with the tokens it generates.
        """
        answer = self._ask("decode", before=list(before), tokens=list(token_ids))
        return float(answer["seconds"])

    def write_logits(self, token_ids: Sequence[int], path: str | os.PathLike[str]) -> None:
        """Write the logits after every token, raw float32 (tokens, vocab_size). llama.cpp only."""
        self._ask("logits", tokens=list(token_ids), path=os.fspath(path))

    def _ask(self, command: str, **fields: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        asked = time.perf_counter()
        try:
            self._process.stdin.write(json.dumps({"command": command, **fields}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass  # it has died: its last words are told below
        if not line:
            raise PeerError(f"{self.kind.name} stopped during {command!r}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        start, end = answer["cpu_seconds"]
        if self._answered is not None:
            self.idle_cpu_seconds += start - self._answered[0]
            self.idle_seconds += asked - self._answered[1]
        self._answered = end, time.perf_counter()
        if "error" in answer:
            raise PeerError(f"{self.kind.name} refuses to {command}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr if line.strip()]
        return lines[-1] if lines else f"exit status {status}, without a word."

    def close(self) -> None:
        """End the peer's process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what was to be written has no reader
                    stream.close()
        self._stderr.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
