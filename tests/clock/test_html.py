"""The page in a real browser: silent, self-contained, its pictures true to the profile."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cyclewise.clock.html import page, write_html
from tests.clock.chromium import Page, chromium, find_chromium
from tests.clock.profiles import make_profile, without_optional

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>&{{title}}\u2028"


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium here: `apt-get install chromium` adds it")
    with chromium(path) as found:
        yield found


@pytest.fixture
def opened(browser: Page) -> Iterator[Page]:
    """The browser; when the test ends, no page may have complained or asked for anything else."""
    browser.problems.clear()
    browser.requests.clear()
    yield browser
    assert browser.problems == []
    assert all(address.startswith(("file:///", "data:")) for address in browser.requests)
    assert len([address for address in browser.requests if address.startswith("file:")]) >= 1


def _data(browser: Page, selector: str) -> list[dict[str, str]]:
    """The data-* attributes of all elements that match, in order."""
    script = (
        f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => ({{...e.dataset}}))"
    )
    found: list[dict[str, str]] = browser.run(script)
    return found


def _of_phase(profile: dict[str, Any], phase: str, *, host: bool = True) -> list[dict[str, Any]]:
    return [
        moment
        for moment in profile["moments"]
        if moment["phase"] == phase and (host or moment["class"] != "host")
    ]


def _draw(browser: Page, tmp_path: Path, profile: dict[str, Any], **how: Any) -> None:
    write_html(profile, tmp_path / "report.html")
    browser.open(tmp_path / "report.html", **how)


def test_the_text_needs_nothing_else() -> None:
    text = page(make_profile())
    assert len(text) < 1_000_000
    assert "{{" not in text
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", text)
    assert not re.search(r"url\((?!#)", text.replace("url(#hatch-${", "url(#"))
    assert "@import" not in text and "fetch(" not in text


def test_a_hostile_name_stays_text(opened: Page, tmp_path: Path) -> None:
    profile = make_profile(num_layers=2, name=HOSTILE)
    profile["moments"][5]["name"] = f"layers.0.{HOSTILE}"
    profile["moments"][5]["class"] = '"><script>'
    profile["whatif"][0]["change"] = HOSTILE
    profile["advice"][0]["sentence"] = HOSTILE
    profile["host"]["cpu"] = HOSTILE
    text = page(profile)
    block = text.partition('id="profile">')[2].partition("</script>")[0]
    assert json.loads(block) == profile
    assert "<" not in block
    _draw(opened, tmp_path, profile)
    assert opened.run("document.scripts.length") == 2
    assert opened.run("document.images.length") == 0
    assert opened.run("document.getElementById('model').textContent") == HOSTILE
    assert opened.run("document.querySelector('#changes .name').textContent") == HOSTILE


def test_numbers_that_json_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_html({**make_profile(1), "overhead_fraction": float("nan")}, tmp_path / "a.html")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_draws_without_a_complaint(opened: Page, tmp_path: Path, dark: bool, width: int) -> None:
    _draw(opened, tmp_path, make_profile(), dark=dark, width=width)
    assert opened.run("document.documentElement.scrollWidth") <= width
    for picture in ("ring", "overview", "zoom", "heat-decode", "heat-prefill", "roofs", "strip"):
        assert opened.run(f"document.querySelector('#{picture} > svg').childElementCount > 0")
    paper = opened.run("getComputedStyle(document.documentElement).backgroundColor")
    brightness = sum(int(part) for part in re.findall(r"\d+", paper)[:3])
    assert brightness < 150 if dark else brightness > 600


def test_contrast_is_enough_in_both_themes(opened: Page, tmp_path: Path) -> None:
    for dark in (False, True):
        _draw(opened, tmp_path, make_profile(2), dark=dark)
        colours = {
            name: opened.run(
                f"(() => {{ const e = document.createElement('i'); e.style.color = 'var(--{name})';"
                "document.body.append(e); return getComputedStyle(e).color })()"
            )
            for name in ("paper", "ink", "muted", "matmul", "activation", "memory", "host", "rest")
        }
        least = {"ink": 7.0, "muted": 4.5, "matmul": 4.5}
        for name in colours.keys() - {"paper"}:
            assert _contrast(colours[name], colours["paper"]) >= least.get(name, 3.0), (name, dark)


def _contrast(one: str, other: str) -> float:
    """Of two colours, as the Web Content Accessibility Guidelines define it."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_the_pictures_of_a_token_hold_its_numbers(opened: Page, tmp_path: Path) -> None:
    profile = make_profile()
    _draw(opened, tmp_path, profile)
    moments = _of_phase(profile, "decode")
    arcs = _data(opened, "#ring .arc")
    assert [arc["name"] for arc in arcs] == [m["name"] for m in moments] + ["unaccounted"]
    for arc, moment in zip(arcs, moments, strict=False):
        assert float(arc["cycles"]) == moment["cycles"]
        assert float(arc["waiting"]) == moment["waiting_cycles"]
    waits = opened.run("document.querySelectorAll('#ring .waits').length")
    assert waits == sum(moment["waiting_cycles"] > 0 for moment in moments)
    wall = profile["decode"]["cycles"]
    drawn = sum(float(arc["cycles"]) + float(arc.get("waiting", 0)) for arc in arcs)
    assert drawn == pytest.approx(wall, rel=1e-12)
    [centre] = _data(opened, "#ring .centre")
    assert float(centre["seconds"]) == profile["time_per_token"]["median"]
    rows = _data(opened, "#kinds tbody td[data-cycles]")
    assert sum(float(row["cycles"]) for row in rows) == pytest.approx(wall, rel=1e-12)
    classes = _data(opened, "#ring [data-class]")
    for found in classes:
        members = [m for m in moments if m["class"] == found["class"]]
        assert float(found["cycles"]) == pytest.approx(sum(m["cycles"] for m in members))

    lanes = profile["timeline"]["threads"]
    opened.run(
        "(() => { const e = document.getElementById('layer'); e.value = 7;"
        "e.dispatchEvent(new Event('input')) })()"
    )
    names = [m["name"] for m in _of_phase(profile, "decode", host=False)]
    expected = [
        (name, thread, piece[1], piece[2])
        for thread, lane in enumerate(lanes)
        for name, piece in zip(names, lane, strict=True)
        if name.startswith("layers.7.")
    ]
    found = [
        (d["name"], int(d["thread"]), float(d["cycles"]), float(d["waiting"]))
        for d in _data(opened, "#zoom .work")
    ]
    assert found == expected


