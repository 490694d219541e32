from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from cyclewise.machine.costs import (
    BatchShape,
    MatrixShape,
    attention_form,
    cost,
    embed_form,
    gated_form,
    layer_norm_form,
    linear_form,
    norm_form,
    positions_form,
    rope_form,
    softcap_form,
)
from cyclewise.machine.kernels.blocks import tile_bytes
from cyclewise.machine.names import collapsed, layer_of
from cyclewise.models import load_model
from cyclewise.weights.formats import FORMATS
from tests import naive
from tests.counting import Book, Chunk, CountingTransformer, counted
from tests.models import tiny
from tests.models.tiny import Tiny

MODELS = {
    "tied": Tiny(),
    "untied": Tiny(tied=False, kv_heads=4, layers=1),
    "odd_sizes": Tiny(hidden=40, heads=2, kv_heads=1, head_dim=16, feed_forward=52, vocab=77),
    "wide_heads": Tiny(hidden=48, heads=6, kv_heads=2, head_dim=24),
    "some_biases": Tiny("qwen2", biases=("attn_q", "attn_k", "attn_v")),
    "all_biases": Tiny(biases=("attn_q", "attn_k", "attn_v", "attn_output"), layers=3),
    "half_rotated": Tiny(rope_dim=8),
    "F16": Tiny(format="F16"),
    "Q8_0": Tiny(format="Q8_0", vocab=90),
    "Q4_1": Tiny(format="Q4_1", tied=False),
    "mixed": Tiny(
        "qwen2", format="Q4_K", hidden=256, heads=4, kv_heads=1, head_dim=64, feed_forward=256,
        formats={"token_embd": "Q8_0", "attn_v": "Q6_K", "ffn_down": "Q6_K", "ffn_gate": "Q5_0"},
        biases=("attn_q", "attn_k", "attn_v"), vocab=90,
    ),
    "float_layers": Tiny(
        format="Q4_1", formats={"token_embd": "F16", "ffn_down": "F32", "attn_output": "BF16"}
    ),
    "experts": Tiny(experts=5, chosen=2),
    "many_experts": Tiny(experts=24, chosen=3, normalized=False, layers=1),
    "quantized_experts": Tiny(
        experts=3, chosen=2, format="Q8_0", formats={"ffn_down": "Q4_1"}, vocab=90
    ),
    "float_down": Tiny(experts=4, chosen=1, format="Q4_0", formats={"ffn_down": "F16"}),
}  # fmt: skip


@pytest.fixture
def loaded(tmp_path):
    """The program of a tiny model, and its counting twin."""
    made = []

    def make(model):
        tensors = tiny.make_tensors(model)
        tiny.write_file(tmp_path / "model.gguf", model, tensors)
        made.append(load_model(tmp_path / "model.gguf", threads=1))
        return made[-1].program, CountingTransformer(tiny.twin(model, tensors), tensors)

    yield make
    for each in made:
        each.close()


def token_ids(model, count, seed=0):
    return np.random.default_rng(seed).integers(0, model.vocab, count).tolist()


def closed_forms(program, shape, experts_read):
    found = {}
    for moment in program.moments:
        read = experts_read.get(moment.name.rpartition(".")[0] + ".")
        each = asdict(cost(moment.form, shape, read if moment.form.num_experts else None))
        unit = each.pop("unit")
        assert unit == ("dot" if f"{moment.name}.quantize" in names(program) else "fma")
        found[moment.name] = each
    return found


def names(program):
    return [moment.name for moment in program.moments]


def check(program, twin, chunks, positions, logit_rows):
    """That the closed forms give what the twin counts while it computes; returns its logits."""
    shape = BatchShape(
        tuple((len(c.token_ids), at) for c, at in zip(chunks, positions, strict=True)),
        len(logit_rows),
    )
    logits, book = twin.run(chunks, logit_rows)
    counted = {name: asdict(count) for name, count in book.counts.items()}
    given = closed_forms(program, shape, twin.experts_read)
    assert list(counted) == [name for name in given if name in counted]
    nothing = dict.fromkeys(("operations", "weight_bytes", "activation_bytes", "kv_bytes"), 0)
    assert given == {name: counted.get(name, nothing) for name in given}
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_closed_forms_are_what_the_twin_counts(loaded, name):
    model = MODELS[name]
    program, twin = loaded(model)
    first, second = token_ids(model, 41), token_ids(model, 9, 1)
    # A prompt in two parts, then decode at depth.
    check(program, twin, [Chunk(0, first[:33])], [0], [])
    check(program, twin, [Chunk(0, first[33:40])], [33], [6])
    check(program, twin, [Chunk(0, first[40:])], [40], [0])
    # A ragged batch: one sequence goes on, one begins, and logits of some rows are wanted.
    check(program, twin, [Chunk(0, first[:3]), Chunk(1, second)], [41, 0], [0, 2, 7])


