"""The process of a peer: what it is asked, what goes wrong, and what our errors then say."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest

from cyclewise.bench import peer_worker, peers
from cyclewise.errors import InvalidParameterError, PeerError

MISSING = peers.PeerKind("gone", "no_such_module_anywhere", "pip install gone==1")


def test_a_peer_answers(fake_peer: str) -> None:
    with peers.Peer(fake_peer, "model.gguf", num_threads=3, context=99) as peer:
        assert peer.version == "1.2"
        assert peer.details == {"seen": [3, 99]}
        assert peer.prefill([1, 2, 3]) == 0.5
        assert peer.decode([], [1, 2]) == 0.5
        assert peer.idle_cpu_seconds < 0.1


def test_a_refusal_keeps_the_peers_words(fake_peer: str) -> None:
    with pytest.raises(PeerError, match="fake refuses to load: the tensor table is of cheese"):
        peers.Peer(fake_peer, "refused.gguf", num_threads=1, context=8)


def test_a_crash_is_told_with_its_last_words(fake_peer: str) -> None:
    with pytest.raises(PeerError, match="fake stopped during 'load': out of cheese"):
        peers.Peer(fake_peer, "crash.gguf", num_threads=1, context=8)


def test_an_unknown_peer_gives_the_nearest() -> None:
    with pytest.raises(InvalidParameterError, match=r"did you mean 'llama\.cpp'"):
        peers.peer_kind("llamacpp")


def test_a_missing_peer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(peers.ENVIRONMENT_VARIABLE, raising=False)
    with pytest.raises(PeerError, match=r"pip install gone==1.*CYCLEWISE_PEERS_PYTHON"):
        peers.find_interpreter(MISSING)


def test_the_present_interpreter_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(peers.ENVIRONMENT_VARIABLE, "/no/such/python")
    assert peers.find_interpreter(peers.PeerKind("here", "json", "")) == sys.executable


def test_the_other_interpreter_must_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(peers.ENVIRONMENT_VARIABLE, sys.executable)
    with pytest.raises(PeerError, match="gone is not installed beside"):
        peers.find_interpreter(MISSING)


@pytest.mark.parametrize("content", [None, "#!/bin/sh\nexit 1\n"])
def test_the_other_interpreter_must_be_one(
    content: str | None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "python"
    if content is not None:
        path.write_text(content)
        path.chmod(0o755)
    monkeypatch.setenv(peers.ENVIRONMENT_VARIABLE, str(path))
    with pytest.raises(PeerError, match=r"cannot be run|not a working Python"):
        peers.find_interpreter(MISSING)


class Grumpy:
    """A peer inside the worker: says no in two ways."""

    def load(self, model: str) -> dict[str, str]:
        if model == "refused":
            raise peer_worker.Refused("no")
        return {"version": str(1 // len(model))}


def test_the_worker_answers_every_line() -> None:
    requests = [{"command": "load", "model": name} for name in ("refused", "", "a")]
    answers: list[dict[str, object]] = []
    peer_worker.serve(Grumpy(), map(json.dumps, requests), answers.append)
    for answer in answers:
        assert len(answer.pop("cpu_seconds")) == 2  # type: ignore[arg-type]
    assert answers == [
        {"error": "no"},
        {"error": "ZeroDivisionError: integer division or modulo by zero"},
        {"version": "1"},
    ]
