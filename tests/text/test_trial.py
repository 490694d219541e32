from __future__ import annotations

import gc
import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cyclewise.engine.request import SamplingParams
from cyclewise.errors import CyclewiseError, EngineError, InvalidParameterError, OverloadedError
from cyclewise.text.structure import Structures
from cyclewise.text.tokenizer import Tokenizer
from cyclewise.text.trial import Trials
from tests.text.test_process import WAIT, write

LIMIT = 10.0  # seconds; it takes 1.4 where nobody else computes, and minutes to compile them
BOMBS = {
    "multiple": {"json_schema": {"type": "integer", "multipleOf": 99_999_989}},
    "patterns": {
        "json_schema": {
            "allOf": [
                {"type": "string", "pattern": f".*{chr(97 + i)}.{{{40 + i}}}.*"} for i in range(20)
            ]
        }
    },
    "automata": {"grammar": "start: T\nT: /(.*a.{22})/ & /(.*b.{21})/ & ~/.*c.{20}/"},
}
SMALL = {
    "repetition": {"regex": "((a{0,100}){0,100}){0,100}"},
    "numbers": {"regex": "((a{1000}){1000}){1000}"},
    "brackets": {"regex": "(" * 50_000 + "a" + ")" * 50_000},
    "recursive": {"json_schema": {"$ref": "#"}},
    "recursive twice": {"json_schema": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}},
    "doubling": {
        "json_schema": {
            "$ref": "#/$defs/a0",
            "$defs": {
                f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)
            } | {"a40": {"type": "integer"}},
        }
    },
    "product": {
        "json_schema": {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "integer"}}} for j in range(8)]}
                for i in range(8)
            ]
        }
    },
    "ambiguous": {"grammar": 'start: x x x x x x x x\nx: x x | "a" | '},
    "rules": {
        "grammar": "start: a0\n"
        + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60))
        + '\na60: "x"'
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("trial") / "model.gguf"
    return path, Tokenizer.from_metadata(write(path, None))


@pytest.fixture
def structures(model):
    path, tokenizer = model
    trials = Trials(path, tokenizer.vocab_size)
    made = Structures(tokenizer, tokenizer.vocab_size, trials)
    trials.wait()
    yield made
    made.close()


@pytest.mark.parametrize("values", BOMBS.values(), ids=BOMBS)
def test_what_takes_too_long_is_refused_in_time(structures, values):
    begin = time.monotonic()
    with pytest.raises(InvalidParameterError, match=r"takes more than 1.25 seconds or 256 MiB"):
        structures.make(SamplingParams(**values))
    assert time.monotonic() - begin < LIMIT
    assert structures.make(SamplingParams(regex="ab")).allowed().any()


@pytest.mark.parametrize("values", SMALL.values(), ids=SMALL)
def test_what_explodes_is_followed_or_refused_in_time(structures, values):
    """Tokens are drawn for as long as they may be: every answer ends, and soon."""
    rng, begin = random.Random(0), time.monotonic()
    try:
        structure = structures.make(SamplingParams(**values))
        assert time.monotonic() - begin < LIMIT
        for _ in range(100):
            allowed = np.flatnonzero(structure.allowed()[3:]) + 3  # but those that end a text
            if not len(allowed) or structure.advance(int(rng.choice(allowed))):
                break
    except CyclewiseError as error:
        assert any(word in str(error) for word in ("followed", "allows nothing", "takes more"))
    assert time.monotonic() - begin < 2 * LIMIT


def test_others_are_made_meanwhile(structures):
    with ThreadPoolExecutor(2) as pool:
        bombs = [pool.submit(structures.make, SamplingParams(**each)) for each in BOMBS.values()]
        done = 0
        while not bombs[0].done():
            assert structures.make(SamplingParams(regex=f"a{{{done + 1}}}"))
            done += 1
        assert done
        for bomb in bombs:
            assert isinstance(bomb.exception(WAIT), InvalidParameterError)


def test_memory_that_is_compiled_to_is_bounded(structures, monkeypatch):
    monkeypatch.setattr("cyclewise.text.structure._MOST_BYTES", 64 << 20)
    held = []
    with pytest.raises(OverloadedError, match="memory"):
        for i in range(40):
            words = "|".join(f"w{i}{j:05d}x" for j in range(10_000))
            held.append(structures.make(SamplingParams(regex=words)))
    assert 2 < len(held) < 40
    assert not len(structures.known)
    held.clear()
    gc.collect()
    assert structures._num_bytes < 4 << 20
    structures.make(SamplingParams(regex=words))


def test_a_flood_of_schemas_leaves_nothing_behind(structures):
    def flood(begin, count):
        for i in range(begin, begin + count):
            fields = {f"p{i}_{j}": {"type": "string"} for j in range(20)}
            structures.make(SamplingParams(json_schema={"type": "object", "properties": fields}))

    flood(0, 100)
    before = resident()
    flood(100, 100)
    assert resident() - before < 8 << 20
    assert len(structures.known) == 64
    structures.known.clear()
    gc.collect()
    assert structures._num_bytes < 8 << 20


def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_child_that_dies_is_replaced(structures):
    trials = structures._trials
    os.kill(trials._child._process.pid, signal.SIGKILL)
    trials._child._reader.join(WAIT)
    assert trials.run("json_schema", json.dumps({})) >= 0


def test_a_file_that_cannot_be_read(tmp_path, capfd):
    trials = Trials(tmp_path / "missing.gguf", 10)
    with pytest.raises(EngineError, match="has ended"):
        trials.wait()
    trials.close()
    assert "missing.gguf" in capfd.readouterr().err


def test_a_structure_may_not_take_long_for_ever(structures, monkeypatch):
    monkeypatch.setattr("cyclewise.text.structure._SECONDS", 0.0)
    monkeypatch.setattr("cyclewise.text.structure._SECONDS_A_TOKEN", 0.0)
    for temperature in (0, 1):
        structure = structures.make(SamplingParams(regex="a*", temperature=temperature))
        with pytest.raises(CyclewiseError, match="takes too long"):
            structure.allowed()
