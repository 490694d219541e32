from __future__ import annotations

import pathlib

import pytest

from cyclewise.bench import peers


@pytest.fixture
def fake_peer(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a peer that any interpreter has."""
    monkeypatch.setattr(peers, "_WORKER", pathlib.Path(__file__).with_name("fake_worker.py"))
    kind = peers.PeerKind("fake", "json", "pip install fake")
    monkeypatch.setattr(peers, "PEERS", {"fake": kind})
    return "fake"
