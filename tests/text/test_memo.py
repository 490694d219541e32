from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cyclewise.text.memo import Lookups, Memo, key_of


def test_the_one_not_asked_for_for_longest_goes_first():
    memo = Memo(10)
    for name in (b"a", b"b", b"c"):
        memo.keep(name, name * 2, 3)
    assert memo.find(b"a") == b"aa"
    memo.keep(b"d", b"dd", 3)
    assert [memo.find(name) for name in (b"a", b"b", b"c", b"d")] == [b"aa", None, b"cc", b"dd"]
    assert memo.lookups == Lookups(4, 1)
    memo.keep(b"e", b"ee", 11)
    assert memo.find(b"e") is None and len(memo) == 3
    memo.keep(b"e", b"ee", 10)
    assert memo.find(b"e") == b"ee" and len(memo) == 1
    memo.keep(b"e", b"", 11)  # what is too large now is not what it was
    assert len(memo) == 0
    memo.keep(b"f", b"ff", 10)
    memo.clear()
    assert memo.find(b"f") is None
    memo.keep(b"g", b"gg", 10)
    assert memo.find(b"g") == b"gg"


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), max_size=60))
def test_it_never_holds_more_than_it_may(actions):
    memo, held = Memo(12), {}
    for key, size in actions:
        name = bytes([key])
        if not size:
            assert memo.find(name) in (None, held.get(name))
            continue
        memo.keep(name, size, size)
        held[name] = size
        kept = [size for name, size in held.items() if memo.find(name) is not None]
        assert sum(kept) <= 12 and memo.find(name) == size


def test_keys():
    texts = ["", "a", "b", "\ud800", "a" * 100_000]
    keys = [
        key_of(salt, kind, text)
        for salt in (b"", b"1", b"2" * 64)
        for kind in ("chat", "text")
        for text in texts
    ]
    assert len(set(keys)) == len(keys)
    assert key_of(b"1", "chat", "a") == key_of(b"1", "chat", "a")
