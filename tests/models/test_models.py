from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from cyclewise.engine.engine import Engine
from cyclewise.errors import InvalidParameterError, ModelFileError, UnsupportedModelError
from cyclewise.machine.cache import Heads, KVCache
from cyclewise.machine.kernels.target import host_target
from cyclewise.machine.machine import Chunk
from cyclewise.models import load_model
from tests import naive
from tests.models import tiny
from tests.models.tiny import Tiny
from tests.weights.build import ARRAY, STRING, U32, array, entry, gguf

FLOAT_MODELS = {
    "tied": Tiny(),
    "untied": Tiny(tied=False, kv_heads=4),
    "odd_sizes": Tiny(hidden=40, heads=2, kv_heads=1, head_dim=16, feed_forward=52, vocab=77),
    "wide_heads": Tiny(hidden=48, heads=6, kv_heads=2, head_dim=24),
    "small_heads": Tiny(heads=8, kv_heads=4, head_dim=8, layers=3),
    "qwen2": Tiny("qwen2", biases=("attn_q", "attn_k", "attn_v"), rope_base=1e6),
    "llama_with_biases": Tiny(biases=("attn_q", "attn_k", "attn_v", "attn_output")),
    "llama3_factors": Tiny(rope_factors=True, rope_base=500000.0, tied=False),
    "linear_scaling": Tiny(rope_scaling=4.0),
    "half_rotated": Tiny(rope_dim=8),
    "qwen2_half_rotated": Tiny("qwen2", rope_dim=8),
    "F16": Tiny(format="F16"),
    "BF16": Tiny(format="BF16", tied=False),
    "experts": Tiny(experts=5, chosen=2),
    "softmax_over_all": Tiny(experts=20, chosen=3, normalized=False, format="F16"),
}
BLOCK_MODELS = {
    name: Tiny(format=name, hidden=256, head_dim=64, feed_forward=512, layers=1, tied=False)
    for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K")
} | {
    "mixed": Tiny(
        "qwen2", format="Q4_K", hidden=256, heads=4, kv_heads=1, head_dim=64, feed_forward=256,
        formats={"token_embd": "Q8_0", "attn_v": "Q6_K", "ffn_down": "Q6_K", "ffn_gate": "Q5_0"},
        biases=("attn_q", "attn_k", "attn_v"), vocab=90,
    ),
    "many_formats": Tiny(
        format="Q5_K", hidden=256, head_dim=64, feed_forward=512, layers=2,
        formats={
            "token_embd": "IQ4_XS", "attn_q": "Q3_K", "attn_k": "Q2_K", "attn_output": "Q5_1",
            "ffn_gate": "IQ4_NL", "ffn_up": "MXFP4",
        },
    ),
    "float_layers": Tiny(
        format="Q4_1", formats={"token_embd": "F16", "ffn_down": "F32", "attn_output": "BF16"}
    ),
    "quantized_experts": Tiny(
        experts=4, chosen=2, format="Q4_K", hidden=256, head_dim=64, feed_forward=256, layers=2,
        formats={"ffn_down": "Q6_K"}, seed=1,  # no token is torn between two experts
    ),
}  # fmt: skip


class Runner:
    """A loaded model and the sequences that a test gives it."""

    def __init__(self, path, threads=1, kv="f16"):
        self.model = load_model(path, threads=threads, kv=kv)
        self.machine = self.model.machine

    def logits(self, ids, chunk=512, pages=None):
        """All logits of a sequence, cut into chunks; the last of them may be short."""
        pages = np.arange(self.machine.num_pages, dtype=np.int32) if pages is None else pages
        found = []
        for at in range(0, len(ids), chunk):
            part = ids[at : at + chunk]
            rows = range(len(part))
            found.append(self.machine.step(part, [Chunk(0, len(part), at, pages)], rows).copy())
        return np.concatenate(found)


@pytest.fixture
def runner(tmp_path):
    """Writes and loads models; their threads end with the test."""
    made = []

    def make(model, threads=1, kv="f16"):
        path = tmp_path / "model.gguf"
        twin = tiny.write(path, model)
        made.append(Runner(path, threads, kv))
        return made[-1], twin

    yield make
    for each in made:
        each.model.close()