@pytest.mark.parametrize(
    "name", ["tied", "all_biases", "half_rotated", "Q4_1", "quantized_experts"]
)
def test_what_counts_computes_the_model(loaded, name):
    model = MODELS[name]
    program, twin = loaded(model)
    ids = token_ids(model, 12)
    twin.twin.int8 = True
    want = twin.twin.logits(ids)
    first = check(program, twin, [Chunk(0, ids[:7])], [0], range(7))
    then = check(program, twin, [Chunk(0, ids[7:])], [7], range(5))
    np.testing.assert_allclose(np.concatenate([first, then]), want, rtol=1e-3, atol=1e-4)


def test_a_packed_tile_takes_what_the_file_takes():
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"):
        block = FORMATS[name]
        assert tile_bytes(name, 256) == 16 * 256 // block.block_size * block.block_bytes


def test_a_batch_of_two_sequences():
    shape = BatchShape(((3, 10), (1, 0)), 2)
    assert (shape.num_tokens, shape.num_keys(), shape.num_earlier_keys()) == (4, 14, 10)
    assert shape.num_pairs() == 11 + 12 + 13 + 1


def test_pairs_and_keys_of_a_window():
    shape = BatchShape(((3, 10), (7, 0), (1, 4)), 0)
    for window in (1, 2, 4, 5, 11, 12, 99):
        pairs = [min(first + i + 1, window) for count, first in shape.chunks for i in range(count)]
        assert shape.num_pairs(window) == sum(pairs)
        seen = [
            {key for i in range(count) for key in range(max(0, first + i - window + 1), first + i)}
            | set(range(first, first + count))
            for count, first in shape.chunks
        ]
        assert shape.num_keys(window) == sum(len(keys) for keys in seen)


