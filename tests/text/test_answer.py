from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cyclewise.text.answer import Answer, StopStrings
from tests.engine.toy import ToyDetokenizer


def naive_stop(text, stops):
    """Character by character: the text before the first stop string that is complete."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@settings(max_examples=120)
@given(
    st.lists(st.text("ab.", max_size=4), max_size=12),
    st.lists(st.text("ab.", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_agree_with_the_twin(pieces, stop):
    text, found = naive_stop("".join(pieces), stop)
    stops = StopStrings(stop)
    shown = ""
    for piece in pieces:
        shown += stops.push(piece)
        assert text.startswith(shown)  # nothing is shown that has to be taken back
    shown += stops.flush()
    assert (shown, stops.found) == (text, found)


def test_an_answer_ends_at_its_stop_string_and_not_behind_it():
    answer = Answer(ToyDetokenizer(), ["STOP"])
    assert answer.push(b"one ST") == "one "
    assert answer.push(b"") == ""
    assert answer.push(b"ILL STOP, and more") == "STILL "
    assert answer.stopped
    assert answer.push(b"more") == answer.end() == ""
    assert bytes(answer.token_ids) == b"one STILL STOP"
    assert answer.text == "one STILL "


def test_the_end_of_an_answer_gives_out_what_was_held_back():
    answer = Answer(ToyDetokenizer(), ["STOP"])
    assert answer.push(["ü".encode()[0], *b"x"]) == "\N{REPLACEMENT CHARACTER}x"
    assert answer.push([*b"ST", "ü".encode()[0]]) == ""
    assert answer.end() == "ST\N{REPLACEMENT CHARACTER}"
    assert answer.text.endswith("xST\N{REPLACEMENT CHARACTER}")
