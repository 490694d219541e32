"""The list of what deviates in others' suites; `make test-clients` runs the suites themselves."""

from __future__ import annotations

import pytest

from tests.clients import deviations, run


def test_the_list():
    listed = deviations.read(deviations.DOCUMENT.read_text(encoding="utf-8"))
    assert list(listed) == list(run.SUITES)
    reasons = [why for rows in listed.values() for why in rows.values()]
    assert reasons and all(len(why) > 20 for why in reasons)


def test_a_test_is_named_once():
    row = "| `a::b` | because |"
    assert deviations.read(f"## X (x)\n{row}\n") == {"x": {"a::b": "because"}}
    with pytest.raises(ValueError, match="named twice"):
        deviations.read(f"## X (x)\n{row}\n{row}\n")