def test_the_ring_is_as_long_as_its_cycles(opened: Page, tmp_path: Path) -> None:
    """A quarter of the cycles is a quarter of the circle."""
    profile = make_profile(num_layers=1)
    moments = _of_phase(profile, "decode")
    for moment in moments:
        moment.update(cycles=0.0, waiting_cycles=0.0)
    moments[0].update(cycles=3e6, waiting_cycles=1e6)
    moments[3].update(cycles=4e6)
    profile["decode"]["cycles"] = 8e6
    _draw(opened, tmp_path, profile)
    boxes = opened.run(
        "[...document.querySelectorAll('#ring .arc')].filter((e) => +e.dataset.cycles)"
        ".map((e) => e.getBBox()).map((b) => [b.x, b.y, b.width, b.height])"
    )
    radius = boxes[1][2]
    assert boxes[1] == pytest.approx([-radius, -radius, radius, 2 * radius], abs=0.1)
    three_eighths = pytest.approx([0, -radius, radius, radius * (1 + 2**-0.5)], abs=0.1)
    assert boxes[0] == three_eighths


def test_the_heat_map_holds_shares_of_limit(opened: Page, tmp_path: Path) -> None:
    profile = make_profile()
    _draw(opened, tmp_path, profile)
    for phase in ("decode", "prefill"):
        cells = {cell["name"]: cell for cell in _data(opened, f"#heat-{phase} .cell")}
        moments = _of_phase(profile, phase, host=False)
        assert cells.keys() == {moment["name"] for moment in moments}
        for moment in moments:
            assert float(cells[moment["name"]]["limit"]) == moment["limit_fraction"]
        colours = opened.run(
            f"[...document.querySelectorAll('#heat-{phase} .cell')]"
            ".map((e) => e.style.getPropertyValue('--share'))"
        )
        shares = [float(cell["limit"]) for cell in cells.values()]
        assert colours == [f"{100 * share:.1f}%" for share in shares]


