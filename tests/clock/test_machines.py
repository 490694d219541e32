from __future__ import annotations

import json
from pathlib import Path

import pytest

import cyclewise.clock.machines as module
from cyclewise.clock.limits import Limits
from cyclewise.clock.machines import names, read_hardware
from cyclewise.errors import InvalidParameterError
from cyclewise.machine.costs import BatchShape, norm_form
from cyclewise.machine.profile import at_threads
from tests.clock.test_limits import program

FOLDER = Path(module.__file__).parent / "hardware"
SOUND = {
    "name": "A", "cores": 4, "memory_bandwidth_bytes_per_second": 1e10,
    "operations_per_second": {"dot": 1e12, "fma": 1e11},
}  # fmt: skip


def test_a_laptop_a_server_a_gpu_and_a_tpu_come_with_the_package():
    assert names() == ["gpu", "laptop", "server", "tpu"]


@pytest.mark.parametrize("name", names())
def test_each_figure_has_a_public_source(name):
    values = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    figures = [key for key, value in values.items() if isinstance(value, int | float)]
    figures += [f"operations_per_second.{unit}" for unit in values["operations_per_second"]]
    assert {"cores", "memory_bandwidth_bytes_per_second"} <= set(figures)
    for figure in figures:
        source = values["sources"][figure]
        assert source["url"].startswith("https://") and source["says"] and source["derivation"]
    hardware = read_hardware(name)
    assert hardware.operations["dot"] >= hardware.operations["fma"]
    assert hardware.name and (hardware.watts is None) == ("watts" not in figures)


def test_its_roofs_give_limits():
    hardware = read_hardware("laptop")
    roofs = hardware.roofs
    assert at_threads(roofs.levels[-1].bandwidth, hardware.cores) == hardware.memory_bandwidth
    form = norm_form(1000)
    limit = Limits(roofs, program(a=form), hardware.cores).seconds(form, BatchShape(((1, 0),), 1))
    assert limit.bytes_seconds == 12_000 / hardware.memory_bandwidth


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**SOUND, "watts": 10, "remark": "nobody reads it"}))
    hardware = read_hardware(str(path))
    assert (hardware.name, hardware.cores, hardware.watts) == ("A", 4, 10.0)
    path.write_text(json.dumps(SOUND))
    assert read_hardware(str(path)).watts is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "does not describe"),
        (json.dumps({**SOUND, "cores": "four"}), "cores must be a number"),
        (json.dumps({**SOUND, "cores": True}), "cores must be a number"),
        (json.dumps({**SOUND, "memory_bandwidth_bytes_per_second": -1}), "must be a number above"),
        (json.dumps({**SOUND, "memory_bandwidth_bytes_per_second": float("inf")}), "above 0"),
        (json.dumps({**SOUND, "operations_per_second": {"dot": 1e12}}), "fma must be"),
        (json.dumps({**SOUND, "operations_per_second": None}), "lacks operations_per_second"),
        (json.dumps({**SOUND, "watts": float("nan")}), "watts must be"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_description_is_refused(tmp_path, text, said):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(InvalidParameterError, match=said):
        read_hardware(str(path))


def test_a_folder_or_nothing_at_all_is_no_description(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "none.json"), "laptops"):
        with pytest.raises(InvalidParameterError, match="no machine description"):
            read_hardware(name)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidParameterError, match="not JSON"):
        read_hardware(str(path))
