"""What a person sees of a profile in a terminal: at most 40 lines of 80 columns.

`cyclewise profile` and `cyclewise diff` come here; the pictures are drawn elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from cyclewise.machine.names import collapsed

if TYPE_CHECKING:
    from rich.console import Console

    from cyclewise.clock.diff import Difference

WIDTH = 80
_BAR = 16
_ROWS = {"decode": 9, "prefill": 6}
_STYLES = {"matmul": "blue", "activation": "green", "memory": "magenta", "host": "yellow"}


def print_profile(profile: dict[str, Any], console: Console | None = None) -> None:
    """Prints the report."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(width=WIDTH, highlight=False)

    def say(text: str | Text = "", style: str = "") -> None:
        console.print(text, style=style, overflow="ellipsis", no_wrap=True)

    model, settings, clock = profile["model"], profile["settings"], profile["clock"]
    formats = max(model["formats"], key=model["formats"].get)
    threads = _count(settings["threads"], "thread")
    batch = f", batch {settings['batch']}" if settings["batch"] > 1 else ""
    say(f"{model['name']}, mostly {formats}, on {threads}{batch}", "bold")
    say(
        f"{profile['host']['cpu'].split(' (')[0]}; cycles from {profile['clock_source']}, "
        f"{clock['core_hertz'] / 1e9:.2f} GHz ±{profile['clock_error_fraction']:.1%}"
    )
    say()
    first, each = profile["time_to_first_token"], profile["time_per_token"]
    prefill = profile["prefill"]
    say(
        f"first token  {_spread(first, 1, 's')}, {settings['prompt_tokens']} tokens at "
        f"{prefill['tokens_per_second']:.0f}/s, {prefill['limit_fraction']:.0%} of the limit"
    )
    say(
        f"per token    {_spread(each, 1e3, 'ms')}, {profile['tokens_per_second']:.0f} tokens/s, "
        f"{profile['limit_fraction']:.0%} of the limit, "
        f"{_short(profile['cycles_per_token'])} cycles"
    )
    for phase, title in (("decode", "cycles a step of decode"), ("prefill", "cycles of prefill")):
        say()
        say(f"{title:45}{'':{_BAR - 11}}{'share':>6}{'cycles':>8}{'of limit':>9}", "bold")
        for row in _largest(profile, phase):
            say(_line(row, profile[phase]["cycles"]))
    laws = [law for law in profile["growth"] if law["name"] == "total"]
    if laws:
        say()
    for law in laws:
        say(f"growth {law['phase']:8}{law['law']}, {_held_out(law)}")
    say()
    for i, advice in enumerate(profile["advice"][:3]):
        say(f"{'next: ' if i == 0 else '      '}{advice['sentence']}")
    if not profile["advice"]:
        say("next: nothing that this version can change would make it faster here")
    say(
        f"clock: its own cost {profile['overhead_fraction']:.2%}, unaccounted "
        f"{profile['unaccounted_fraction']:.2%}"
    )
    say(f"       {_outliers(profile['tokens'])}")
    for line in _first_notes(clock["notes"]):
        say(f"       {line}")


def _largest(profile: dict[str, Any], phase: str) -> list[dict[str, Any]]:
    """Moments with their layers together, the largest first, and what is left in one row."""
    rows: dict[str, dict[str, Any]] = {}
    for moment in profile["moments"]:
        if moment["phase"] != phase:
            continue
        name = collapsed(moment["name"])
        row = rows.setdefault(name, {"name": name, "class": moment["class"], **_NOTHING})
        for key in _NOTHING:
            row[key] += moment[key] or 0.0
    ordered = sorted(rows.values(), key=lambda r: -(r["cycles"] + r["waiting_cycles"]))
    shown, others = ordered[: _ROWS[phase]], ordered[_ROWS[phase] :]
    if others:
        rest = {key: sum(row[key] for row in others) for key in _NOTHING}
        shown.append({"name": f"{len(others)} others", "class": "", **rest})
    return shown


_NOTHING = {"cycles": 0.0, "waiting_cycles": 0.0, "limit_cycles": 0.0}


def _line(row: dict[str, Any], total: float) -> Any:
    from rich.text import Text

    spent = row["cycles"] + row["waiting_cycles"]
    full = round(spent / total * _BAR * 2)
    waiting = min(full, round(row["waiting_cycles"] / total * _BAR * 2))
    style = _STYLES.get(row["class"], "")
    text = Text(f"{row['name']:32}")
    text.append("█" * (full - waiting), style)
    text.append("░" * waiting, style)
    text.append(" " * (_BAR + 2 - full) if full < _BAR + 2 else "")
    text.truncate(50, pad=True)
    share = f"{row['limit_cycles'] / spent:.0%}" if row["limit_cycles"] and spent else ""
    text.append(f"{spent / total:>6.1%}{_short(spent):>9}{share:>9}")
    return text


def _spread(spread: dict[str, float], scale: float, unit: str) -> str:
    low, middle, high = (_figures(spread[k] * scale) for k in ("min", "median", "max"))
    return f"{middle} {unit} ({low}-{high})"


def _figures(value: float) -> str:
    """Three significant figures, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _short(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {suffix}"
    return f"{value:.0f}"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _first_notes(notes: Iterable[str]) -> list[str]:
    """Whole notes, as many as fit into three lines."""
    lines: list[str] = []
    for note in notes:
        wrapped = wrap(note, WIDTH - 7)
        if len(lines) + len(wrapped) > 3:
            break
        lines += wrapped
    return lines


def _held_out(law: dict[str, Any]) -> str:
    error = law["median_error"]
    return "not tested" if error is None else f"held-out error {error:.1%}"


def _outliers(tokens: Iterable[dict[str, Any]]) -> str:
    slow = [token for token in tokens if token["outlier"]]
    if not slow:
        return "no slow tokens"
    worst = max(slow, key=lambda token: token["cycles"])
    return f"{_count(len(slow), 'slow token')}, the slowest {worst['reason']}"


def print_diff(difference: Difference, console: Console | None = None) -> None:
    """Prints what changed, the significant first."""
    from rich.console import Console

    console = console or Console(width=WIDTH, highlight=False)

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, overflow="ellipsis", no_wrap=True)

    for note in difference.notes:
        say(f"note: {note}", "yellow")
    changed = [c for c in difference.changes if c.significant]
    say(f"{'':34}{'phase':9}{'before':>10}{'after':>10}{'change':>9}", "bold")
    for change in changed:
        ratio = change.ratio or 1.0
        say(
            f"{change.name:34}{change.phase:9}{_short(change.before):>10}{_short(change.after):>10}"
            f"{ratio - 1:>+9.1%}",
            "green" if ratio < 1 else "red",
        )
    if not changed:
        say("nothing changed by more than chance")
    untested = sum(c.probability is None for c in difference.changes)
    same = len(difference.changes) - len(changed) - untested
    say(f"{same} others did not change by more than chance (p > 0.01, permutation test)")
    if untested:
        say(f"{untested} cannot be told: they need at least 5 repeats on both sides")
