"""Which JSON schemas are followed: the verdicts over the specification's test suite.

    python benchmarks/schema_suite.py ../shared/data/json-schema-test-suite

Writes the table of `docs/structured.md`, between its marks. A test counts as followed when its
schema is not refused; `tests/text/test_json_schema.py` proves that no verdict is wrong then.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from cyclewise.errors import InvalidParameterError, UnsupportedSchemaError
from cyclewise.text.structure import Structures

DOCUMENT = Path(__file__).parent.parent / "docs" / "structured.md"
BEGIN, END = "<!-- suite -->\n", "<!-- end of suite -->"


class _Bytes:
    """A vocabulary of bytes: verdicts do not depend on it."""

    stop_ids = frozenset({256})

    def all_bytes(self) -> list[bytes]:
        return [*(bytes([byte]) for byte in range(256)), b"\xff<end>"]

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        return list(text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("suite", type=Path)
    options = parser.parse_args()
    structures = Structures(_Bytes(), 257)  # type: ignore[arg-type]
    refused: Counter[str] = Counter()
    why: dict[str, Counter[str]] = {}
    total = 0
    for file in sorted((options.suite / "tests" / "draft2020-12").glob("*.json")):
        for group in json.loads(file.read_text(encoding="utf-8")):
            total += (count := len(group["tests"]))
            try:
                structures.compile("json_schema", json.dumps(group["schema"]))
            except UnsupportedSchemaError as error:
                refused[error.keyword] += count
                why.setdefault(error.keyword, Counter())[error.reason] += count
            except InvalidParameterError as error:  # nothing satisfies it, which is a verdict
                assert "allows nothing" in str(error), (group, error)
    structures.close()
    followed = total - refused.total()
    lines = [
        f"Of the {total} required tests of draft 2020-12, the schemas of {followed} "
        f"({followed / total:.1%}) are followed, with no wrong verdict; those of "
        f"{refused.total()} ({refused.total() / total:.1%}) are refused:",
        "",
        "| keyword | tests | share | for example |",
        "|---|---|---|---|",
    ]
    for keyword, count in refused.most_common():
        reason = why[keyword].most_common(1)[0][0].replace("|", "\\|")
        lines.append(f"| `{keyword}` | {count} | {count / total:.1%} | {reason} |")
    table = "\n".join(lines) + "\n"
    document = DOCUMENT.read_text(encoding="utf-8")
    before, rest = document.split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table + END + rest.split(END)[1], encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
