from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve.test_server import path  # noqa: F401 (a fixture)
from tests.soak import soak


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_every_request_is_answered_or_refused_exactly_once(path):  # noqa: F811
    """Some seconds of `make soak`."""
    report = soak(str(path), "--parallel", "2", "--threads", "1", count=60, seconds=5.0)
    assert report.wrong == []
    assert report.outcomes["answered"] > 10 and report.outcomes["cancelled"] > 3
