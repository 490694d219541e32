"""The report as a page: a profile becomes one HTML file that needs nothing else.

`cyclewise profile --html` hands over the profile, the dictionary that `--json` prints. The file
holds it as JSON, with the scripts of `page/` that draw it; nothing is loaded from anywhere, and a
content security policy says so. Names in a profile may be hostile: here they cannot end the
JSON's element, and the scripts make them text nodes.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

_SCRIPTS = (
    "base.js", "model.js", "verdict.js", "token.js", "layers.js", "roofline.js", "change.js",
    "tables.js", "main.js",
)  # fmt: skip


def write_html(profile: Mapping[str, object], path: str | Path) -> None:
    """Writes the report of a profile (`clock/profile.py`) to `path`, replacing what is there.

    Raises:
        ValueError: a number of the profile is not finite; JSON has none such.
        OSError: the file cannot be written.
    """
    Path(path).write_text(page(profile), encoding="utf-8")


def page(profile: Mapping[str, object]) -> str:
    """The text of the report's file."""
    model = profile["model"]
    assert isinstance(model, Mapping)
    parts = {
        "title": html.escape(f"{model['name']} · Cyclewise"),
        "style": _asset("page.css"),
        "profile": _inert(profile),
        "script": "\n".join(_asset(name) for name in _SCRIPTS),
    }
    text, *rest = _asset("page.html").split("{{")
    for piece in rest:
        name, _, after = piece.partition("}}")
        text += parts[name] + after
    return text


def _asset(name: str) -> str:
    return (files("cyclewise.clock") / "page" / name).read_text(encoding="utf-8")


def _inert(profile: Mapping[str, object]) -> str:
    """JSON without `<`: neither `</script>` nor `<!--` can occur in it."""
    text = json.dumps(profile, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