def relative_error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def token_ids(model, count, seed=0):
    return np.random.default_rng(seed).integers(0, model.vocab, count).tolist()


@pytest.mark.parametrize("name", FLOAT_MODELS)
def test_logits_of_float_models(runner, name):
    model = FLOAT_MODELS[name]
    run, twin = runner(model)
    ids = token_ids(model, 70)
    want = twin.logits(ids)
    got = run.logits(ids)
    assert got.shape == want.shape == (70, model.vocab)
    # Keys and values are float16: now and then one is rounded the other way. So are activations
    # where BF16 weights are multiplied as such: up to 2.0e-3 over seeds.
    bound = 3e-3 if name == "BF16" and host_target().has_bf16 else 1e-4
    assert relative_error(got, want) <= bound
    assert np.abs(got - want).max() <= 5 * bound * np.abs(want).max()


@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_logits_of_quantized_models(runner, name):
    model = BLOCK_MODELS[name]
    run, twin = runner(model)
    ids = token_ids(model, 40)
    exact = twin.logits(ids)
    twin.int8 = True
    want = twin.logits(ids)
    got = run.logits(ids)
    # An int8 code that is rounded the other way is seen by every later token: up to 1.08e-2 over
    # seeds and targets.
    assert relative_error(got, want) <= 1.2e-2
    assert naive.kl_divergence(got, want) <= 1e-4
    assert relative_error(got, exact) <= 3e-2
    assert naive.kl_divergence(got, exact) <= 1e-3


@pytest.mark.parametrize("name", ["tied", "wide_heads", "mixed", "Q4_0", "quantized_experts"])
def test_the_same_bits_for_every_chunking(runner, name):
    model = (FLOAT_MODELS | BLOCK_MODELS)[name]
    run, _ = runner(model, 2)
    ids = token_ids(model, 100)
    whole = run.logits(ids)
    for chunk in (1, 7, 32, 33):
        np.testing.assert_array_equal(run.logits(ids, chunk), whole)


@pytest.mark.parametrize("name", ["tied", "mixed", "experts", "quantized_experts"])
def test_the_same_bits_for_every_batch(runner, name):
    """Three ragged sequences in one batch, their pages mixed up, prefill beside decode."""
    model = (FLOAT_MODELS | BLOCK_MODELS)[name]
    run, _ = runner(model, 2)
    ids = [token_ids(model, count, seed) for seed, count in enumerate((61, 40, 9))]
    alone = [run.logits(each) for each in ids]
    pages = [np.array(each, np.int32) for each in ([6, 1], [0, 4], [3])]
    cuts = [(0, 0, 0), (37, 1, 0), (53, 34, 1), (54, 35, 2), (55, 36, 3), (61, 40, 9)]
    for before, after in pairwise(cuts):
        flat, chunks, want = [], [], []
        for i, (first, last) in enumerate(zip(before, after, strict=True)):
            if last > first:
                chunks.append(Chunk(len(flat), last - first, first, pages[i]))
                flat += ids[i][first:last]
                want.append(alone[i][first:last])
        got = run.machine.step(flat, chunks, range(len(flat)))
        np.testing.assert_array_equal(got, np.concatenate(want))


