"""What was predicted and what came of it: one line of JSON for each measured change.

`whatif` appends; nothing is ever rewritten. The file lies in the cache folder.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from cyclewise.paths import cache_dir


@dataclass(frozen=True, slots=True)
class Entry:
    """A prediction and its measurement, in seconds."""

    model: str
    cpu: str
    change: str
    prompt_tokens: int
    generate_tokens: int
    batch: int
    threads: int
    quantity: str
    """`time_to_first_token` or `time_per_token`."""
    predicted: float
    low: float
    high: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1


def ledger_path() -> Path:
    """Where the ledger lies."""
    return cache_dir() / "ledger.jsonl"


def append(entries: list[Entry]) -> None:
    """Adds lines; a folder that cannot be written raises OSError."""
    path = ledger_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    lines = [
        json.dumps({"date": date, **asdict(entry), "error": entry.error}) + "\n"
        for entry in entries
    ]
    with FileLock(f"{path}.lock"), path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def read() -> list[dict[str, Any]]:
    """All lines that can be read, the oldest first."""
    try:
        lines = ledger_path().read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    entries = []
    for line in lines:
        try:
            entries.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # a line that was cut short
            continue
    return entries
