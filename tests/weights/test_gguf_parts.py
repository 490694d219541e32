from __future__ import annotations

import gguf
import numpy as np
import pytest

from cyclewise.engine.engine import Engine
from cyclewise.errors import CyclewiseError, ModelFileError
from cyclewise.models import load_model
from cyclewise.weights.gguf_parts import GGUFParts, open_gguf, part_names
from cyclewise.weights.source import open_source
from tests.models import tiny
from tests.models.tiny import Tiny
from tests.weights import build
from tests.weights.build import ARRAY, I32, STRING, U16

MODEL = Tiny(experts=2, chosen=1, format="Q8_0", tied=False)


def name(number, count=3):
    return f"model-{number:05}-of-{count:05}.gguf"


@pytest.fixture
def split(tmp_path):
    """The folder of a model in four parts, and its tensors as they were before."""
    tensors = tiny.make_tensors(MODEL)
    tiny.write_file(tmp_path / "whole.gguf", MODEL, tensors)
    tiny.write_file(tmp_path / "model.gguf", MODEL, tensors, part=7)
    assert len(list(tmp_path.glob("model-*-of-00004.gguf"))) == 4
    return tmp_path


@pytest.mark.parametrize("number", [1, 3])
def test_any_part_opens_the_model(split, number):
    with open_source(split / name(number, 4)) as ours, open_source(split / "whole.gguf") as whole:
        assert isinstance(ours, GGUFParts) and ours.path == split / name(number, 4)
        assert [file.name for file in ours.files] == [name(i, 4) for i in (1, 2, 3, 4)]
        assert list(ours.tensors) == list(whole.tensors)
        for tensor in whole.tensors:
            assert ours.data(tensor).tobytes() == whole.data(tensor).tobytes()
            ours.release(tensor)
        split_keys = {"split.no": 0, "split.count": 4, "split.tensors.count": 23}
        assert ours.metadata == whole.metadata | split_keys


def test_it_computes_what_the_whole_does(split):
    logits = []
    for file in (name(2, 4), "whole.gguf"):
        model = load_model(split / file, threads=1)
        engine = Engine(model)
        logits.append(engine.evaluate(engine.new_sequence(), list(range(40))).copy())
        model.close()
    assert np.array_equal(*logits)


def test_names_of_parts():
    assert part_names(name(2)) == [name(1), name(2), name(3)]
    for other in ("model.gguf", name(0), name(4), "model-1-of-3.gguf", "-00001-of-00002.gguf"):
        assert part_names(other) == [other]


def write(folder, number, tensors, *entries, count=3, total=3, no=None):
    keys = [
        build.entry("split.no", U16, number - 1 if no is None else no),
        build.entry("split.count", U16, count),
        build.entry("split.tensors.count", I32, total),
    ]
    table = [build.tensor(each, (8,), 0, 32 * at) for at, each in enumerate(tensors)]
    raw = build.gguf([*keys, *entries], table, bytes(32 * len(tensors)))
    (folder / name(number)).write_bytes(raw)


def refused(path, reason):
    with pytest.raises(CyclewiseError, match=reason) as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def parts(tmp_path):
    """Three parts that may be spoiled, one of them without tensors."""
    write(tmp_path, 1, [], build.entry("general.architecture", STRING, "llama"))
    write(tmp_path, 2, ["a", "b"])
    write(tmp_path, 3, ["c"])
    with open_gguf(tmp_path / name(1)) as found:
        assert list(found.tensors) == ["a", "b", "c"]
    return tmp_path


def test_a_missing_part(parts):
    (parts / name(2)).unlink()
    refused(parts / name(3), f"{name(2)} is missing, one of the model's 3 files; fetch it")


def test_a_name_that_does_not_say_which(parts):
    for wrong in ("model.gguf", name(1, 4)):
        (parts / name(1)).rename(parts / wrong)
        refused(parts / wrong, r"one of 3 parts .* should end in -00001-of-00003\.gguf")
        (parts / wrong).rename(parts / name(1))


def test_counts_that_differ(parts):
    write(parts, 2, ["a", "b"], count=4)
    refused(parts / name(1), r"00002-of.*: split\.count is 4, but 3 in .*; they are not parts of")
    write(parts, 2, ["a", "b"], total=4)
    refused(parts / name(1), r"00002-of.*: split\.tensors\.count is 4, but 3 in")
    (parts / name(2)).write_bytes(build.gguf([build.entry("split.no", U16, 1)]))
    refused(parts / name(1), r"00002-of.*: split\.count is None, but 3 in")


def test_a_part_in_anothers_place(parts):
    write(parts, 2, ["a", "b"], no=2)
    refused(parts / name(1), r"00002-of.*: split\.no is 2 where its name needs 1; it is another")


def test_too_many_and_too_few_tensors(parts):
    write(parts, 3, ["c", "d"])
    refused(parts / name(1), r"hold 4 tensors, where split\.tensors\.count says 3; one of them is")
    write(parts, 3, [])
    refused(parts / name(1), r"hold 2 tensors, where split\.tensors\.count says 3")


def test_a_tensor_in_two_parts(parts):
    write(parts, 3, ["a"])
    refused(parts / name(1), r"00003-of.*: tensor 'a' is in model-00002-of-00003\.gguf too")


@pytest.mark.parametrize("value", ["qwen2", None])
def test_a_part_of_another_model(parts, value):
    other = build.entry("general.architecture", STRING, "qwen2")
    if value is None:
        other = build.entry("tokenizer.scores", ARRAY, build.array(I32, [1, 2]))
    write(parts, 3, ["c"], other)
    refused(parts / name(1), "they are not parts of one model")


def test_a_damaged_part(parts):
    raw = (parts / name(2)).read_bytes()
    (parts / name(2)).write_bytes(raw[:-1])
    with pytest.raises(ModelFileError, match=r"00002-of-00003\.gguf: .*truncated"):
        open_gguf(parts / name(1))


def test_the_gguf_packages_constants():
    split = gguf.Keys.Split
    assert (split.LLM_KV_SPLIT_NO, split.LLM_KV_SPLIT_COUNT, split.LLM_KV_SPLIT_TENSORS_COUNT) == (
        "split.no", "split.count", "split.tensors.count",
    )  # fmt: skip