@pytest.mark.parametrize("name", ["untied", "Q6_K", "softmax_over_all", "quantized_experts"])
def test_the_same_bits_for_every_number_of_threads(runner, name, monkeypatch):
    monkeypatch.setattr("cyclewise.machine.machine.available_cpus", lambda: 3)
    monkeypatch.setattr("cyclewise.machine.host.available_cpus", lambda: 3)
    model = (FLOAT_MODELS | BLOCK_MODELS)[name]
    ids = token_ids(model, 60)
    found = []
    for threads in (1, 2, 3):
        run, _ = runner(model, threads)
        assert run.machine.num_threads == threads
        found.append(np.concatenate([run.logits(ids[:40]), run.logits(ids, 1)]))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_pages_for_several_sequences(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny.write(path, Tiny())
    counts = []
    for sequences in (1, 3):
        model = load_model(path, threads=1, context=100, sequences=sequences)
        engine = Engine(model)
        assert engine.context == 100
        counts.append(engine.pool.num_pages)
        held = [engine.new_sequence() for _ in range(sequences)]
        for each in held:
            engine.evaluate(each, [1] * 100)
        model.close()
    assert counts[1] == 3 * counts[0]


def test_the_same_bits_of_a_long_context(runner, monkeypatch):
    """Keys in many splits: in decode they are shared by threads, in prefill they are not."""
    monkeypatch.setattr("cyclewise.machine.machine.available_cpus", lambda: 3)
    monkeypatch.setattr("cyclewise.machine.host.available_cpus", lambda: 3)
    model = Tiny("qwen2", kv_heads=1, context=900)
    ids, found = token_ids(model, 840), []
    for threads in (1, 2, 3):
        run, _ = runner(model, threads)
        whole = run.logits(ids)[-4:]
        pages = np.arange(run.machine.num_pages, dtype=np.int32)
        decoded = [
            run.machine.step(ids[at : at + 1], [Chunk(0, 1, at, pages)], [0]).copy()
            for at in range(836, 840)
        ]
        np.testing.assert_array_equal(np.concatenate(decoded), whole)
        few = run.machine.step(ids[830:], [Chunk(0, 10, 830, pages)], range(6, 10))
        np.testing.assert_array_equal(few, whole)
        found.append(whole)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize("name", FLOAT_MODELS)
def test_logits_with_an_int8_cache(runner, name):
    model = FLOAT_MODELS[name]
    run, twin = runner(model, kv="int8")
    ids = token_ids(model, 70)
    exact = twin.logits(ids)
    twin.kv_int8 = True
    want, got = twin.logits(ids), run.logits(ids)
    # The twin takes no constant from biased keys, and mixes dimensions in the file's order, which
    # is another one where a part of a head is rotated by neighbours: other roundings, as small.
    if not model.biases and name != "half_rotated":
        # As BF16: up to 4.4e-3 over seeds.
        bound = 6e-3 if name == "BF16" and host_target().has_bf16 else 2e-3
        assert relative_error(got, want) <= bound
    if not model.experts:  # of which a token may choose others
        assert relative_error(got, exact) <= 2e-2
        assert naive.kl_divergence(got, exact) <= 1e-4
    assert run.model.kv_bytes_per_token == model.layers * model.kv_heads * (
        model.head_dim + 2 + -(-model.head_dim // 16) * 16 + 2
    )


def test_the_same_bits_of_a_long_int8_context(runner, monkeypatch):
    """Chunks, threads, decode, ragged batches and forks give a token the same bits."""
    monkeypatch.setattr("cyclewise.machine.machine.available_cpus", lambda: 3)
    monkeypatch.setattr("cyclewise.machine.host.available_cpus", lambda: 3)
    model = Tiny("qwen2", kv_heads=1, context=900, biases=("attn_q", "attn_k", "attn_v"))
    ids, found = token_ids(model, 840), []
    for threads in (1, 2, 3):
        run, _ = runner(model, threads, "int8")
        whole = run.logits(ids)[-4:]
        pages = np.arange(run.machine.num_pages, dtype=np.int32)
        decoded = [
            run.machine.step(ids[at : at + 1], [Chunk(0, 1, at, pages)], [0]).copy()
            for at in range(836, 840)
        ]
        np.testing.assert_array_equal(np.concatenate(decoded), whole)
        np.testing.assert_array_equal(run.logits(ids, 37)[-4:], whole)
        engine = Engine(run.model)
        first = engine.new_sequence()
        engine.evaluate(first, ids[:830], "none")
        for each in (first.fork(), first):
            np.testing.assert_array_equal(engine.evaluate(each, ids[830:], "all")[-4:], whole)
        found.append(whole)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_a_constant_is_taken_from_keys_of_int8(runner):
    """A bias a hundred times the keys changes no weight of theirs, and no code."""
    model = Tiny("qwen2", biases=("attn_q", "attn_k", "attn_v"), rope_base=1e9)
    errors = []
    for kept in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            make = tiny.make_tensors

            def large(model, make=make):
                tensors = make(model)
                for layer in range(model.layers):
                    data, name = tensors[f"blk.{layer}.attn_k.bias"]
                    bias = data.view(np.float32).copy()
                    slow = bias.reshape(model.kv_heads, 2, -1)[:, :, 2:]
                    slow += 100.0
                    tensors[f"blk.{layer}.attn_k.bias"] = bias.view(np.uint8), name
                return tensors

            patch.setattr(tiny, "make_tensors", large)
            if not kept:
                patch.setattr("cyclewise.models.decoder.Layer._center", lambda *_: None)
            run, twin = runner(model, kv="int8")
        ids = token_ids(model, 70)
        errors.append(relative_error(run.logits(ids), twin.logits(ids)))
    assert errors[0] < 0.2 * errors[1]


def test_what_an_int8_cache_cannot_hold(tmp_path):
    refused(tmp_path, Tiny(), InvalidParameterError, "kv is 'q8'", kv="q8")
    with pytest.raises(UnsupportedModelError, match="15 dimensions"):
        KVCache(Heads(4, 4, 15), 1, 1, "int8")


def test_logits_of_some_rows_only(runner):
    model = FLOAT_MODELS["tied"]
    run, _ = runner(model, 2)
    ids, pages = token_ids(model, 50), np.arange(8, dtype=np.int32)
    whole = run.logits(ids)
    for rows in ([], [49], [0, 17, 48]):
        got = run.machine.step(ids, [Chunk(0, 50, 0, pages)], rows)
        np.testing.assert_array_equal(got, whole[rows].reshape(len(rows), model.vocab))


def test_a_sequence_that_forgets_and_goes_on(runner):
    """What a truncated sequence left in its pages is not seen."""
    model = FLOAT_MODELS["tied"]
    run, _ = runner(model)
    ids, other = token_ids(model, 90), token_ids(model, 90, 1)
    want = run.logits(ids)
    run.logits(other)
    pages = np.arange(8, dtype=np.int32)
    run.logits(ids[:20])
    got = run.machine.step(ids[20:90], [Chunk(0, 70, 20, pages)], range(70))
    np.testing.assert_array_equal(got, want[20:])


def test_what_a_model_says_of_itself(runner):
    model = FLOAT_MODELS["untied"]
    run, twin = runner(model)
    config = run.model.config
    assert (config.architecture, config.num_layers, config.hidden_size) == ("llama", 2, 64)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 4, 16)
    assert (config.vocab_size, config.context_length, config.trained_context) == (100, 256, 256)
    assert run.model.format_bytes == {"F32": sum(t.nbytes for t in twin.tensors.values())}
    # The vocabulary's 100 rows are padded to 112; the embedding table is not streamed.
    streamed = sum(t.nbytes for n, t in twin.tensors.items() if n.startswith("blk."))
    assert run.model.bytes_per_token == streamed + 64 * 4 + 112 * 64 * 4
    assert run.model.kv_bytes_per_token == 2 * 2 * 4 * 16 * 2


# What cannot run says so


def refused(tmp_path, model, error, match, change=None, **arguments):
    """`change(tensors)` edits the file's tensors before they are written."""
    path, kept = tmp_path / "model.gguf", {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "write_file", lambda path, tiny, tensors: kept.update(tensors))
        tiny.write(path, model)
    if change is not None:
        change(kept)
    tiny.write_file(path, model, kept)
    with pytest.raises(error, match=match):
        load_model(path, **arguments).close()


def test_missing_and_misshapen_tensors(tmp_path):
    for name in ("blk.1.attn_v.weight", "output_norm.weight", "token_embd.weight"):
        refused(tmp_path, Tiny(), ModelFileError, name, lambda t, name=name: t.pop(name))
    name = "blk.0.ffn_up.weight"
    cut = lambda t: t.update({name: (t[name][0][:-1], "F32")})  # noqa: E731
    refused(tmp_path, Tiny(), ModelFileError, f"{name} has shape", cut)
    name = "blk.0.attn_q.bias"
    short = lambda t: t.update({name: (np.zeros(60, np.float32).view(np.uint8), "F32")})  # noqa: E731
    refused(tmp_path, Tiny(), ModelFileError, f"{name} has shape", short)


def test_what_is_not_supported(tmp_path):
    refused(tmp_path, Tiny("mamba"), UnsupportedModelError, "architecture 'mamba'")
    for value in ((STRING, ["llama"]), (U32, [1, 2])):
        path = tmp_path / "array.gguf"
        path.write_bytes(gguf([entry("general.architecture", ARRAY, array(*value))]))
        with pytest.raises(UnsupportedModelError, match=r"architecture .*\[.* is not"):
            load_model(path)
    narrow = Tiny(heads=8, kv_heads=1, head_dim=8)
    refused(tmp_path, narrow, UnsupportedModelError, "multiple of 16")
    partly = Tiny(format="Q4_0", formats={"ffn_up": "F32"})
    refused(tmp_path, partly, UnsupportedModelError, "partly float")
    more = lambda t: t.update({"blk.1.attn_sinks.weight": t["output_norm.weight"]})  # noqa: E731
    match = r"not known to have a tensor like 'blk.1.attn_sinks.weight' \(1 in all\)"
    refused(tmp_path, Tiny(), UnsupportedModelError, match, more)
    lines = lambda t: t.update({"a\nb\x1b": t["output_norm.weight"]})  # noqa: E731
    match = r"have a tensor like 'a\\nb\\x1b' \(1 in all\)"
    refused(tmp_path, Tiny(), UnsupportedModelError, match, lines)


def test_numbers_that_cannot_be(tmp_path):
    refused(tmp_path, Tiny(heads=4, kv_heads=3), ModelFileError, "4 query heads")
    refused(tmp_path, Tiny(rope_dim=18), ModelFileError, "RoPE over 18")
    refused(tmp_path, Tiny(rope_dim=7), ModelFileError, "RoPE over 7")
    refused(tmp_path, Tiny(rope_base=-1.0), ModelFileError, "rope.freq_base")
    for context in (0, 257):
        refused(tmp_path, Tiny(), InvalidParameterError, "1 to 256", context=context)
    refused(tmp_path, Tiny(), InvalidParameterError, "at least 1", threads=0)


# stories260K, as the test of github.com/karpathy/llama2.c has it

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. "
    'She said, "I want to play with your ball, but I can\'t find it."\n'
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. "
    "I didn't know what to do.\"\nLily didn't want to help her mom, so she"
)


