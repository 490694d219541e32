"""Which tests of others' suites are expected to fail: the tables of docs/compatibility.md.

A row whose first cell is a test's id, as pytest writes it, names a deviation; without the brackets
of a parametrized test it means all its cases. As a plugin of pytest (`-p deviations`) it marks
those tests as expected to fail, strictly: one that passes is a failure, and so is a row that no
test belongs to. Where the reason begins with `CHANCE`, the test may pass as well.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
CHANCE = "by chance: "
_HEADING = re.compile(r"## .*\((\w+)\)")
_ROW = re.compile(r"\| `(.+?)` \| (.+) \|")


def read(text: str) -> dict[str, dict[str, str]]:
    """The deviations of each suite: why each of its tests fails. The heading of a suite's section
    ends with its name in parentheses. Raises ValueError if a test is named twice.
    """
    suites: dict[str, dict[str, str]] = {}
    suite = None
    for line in text.splitlines():
        if heading := _HEADING.fullmatch(line):
            suite = suites.setdefault(heading[1], {})
        elif (row := _ROW.fullmatch(line)) and suite is not None:
            if row[1] in suite:
                raise ValueError(f"{row[1]} is named twice")
            suite[row[1]] = row[2]
    return suites


def pytest_collection_modifyitems(items: list[Any]) -> None:
    import pytest

    wanted = read(DOCUMENT.read_text(encoding="utf-8"))[os.environ["SUITE"]]
    found = set()
    for item in items:
        for name in (item.nodeid, item.nodeid.partition("[")[0]):
            if name in wanted:
                found.add(name)
                strict = not wanted[name].startswith(CHANCE)
                item.add_marker(pytest.mark.xfail(reason=wanted[name], strict=strict))
    if missing := sorted(set(wanted) - found):
        raise pytest.UsageError(f"docs/compatibility.md names tests that are not there: {missing}")
