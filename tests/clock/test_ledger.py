from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from cyclewise.clock.ledger import Entry, append, ledger_path, read

ENTRY = Entry(
    model="m.gguf", cpu="c", change="threads=1", prompt_tokens=512, generate_tokens=64, batch=1,
    threads=1, quantity="time_per_token", predicted=0.011, low=0.009, high=0.013, measured=0.010,
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CYCLEWISE_CACHE", str(tmp_path / "not" / "yet"))


def test_nothing_was_predicted_yet():
    assert read() == []


def test_a_prediction_lies_beside_its_measurement():
    append([ENTRY])
    append([replace(ENTRY, quantity="time_to_first_token", measured=0.022), ENTRY])
    entries = read()
    assert [entry["error"] for entry in entries] == pytest.approx([0.1, -0.5, 0.1])
    assert entries[1]["quantity"] == "time_to_first_token"
    assert entries[0]["date"].endswith("+00:00")
    assert (entries[0]["low"], entries[0]["high"]) == (0.009, 0.013)


def test_what_is_written_stays(monkeypatch):
    append([ENTRY])
    before = ledger_path().read_bytes()
    append([ENTRY])
    assert ledger_path().read_bytes().startswith(before)


def test_a_line_that_was_cut_short_hides_no_other():
    append([ENTRY])
    with ledger_path().open("a") as file:
        file.write('{"date": "20\n17\n[1]\n\n')
    append([ENTRY])
    assert [entry["change"] for entry in read()] == ["threads=1"] * 2


def test_two_that_write_at_once_both_write():
    def write():
        for _ in range(20):
            append([ENTRY, ENTRY])

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read()) == 160