def test_the_greedy_story(shared_data, tmp_path):
    folder = shared_data / "stories260K"
    if not folder.is_dir():
        pytest.skip("stories260K is not among the shared test data")
    tiny.write_stories(folder / "stories260K.bin", tmp_path / "stories.gguf")
    pieces = tiny.read_pieces(folder / "tok512.bin")
    run = Runner(tmp_path / "stories.gguf", 2)
    pages = np.arange(run.machine.num_pages, dtype=np.int32)
    ids = [1]
    while len(ids) <= 200:
        logits = run.machine.step(ids[-1:], [Chunk(0, 1, len(ids) - 1, pages)], [0])
        ids.append(int(logits[0].argmax()))
    text = b"".join(pieces[i] for i in ids[1:]).replace(b"<0x0A>", b"\n").decode().lstrip()
    assert text.startswith(STORY)
    # The whole story at once gives every choice again.
    again = run.logits(ids[:-1])
    assert again.argmax(axis=1).tolist() == ids[1:]
    run.model.close()


def test_a_fork_has_the_bits_of_its_own_text(runner):
    """Two sequences that share a page go on, each with a copy of it."""
    model = FLOAT_MODELS["qwen2"]
    run, _ = runner(model, 2)
    engine = Engine(run.model)
    ids, ends = token_ids(model, 45), [token_ids(model, 5, 1), token_ids(model, 9, 2)]
    first = engine.new_sequence()
    engine.evaluate(first, ids, "none")
    forks = [first, first.fork()]
    got = [engine.evaluate(each, end, "all") for each, end in zip(forks, ends, strict=True)]
    assert forks[0].pages[0] == forks[1].pages[0] and forks[0].pages[1] != forks[1].pages[1]
    for end, logits in zip(ends, got, strict=True):
        np.testing.assert_array_equal(logits, run.logits(ids + end)[45:])
