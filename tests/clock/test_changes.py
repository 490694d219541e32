from __future__ import annotations

import pytest

from cyclewise.clock.changes import ACCEPTED, DRAFTED, FORMS, Case, parse_change
from cyclewise.clock.machines import read_hardware
from cyclewise.clock.run import Settings
from cyclewise.errors import InvalidParameterError
from cyclewise.machine.costs import BatchShape, cost
from cyclewise.machine.host import available_cpus
from cyclewise.machine.kernels.blocks import tile_bytes
from cyclewise.machine.names import layer_of
from tests.clock.forecasts import view

CASE = Case(view(), Settings(100, 20, 2), 1)


def changed(text, case=CASE):
    return parse_change(text).apply(case)


def form(case, name):
    return next(part.form for part in case.view.parts if part.name == name)


@pytest.mark.parametrize("text", ["q8_0", "q4_0"])
def test_formats_change_the_bytes_and_nothing_else(text):
    after = changed(text)
    assert after.view.formats == (text.upper(),)
    for before, part in zip(CASE.view.parts, after.view.parts, strict=True):
        assert [(m.rows, m.columns) for m in part.form.matrices] == [
            (m.rows, m.columns) for m in before.form.matrices
        ]
        assert part.form.operations_per_row == before.form.operations_per_row
        assert part.form.bytes_per_row == before.form.bytes_per_row
    [down] = form(after, "layers.1.ffn.down").matrices
    assert down.num_bytes == 128 // 16 * tile_bytes(text.upper(), 256)
    if text == "q8_0":
        assert after == CASE


def test_what_is_no_matrix_keeps_its_bytes():
    after = changed("q4_0")
    for before, part in zip(CASE.view.parts, after.view.parts, strict=True):
        others = [
            each.form.weight_bytes - sum(m.num_bytes for m in each.form.matrices)
            for each in (before, part)
        ]
        assert others[0] == others[1]


def test_keys_as_integers_halve_the_cache():
    assert (CASE.view.kv_share, changed("kv=int8").view.kv_share) == (1.0, 18 / 32)


def test_settings():
    assert changed("threads=1").threads == 1
    after = changed("batch=5")
    assert (after.settings.batch, after.settings.prompt_tokens) == (5, 100)
    assert parse_change("batch=5").batch == 5
    assert changed("bandwidth=40").bandwidth == 40e9
    assert changed("bandwidth=40GB/s").bandwidth == 40e9
    assert changed("bandwidth=2x").bandwidth == 2.0
    assert changed("machine=gpu").hardware == read_hardware("gpu")
    assert changed("speculate").drafted == DRAFTED
    assert f"{ACCEPTED[1]:.0%}" in parse_change("speculate").meaning


def test_layers_go_from_the_end():
    after = changed("prune-layers=2")
    assert {layer_of(part.name) for part in after.view.parts} == {None, 0}
    assert [part.name for part in after.view.parts][-1] == "output"
    with pytest.raises(InvalidParameterError, match="3 layers: prune-layers can be at most 2"):
        changed("prune-layers=3")


def test_query_heads_go_from_every_group():
    """Eight heads in two groups: half of them are two a group, and keys and values stay."""
    after = changed("prune-heads=0.5")
    assert (after.view.num_heads, after.view.num_kv_heads) == (4, 2)
    queries, keys, values = form(after, "layers.0.attention.qkv").matrices
    assert (queries.rows, keys.rows, values.rows) == (64, 32, 32)
    [output] = form(after, "layers.2.attention.output").matrices
    assert (output.rows, output.columns) == (128, 64)
    shape = BatchShape(((1, 7),), 1)
    for name in ("layers.0.attention.qkv", "layers.0.attention.output"):
        before, less = (cost(form(case, name), shape) for case in (CASE, after))
        assert less.weight_bytes < before.weight_bytes
        assert less.operations < before.operations
    assert form(after, "layers.0.ffn.down") == form(CASE, "layers.0.ffn.down")


def test_heads_with_keys_of_their_own_take_them_along():
    case = Case(view(heads=4, kv_heads=4), Settings(), 1)
    after = changed("prune-heads=0.25", case)
    assert (after.view.num_heads, after.view.num_kv_heads) == (3, 3)
    assert [m.rows for m in form(after, "layers.0.attention.qkv").matrices] == [48, 48, 48]


def test_at_least_one_head_of_a_group_is_left():
    after = changed("prune-heads=0.99")
    assert (after.view.num_heads, after.view.num_kv_heads) == (2, 2)


def test_what_can_be_measured_says_so():
    measurable = {
        text: parse_change(text).measurable
        for text in ("threads=1", "batch=2", "prune-layers=1", "q4_0", "kv=int8", "speculate",
                     "bandwidth=2x", "prune-heads=0.5", "machine=tpu")
    }  # fmt: skip
    assert [text for text, can in measurable.items() if can] == [
        "threads=1", "batch=2", "prune-layers=1", "kv=int8", "speculate",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("q8", "did you mean q8_0"),
        ("thread=2", "did you mean threads"),
        ("", "known are q8_0"),
        ("faster", "unknown change 'faster'"),
        ("threads", "must be written threads=N"),
        ("kv-int8", "known are q8_0, q4_0, kv=KIND"),
        ("kv=q8", "a KV cache holds f16 or int8"),
        ("q4_0=3", "must be written q4_0"),
        ("threads=two", "a whole one from 1"),
        ("threads=-1", "a whole one from 1"),
        (f"threads={available_cpus() + 1}", f"from 1 to {available_cpus()}"),
        ("batch=0", "from 1 to 512"),
        ("batch=513", "from 1 to 512"),
        ("prune-layers=0", "from 1"),
        ("prune-heads=0", "between 0 and 1"),
        ("prune-heads=1", "between 0 and 1"),
        ("prune-heads=nan", "between 0 and 1"),
        ("bandwidth=0x", "between 0 and 1000"),
        ("bandwidth=infx", "between 0 and 1000"),
        ("bandwidth=fast", "between 0 and"),
        ("machine=", "must be written machine=FILE"),
        ("machine=/nowhere.json", "no machine description"),
    ],
)
def test_mistakes_say_what_can_be_asked(text, said):
    with pytest.raises(InvalidParameterError, match=said):
        parse_change(text)


def test_every_form_is_known():
    values = {"N": "1", "X": "0.5", "FILE": "laptop", "KIND": "int8"}
    for written in FORMS:
        name, _, value = written.partition("=")
        parse_change(f"{name}={values[value]}" if value else name)