def test_forms_of_normed_queries_and_windows():
    """The twins' operations, and the bytes of the norms' weights."""
    rng, book = np.random.default_rng(0), Book()
    heads, kv_heads, dim, position, window = 6, 2, 16, 50, 7
    rows = counted(rng.standard_normal((3, heads + 2 * kv_heads, dim)).astype(np.float32), book)
    weight = np.ones(dim, np.float32)
    with book.moment("rope") as count:
        queries, keys = rows[:, :heads], rows[:, heads:-kv_heads]
        normed = [naive.rms_norm(x, weight, 1e-6).astype(np.float32) for x in (queries, keys)]
        cosines, sines = (np.ones((3, 1, dim // 4), np.float32) for _ in range(2))
        rotated = [naive.rotate(x, cosines, sines) for x in normed]
        assert (rotated[0] * np.float32(0.1)).shape == queries.shape
        count.weight_bytes += 2 * weight.nbytes
        count.activation_bytes += rows.nbytes + queries.nbytes + cosines.nbytes + sines.nbytes
        count.kv_bytes += (keys.nbytes + rows[:, -kv_heads:].nbytes) // 2
    shape = BatchShape(((3, position),), 0)
    form = rope_form(heads, kv_heads, dim, dim // 2, query_norm=True, key_norm=True)
    assert asdict(cost(form, shape)) == {"unit": "fma", **asdict(book.counts["rope"])}
    assert rope_form(heads, kv_heads, dim, dim // 2).weight_bytes == 0

    queries = counted(rng.standard_normal((3, heads, dim)), book)
    keys = counted(rng.standard_normal((position + 3, kv_heads, dim)).astype(np.float16), book)
    with book.moment("attend") as count:
        for i, query in enumerate(queries):
            end = position + i + 1
            naive.attend(query, keys[:end], keys[:end], window=window, softcap=30.0)
        count.activation_bytes += queries.nbytes  # float64: what is read and what is written
        count.kv_bytes += 2 * keys[position + 1 - window :].nbytes
    form = attention_form(heads, kv_heads, dim, window=window, softcap=True)
    assert asdict(cost(form, shape)) == {"unit": "fma", **asdict(book.counts["attend"])}


def test_forms_of_an_int8_cache():
    """The bytes of a head: its codes, and a scale of two bytes."""
    shape = BatchShape(((3, 50),), 0)
    forms = rope_form(6, 2, 16, 16, kv="int8"), attention_form(6, 2, 16, kv="int8")
    written, read = (cost(form, shape).kv_bytes for form in forms)
    assert (written, read) == (3 * 4 * 18, 53 * 4 * 18)
    plain = rope_form(6, 2, 16, 16), attention_form(6, 2, 16)
    for form, other in zip(forms, plain, strict=True):
        assert cost(form, shape).operations == cost(other, shape).operations


def test_forms_of_gemma():
    rng, book, width = np.random.default_rng(0), Book(), 48
    table = rng.standard_normal((9, width)).astype(np.float16)
    with book.moment("embed") as count:
        rows = table[[4, 4, 0]]
        x = counted(rows.astype(np.float32), book) * np.float32(3)
        count.activation_bytes += rows.nbytes + x.nbytes
    projected = counted(rng.standard_normal((3, width)).astype(np.float32), book)
    weight = np.ones(width, np.float32)
    with book.moment("add_norm") as count:
        out = x + naive.rms_norm(projected, weight, 1e-6).astype(np.float32)
        count.weight_bytes += weight.nbytes
        count.activation_bytes += x.nbytes + projected.nbytes + out.nbytes
    gate, up = rng.standard_normal((2, 32, width)).astype(np.float32)
    with book.moment("gated") as count:
        gated = (naive.gelu(x @ gate.T) * (x @ up.T)).astype(np.float32)
        count.weight_bytes += gate.nbytes + up.nbytes
        count.activation_bytes += x.nbytes + gated.nbytes
    with book.moment("softcap") as count:
        capped = naive.softcap(x, 30.0).astype(np.float32)
        count.activation_bytes += x.nbytes + capped.nbytes
    matrix = MatrixShape("F32", 32, width, gate.nbytes)
    forms = {
        "embed": embed_form(width, 2 * width, scaled=True),
        "add_norm": norm_form(width, add=True),
        "gated": gated_form(matrix, matrix, "gelu", quantized=False),
        "softcap": softcap_form(width),
    }
    for name, form in forms.items():
        each = asdict(cost(form, BatchShape(((3, 1),), 3)))
        assert each == {"unit": "fma", **asdict(book.counts[name])}, name


def test_forms_of_gpt2():
    rng, book, width = np.random.default_rng(0), Book(), 48
    x = counted(rng.standard_normal((3, width)).astype(np.float32), book)
    weight, bias = np.ones((2, width), np.float32)
    with book.moment("layer_norm") as count:
        out = naive.layer_norm(x, weight, bias, 1e-5).astype(np.float32)
        count.weight_bytes += weight.nbytes + bias.nbytes
        count.activation_bytes += x.nbytes + out.nbytes
    table = rng.standard_normal((9, width)).astype(np.float16)
    with book.moment("positions") as count:
        rows = table[[4, 4, 0]]
        out = x + rows
        count.activation_bytes += rows.nbytes + x.nbytes + out.nbytes
    matrix, bias = rng.standard_normal((32, width)).astype(np.float32), np.ones(32, np.float32)
    with book.moment("linear_gelu") as count:
        out = naive.gelu(x @ matrix.T + bias).astype(np.float32)
        count.weight_bytes += matrix.nbytes + bias.nbytes
        count.activation_bytes += x.nbytes + out.nbytes
    shape = (MatrixShape("F32", 32, width, matrix.nbytes),)
    forms = {
        "layer_norm": layer_norm_form(width), "positions": positions_form(width, 2 * width),
        "linear_gelu": linear_form(shape, 32, quantized=False, activation="gelu"),
    }  # fmt: skip
    for name, form in forms.items():
        each = asdict(cost(form, BatchShape(((3, 1),), 0)))
        assert each == {"unit": "fma", **asdict(book.counts[name])}, name


def test_a_prefix_of_the_layers(loaded):
    program, _ = loaded(Tiny(layers=3))
    assert program.num_layers == 3
    assert program.prefix(3).moments == program.moments
    one = program.prefix(1)
    assert one.num_layers == 1
    assert {layer_of(name) for name in names(one)} == {None, 0}
    assert names(program.prefix(0)) == ["embed", "output.norm", "output"]
    assert one.logits is program.logits and one.memory is program.memory


def test_names_of_moments():
    assert collapsed("layers.12.ffn.down") == "layers.*.ffn.down"
    assert collapsed("output.norm") == "output.norm"
    assert (layer_of("layers.12.ffn.down"), layer_of("embed")) == (12, None)