def test_the_roofline_holds_roofs_and_moments(opened: Page, tmp_path: Path) -> None:
    profile = make_profile()
    _draw(opened, tmp_path, profile)
    hertz, threads = profile["roofs"]["core_hertz"], profile["settings"]["threads"]
    roofs = {roof["roof"]: float(roof["rate"]) for roof in _data(opened, "#roofs [data-roof]")}
    expected = {
        level["name"]: dict(level["bytes_per_second"])[threads] / hertz
        for level in profile["roofs"]["levels"]
    }
    expected["memory"] = profile["roofs"]["memory_bytes_per_second_within_run"] / hertz
    for unit, scaling in profile["roofs"]["operations_per_second"].items():
        expected[unit] = dict(scaling)[threads] / hertz
    assert roofs == pytest.approx(expected)
    singles = {(d["name"], d["phase"]): d for d in _data(opened, "#roofs .single")}
    for moment in profile["moments"]:
        if moment["operations"] and moment["name"].startswith("layers."):
            point = singles.pop((moment["name"], moment["phase"]))
            total = moment["cycles"] + moment["waiting_cycles"]
            assert float(point["x"]) == pytest.approx(moment["operations"] / moment["bytes"])
            assert float(point["y"]) == pytest.approx(moment["operations"] / total)
    assert not singles
    points = _data(opened, "#roofs .point")
    assert {point["phase"] for point in points} == {"prefill", "decode"}
    [point] = [p for p in points if (p["name"], p["phase"]) == ("layers.*.ffn.down", "decode")]
    members = [m for m in _of_phase(profile, "decode") if m["name"].endswith("ffn.down")]
    assert float(point["cycles"]) == pytest.approx(sum(m["cycles"] for m in members))


def test_change_is_drawn_as_it_was_measured(opened: Page, tmp_path: Path) -> None:
    profile = make_profile()
    _draw(opened, tmp_path, profile)
    dots = _data(opened, "#strip .dot")
    assert [float(dot["cycles"]) for dot in dots] == [t["cycles"] for t in profile["tokens"]]
    assert [dot["outlier"] == "true" for dot in dots] == [t["outlier"] for t in profile["tokens"]]

    opened.run("document.getElementById('more-laws').open = true")
    opened.settle()
    panels = _data(opened, "#growth svg")
    assert sorted((p["name"], p["phase"]) for p in panels) == sorted(
        (g["name"], g["phase"]) for g in profile["growth"]
    )
    for growth in profile["growth"]:
        inside = f"#growth svg[data-name='{growth['name']}'][data-phase='{growth['phase']}'] circle"
        assert _data(opened, inside) == [
            {
                "x": str(point["x"]), "cycles": _as_js(point["cycles"]),
                "fitted": _as_js(point["fitted"]), "heldOut": str(point["held_out"]).lower(),
                "tip": "",
            }
            for point in growth["points"]
        ]  # fmt: skip

    cells = _data(opened, "#changes [data-metric]")
    assert len(cells) == 3 * len(profile["whatif"])
    for cell in cells:
        [change] = [c for c in profile["whatif"] if c["change"] == cell["change"]]
        band = change[cell["metric"]]
        for name in ("value", "low", "high"):
            assert float(cell[name]) == band[name]
    advice = _data(opened, "#next li")
    assert [float(each["gain"]) for each in advice] == [
        a["gain_fraction"] for a in profile["advice"]
    ]


