"""Every architecture and RoPE variant against transformers' logits (`oracle.py`)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from cyclewise.machine.machine import Chunk
from cyclewise.models import load_model
from tests import naive
from tests.models import make_oracle, oracle
from tests.models.oracle import CASES

CUTS = ((0, 0, 0), (37, 1, 0), (53, 34, 1), (54, 35, 2), (55, 36, 3), (80, 41, 7))
"""Where the sequences of a ragged batch are after each of its steps."""


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads a case's model, written as `source` has it; its threads end with the module."""
    made = {}

    def make(name, source, format_name="F32", kv="f16"):
        key = name, source, format_name, kv
        if key not in made:
            path = tmp_path_factory.mktemp(name) / "model"
            if source == "gguf":
                oracle.write_gguf(path, name, format_name)
            else:
                oracle.write_directory(path, name)
            made[key] = load_model(path, threads=2, context=CASES[name].context, kv=kv)
        return made[key]

    yield make
    for model in made.values():
        model.close()


def logits(model, ids, chunk=512):
    """Of all tokens, (tokens, vocabulary)."""
    machine = model.machine
    pages = np.arange(machine.num_pages, dtype=np.int32)
    found = []
    for at in range(0, len(ids), chunk):
        part = ids[at : at + chunk]
        rows = range(len(part))
        found.append(machine.step(part, [Chunk(0, len(part), at, pages)], rows).copy())
    return np.concatenate(found)


SOURCES = ("gguf", "directory")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", CASES)
def test_prefill(load, name, source):
    model = load(name, source)
    for ids, want in zip(oracle.token_ids(CASES[name]), oracle.stored_logits(name), strict=True):
        got = logits(model, ids)[oracle.kept_rows(len(ids))]
        np.testing.assert_allclose(got, want, atol=1e-3, rtol=0)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", CASES)
def test_decode(load, name, source):
    model = load(name, source)
    ids, want = oracle.token_ids(CASES[name])[0], oracle.stored_logits(name)[0]
    got = logits(model, ids, 1)
    np.testing.assert_allclose(got[oracle.kept_rows(len(ids))], want, atol=1e-3, rtol=0)
    # A token has the same bits, whatever came with it.
    np.testing.assert_array_equal(logits(model, ids), got)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].lengths == oracle.LENGTHS])
def test_a_batch_of_ragged_sequences(load, name, source):
    """Their pages mixed up, prefill beside decode."""
    model, ids = load(name, source), oracle.token_ids(CASES[name])
    pages = [np.array(each, np.int32) for each in ([6, 1, 2], [0, 4], [3])]
    found = [[] for _ in ids]
    for before, after in pairwise(CUTS):
        flat, chunks = [], []
        for i, (first, last) in enumerate(zip(before, after, strict=True)):
            if last > first:
                chunks.append((i, Chunk(len(flat), last - first, first, pages[i])))
                flat += ids[i][first:last]
        got = model.machine.step(flat, [chunk for _, chunk in chunks], range(len(flat)))
        for i, chunk in chunks:
            found[i].append(got[chunk.start : chunk.start + chunk.count].copy())
    for rows, want in zip(found, oracle.stored_logits(name), strict=True):
        whole = np.concatenate(rows)
        got = whole[oracle.kept_rows(len(whole))]
        np.testing.assert_allclose(got, want, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_int8_activations(load, name):
    model = load(name, "gguf", "Q8_0")
    pairs = zip(oracle.token_ids(CASES[name]), oracle.stored_logits(name), strict=True)
    for ids, want in pairs:
        got = logits(model, ids)[oracle.kept_rows(len(ids))]
        assert naive.kl_divergence(got, want) <= 1e-3


@pytest.mark.parametrize("name", CASES)
def test_an_int8_cache(load, name):
    model = load(name, "gguf", kv="int8")
    pairs = zip(oracle.token_ids(CASES[name]), oracle.stored_logits(name), strict=True)
    for ids, want in pairs:
        whole = logits(model, ids)
        assert naive.kl_divergence(whole[oracle.kept_rows(len(ids))], want) <= 1e-4
        # A token has the same bits, whatever came with it.
        np.testing.assert_array_equal(logits(model, ids, 7), whole)


VARIANTS = [
    name
    for name, case in CASES.items()
    if (case.keys or case.config.get("rope_scaling"))
    and name != "llama_dynamic_short"
    and "expert_count" not in case.keys
]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_seen(name, tmp_path):
    """Without its keys and factors the file gives other logits: the oracle would find an error."""
    path = oracle.write_gguf(tmp_path / "model.gguf", name, plain=True)
    model = load_model(path, threads=2)
    ids, want = oracle.token_ids(CASES[name])[0][:48], oracle.stored_logits(name)[0]
    found = np.abs(
        logits(model, ids)[oracle.kept_rows(len(ids))] - want[: len(oracle.kept_rows(48))]
    )
    model.close()
    assert found.max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_transformers_says_so_still(name):
    pytest.importorskip("transformers")
    np.testing.assert_allclose(
        make_oracle.logits(name), np.concatenate(oracle.stored_logits(name)), atol=1e-5, rtol=0
    )
