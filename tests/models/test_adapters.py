"""LoRA adapters beside every architecture against PEFT's logits (`lora_oracle.py`), and mixed."""

from __future__ import annotations

import numpy as np
import pytest

from cyclewise.errors import InvalidParameterError
from cyclewise.machine.costs import BatchShape, cost
from cyclewise.machine.kernels.target import host_target
from cyclewise.machine.machine import Chunk
from cyclewise.models import load_model
from tests import naive
from tests.models import lora_oracle, make_lora_oracle, oracle
from tests.models.lora_oracle import ADAPTERS, KEPT, LENGTHS, token_ids


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads a base model with some adapters; the threads end with the module."""
    made = {}

    def make(base, *adapters, source="directory", format_name="F32", gguf_adapters=False):
        key = base, adapters, source, format_name, gguf_adapters
        if key not in made:
            folder = tmp_path_factory.mktemp(base)
            if source == "gguf":
                path = oracle.write_gguf(folder / "model.gguf", base, format_name)
            else:
                path = oracle.write_directory(folder / "model", base)
            write = lora_oracle.write_gguf if gguf_adapters else lora_oracle.write_peft
            ending = ".gguf" if gguf_adapters else ""
            paths = {name: write(folder / f"{name}{ending}", name) for name in adapters}
            made[key] = load_model(path, threads=2, adapters=paths)
        return made[key]

    yield make
    for model in made.values():
        model.close()


def logits(model, ids, adapter=None, chunk=512, first_page=0):
    """Of all tokens, (tokens, vocabulary)."""
    machine = model.machine
    pages = np.arange(first_page, machine.num_pages, dtype=np.int32)
    found = []
    for at in range(0, len(ids), chunk):
        part = ids[at : at + chunk]
        chunks = [Chunk(0, len(part), at, pages, adapter)]
        found.append(machine.step(part, chunks, range(len(part))).copy())
    return np.concatenate(found)


def check(model, name, adapter=0):
    # Some processors round activations that meet BF16.
    coarse = ADAPTERS[name].dtype == "BF16" and host_target().has_bf16
    atol = 1e-2 if coarse else 1e-3
    for length, kept, want in zip(LENGTHS, KEPT, lora_oracle.stored_logits(name), strict=True):
        ids = token_ids(length)
        got = logits(model, ids, adapter)
        np.testing.assert_allclose(got[list(kept)], want, atol=atol, rtol=0)
        # A token has the same bits, whatever came with it.
        np.testing.assert_array_equal(logits(model, ids, adapter, 1), got)
        np.testing.assert_array_equal(logits(model, ids, adapter, 6), got)
        # The adapter is seen: without it the logits are others.
        assert np.abs(logits(model, ids)[list(kept)] - want).max() > 0.1


@pytest.mark.parametrize("name", ADAPTERS)
def test_beside_a_directory(load, name):
    check(load(ADAPTERS[name].base, name), name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_beside_a_gguf_file(load, name):
    """Whose Llamas have queries and keys in another order than the adapter."""
    check(load(ADAPTERS[name].base, name, source="gguf"), name)


WITHOUT_PATTERNS = [name for name in ADAPTERS if not ADAPTERS[name].config]


@pytest.mark.parametrize("source", ["gguf", "directory"])
@pytest.mark.parametrize("name", WITHOUT_PATTERNS)
def test_gguf_adapters(load, name, source):
    check(load(ADAPTERS[name].base, name, source=source, gguf_adapters=True), name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_beside_quantized_weights(load, name):
    model = load(ADAPTERS[name].base, name, source="gguf", format_name="Q8_0")
    for length, kept, want in zip(LENGTHS, KEPT, lora_oracle.stored_logits(name), strict=True):
        got = logits(model, token_ids(length), 0)
        assert naive.kl_divergence(got[list(kept)], want) <= 1e-3
        np.testing.assert_array_equal(logits(model, token_ids(length), 0, 1), got)


TWO = "llama", "llama", "llama_other"


def test_tokens_of_several_adapters_and_of_none_in_one_step(load):
    """Ragged chunks of each, in turns: each token has the bits that it has alone."""
    model = load(*TWO)
    ids = [token_ids(40 + i) for i in range(4)]
    adapters = [1, None, 0, 1]
    want = [logits(model, each, adapter) for each, adapter in zip(ids, adapters, strict=True)]
    check(model, "llama_other", 1)
    rng = np.random.default_rng(0)
    done, found = [0] * 4, [[] for _ in ids]
    while any(at < len(each) for at, each in zip(done, ids, strict=True)):
        flat, chunks = [], []
        for i in rng.permutation(4).tolist():
            count = min(int(rng.choice([0, 1, 1, 3, 9, 33])), len(ids[i]) - done[i])
            if count:
                pages = np.array([2 * i, 2 * i + 1], np.int32)
                chunks.append((i, Chunk(len(flat), count, done[i], pages, adapters[i])))
                flat += ids[i][done[i] : done[i] + count]
        if not chunks:
            continue
        got = model.machine.step(flat, [chunk for _, chunk in chunks], range(len(flat)))
        for i, chunk in chunks:
            found[i].append(got[chunk.start : chunk.start + chunk.count].copy())
            done[i] += chunk.count
    for rows, alone in zip(found, want, strict=True):
        np.testing.assert_array_equal(np.concatenate(rows), alone)


def test_a_model_that_has_adapters_is_itself_without_them(load):
    plain, loaded, ids = load("llama"), load(*TWO), token_ids(41)
    np.testing.assert_array_equal(logits(loaded, ids), logits(plain, ids))
    assert not any("lora" in moment.name for moment in plain.program.moments)
    assert plain.adapters == []


def test_any_number_of_threads(load, tmp_path):
    want = logits(load(*TWO), token_ids(41), 0)
    path = oracle.write_directory(tmp_path / "model", "llama")
    adapter = lora_oracle.write_peft(tmp_path / "adapter", "llama")
    model = load_model(path, threads=1, adapters={"one": adapter})
    np.testing.assert_array_equal(logits(model, token_ids(41), 0), want)
    model.close()


def test_an_adapter_that_is_not_there_is_no_sound_batch(load):
    model, pages = load(*TWO), np.arange(2, dtype=np.int32)
    for adapter in (-1, 2):
        with pytest.raises(InvalidParameterError, match="an adapter is out of range"):
            model.machine.step([1], [Chunk(0, 1, 0, pages, adapter)], [0])


def test_what_is_said_of_adapters(load):
    first, second = load(*TWO).adapters
    assert (first.name, first.modules, first.ranks) == ("llama", 14, (4,))
    assert (second.name, second.modules, second.ranks) == ("llama_other", 6, (24,))
    # A's rows in tiles of 16, those of each matrix from a multiple of 8 on; B's 4 columns as 8.
    a_rows = 2 * (32 * 64 + 16 * 64 + 16 * 64 + 16 * 96)
    b_rows = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert first.nbytes == 4 * (a_rows + 8 * b_rows)


def test_what_adapters_cost(load):
    """The larger of two, whatever a batch has; qkv's A x is 12 numbers of 64 columns."""
    plain, other = load("llama").program, load("llama", "llama").program
    batch = BatchShape(((5, 0),), 1)
    before = {moment.name: moment for moment in plain.moments}
    after = {moment.name: moment for moment in other.moments}
    added = {name: after[name] for name in after if name not in before}
    parts = ("attention.qkv", "attention.output", "ffn.gate_up", "ffn.down")
    assert list(added) == [f"layers.{i}.{part}.lora_a" for i in range(2) for part in parts]
    a = cost(after["layers.0.attention.qkv.lora_a"].form, batch)
    assert (a.unit, a.operations, a.activation_bytes) == ("fma", 5 * 2 * 12 * 64, 5 * 4 * (64 + 12))
    assert a.weight_bytes == 4 * 32 * 64
    b, base = (cost(found["layers.0.attention.qkv"].form, batch) for found in (after, before))
    assert b.operations - base.operations == 5 * (3 * 4 + (2 * 4 + 1) * (64 + 32 + 32))
    assert b.weight_bytes - base.weight_bytes == 4 * 8 * (64 + 32 + 32)
    assert b.activation_bytes - base.activation_bytes == 5 * 4 * 12
    bytes_of = (other.weight_bytes - plain.weight_bytes, load("llama", "llama").adapters[0].nbytes)
    assert bytes_of[0] == bytes_of[1]
    two = load(*TWO).program
    assert two.weight_bytes > other.weight_bytes
    assert "lora" not in "".join(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_says_so_still(name):
    pytest.importorskip("peft")
    want = np.concatenate(lora_oracle.stored_logits(name))
    np.testing.assert_allclose(make_lora_oracle.logits(name), want, atol=1e-5, rtol=0)