def _as_js(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


@pytest.mark.parametrize("symbol", ["n", "context"])
def test_a_law_is_drawn_through_what_it_fits(opened: Page, tmp_path: Path, symbol: str) -> None:
    """A curve where its terms are known, else straight lines between the fitted points."""
    profile = make_profile(2)
    xs = [8, 64, 512]
    terms = [
        {"form": "1", "coefficient": 9.0},
        {"form": f"{symbol} log {symbol}", "coefficient": 2},
    ]
    fitted = [9.0 + 2 * x * (x.bit_length() - 1) for x in xs]
    points = [
        {"x": x, "cycles": f, "fitted": f, "held_out": False}
        for x, f in zip(xs, fitted, strict=True)
    ]
    law = {**profile["growth"][0], "terms": terms, "points": points, "median_error": None}
    unknown = {**law, "terms": [{"form": "sinh n", "coefficient": 2}], "phase": "decode"}
    profile["growth"] = [law, unknown]
    _draw(opened, tmp_path, profile)
    lengths = opened.run(
        "[...document.querySelectorAll('#laws .law')]"
        ".map((e) => e.getAttribute('d').split('L').length)"
    )
    assert sorted(lengths) == [3, 61]


def test_tables_hold_every_number(opened: Page, tmp_path: Path) -> None:
    profile = make_profile()
    _draw(opened, tmp_path, profile)
    figures = {d["figure"]: float(d["value"]) for d in _data(opened, "#figures dd")}
    assert figures == {
        "time to first token": profile["time_to_first_token"]["median"],
        "time per token": profile["time_per_token"]["median"],
        "tokens/s": profile["tokens_per_second"],
        "share of limit, decode": profile["limit_fraction"],
        "cycles per token": profile["cycles_per_token"],
        "prefill tokens/s": profile["prefill"]["tokens_per_second"],
    }
    for account, row in zip(profile["accounts"], _data(opened, "#accounts tbody tr"), strict=True):
        assert (int(row["thread"]), row["phase"]) == (account["thread"], account["phase"])
        parts = _data(
            opened,
            f"#accounts tr[data-thread='{row['thread']}'][data-phase='{row['phase']}'] [data-part]",
        )
        assert {p["part"]: float(p["cycles"]) for p in parts} == pytest.approx(
            {name: account[name] for name in ("moments", "waiting", "python", "unaccounted")}
        )
    opened.run(
        "(() => { const form = document.getElementById('choice').elements;"
        "form.rows.value = 'moments'; form.phase.value = 'prefill';"
        "form.rows.dispatchEvent(new Event('input', { bubbles: true })) })()"
    )
    rows = _data(opened, "#table tbody tr")
    assert {(r["name"], float(r["cycles"])) for r in rows} == {
        (moment["name"], moment["cycles"]) for moment in _of_phase(profile, "prefill")
    }
    assert [float(r["cycles"]) for r in rows] == sorted(
        (float(r["cycles"]) for r in rows), reverse=True
    )
    opened.run("document.querySelector('#table th button').click()")
    names = [row["name"] for row in _data(opened, "#table tbody tr")]
    assert names.index("layers.2.ffn.down") < names.index("layers.10.ffn.down")
    assert opened.run("document.querySelector('#table th').ariaSort") == "ascending"


def test_every_number_says_where_it_comes_from(opened: Page, tmp_path: Path) -> None:
    _draw(opened, tmp_path, make_profile())
    for cells in ("#figures .value", "#table tbody tr:first-child td:not(:first-child, .left)"):
        marks = (
            f"[...document.querySelectorAll('{cells}')].map((e) => e.querySelector('.from')?.title)"
        )
        found = opened.run(marks)
        assert found and all(found)
    assert opened.run("document.querySelectorAll('#changes th .from.modelled').length") == 4
    sources = opened.run("document.getElementById('provenance').textContent")
    for text in make_profile()["provenance"].values():
        assert text in sources


def test_pointer_and_keyboard_explain_a_mark(opened: Page, tmp_path: Path) -> None:
    profile = make_profile()
    _draw(opened, tmp_path, profile)
    tip = "document.getElementById('tip')"
    inside = opened.run(
        "(() => { const e = document.querySelector('#ring [data-name=output]');"
        "e.scrollIntoView({ block: 'center' });"
        "const box = e.getBBox(), m = e.getScreenCTM();"
        "for (let y = box.y + 5; y < box.y + box.height; y += 5)"
        "for (let x = box.x + 5; x < box.x + box.width; x += 5)"
        "if (e.isPointInFill(new DOMPoint(x, y))) return [m.e + x, m.f + y] })()"
    )
    opened.settle()
    opened.point_at(*inside)
    assert opened.run(f"{tip}.hidden") is False
    assert opened.run(f"{tip}.querySelector('b').textContent") == "output"
    assert "share of limit" in opened.run(f"{tip}.textContent")
    opened.run("document.querySelector('#ring svg').focus({ preventScroll: true })")
    for key in ("Home", "ArrowRight"):
        opened.press(key)
    assert opened.run(f"{tip}.querySelector('b').textContent") == "layers.0.attention.norm"
    opened.press("Escape")
    assert opened.run(f"{tip}.hidden") is True


def test_the_toggle_changes_the_theme(opened: Page, tmp_path: Path) -> None:
    _draw(opened, tmp_path, make_profile(1))
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    light = opened.run(paper)
    opened.run("document.getElementById('theme').click()")
    assert opened.run(paper) != light
    opened.run("document.getElementById('theme').click()")
    assert opened.run(paper) == light


def test_what_was_not_measured_is_not_drawn(opened: Page, tmp_path: Path) -> None:
    profile = without_optional(make_profile())
    _draw(opened, tmp_path, profile)
    for absent in ("growth", "whatif", "next", "tokens", "lanes", "conservation"):
        assert opened.run(f"document.getElementById('{absent}')") is None
    links = opened.run("[...document.querySelectorAll('nav a')].map((e) => e.textContent)")
    assert links == ["token", "layers", "roofline", "moments", "clock", "sources"]
    profile = {
        **profile,
        "moments": [m for m in profile["moments"] if m["phase"] == "decode"],
        "limit_fraction": None,
    }
    _draw(opened, tmp_path, profile)
    assert opened.run("document.getElementById('heat-prefill')") is None


def test_a_source_of_time_alone_is_not_called_cycles(opened: Page, tmp_path: Path) -> None:
    profile = make_profile(1)
    profile["clock_source"] = "cntvct"
    profile["clock"]["counts_cycles"] = False
    _draw(opened, tmp_path, profile)
    assert "ticks per token" in opened.run("document.getElementById('figures').textContent")
    assert "cycles" not in opened.run("document.getElementById('ring').textContent")
