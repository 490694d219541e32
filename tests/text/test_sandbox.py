from __future__ import annotations

import tracemalloc

import pytest

from cyclewise.errors import TemplateError
from cyclewise.text import sandbox
from cyclewise.text.chat import ChatTemplate
from tests.text.test_chat import template, user


def refused(source: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words) as caught:
        template(source).render(user("hello"))
    assert "\n" not in str(caught.value)


@pytest.fixture
def short_time(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.05)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% for x in [1, 2] recursive %}{{ loop([1, 2, 3]) if loop.depth < 50 }}{% endfor %}",
        "{% for i in range(99999) if range(99999) | list | length == 0 %}{% endfor %}",
        "{% for i in range(99999) %}{% set x = ('a ' * 99999) | title %}{% endfor %}",
        "{% for x in [1] recursive %}{% if loop.first and loop.depth < 2 %}{{ loop(range(99999)) }}"
        "{% else %}" + "{% set y = x - x %}" * 2000 + "{% endif %}{% endfor %}",
    ],
)
def test_what_runs_too_long_is_stopped(short_time, source):
    refused(source, "was stopped: it (ran for longer|makes too much)")


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * 'a' }}",
        "{{ ['a'] * 10**9 }}",
        "{{ 7 ** (10**9) }}",
        "{{ (10 ** 4000) * (10 ** 4000) }}",
        "{{ '%1000000000d' % 3 }}",
        "{{ '%*d' % (10**9, 3) }}",
        "{{ '%99999d' | format(3) }}",
        "{{ '{:1000000000}'.format(3) }}",
        "{{ '{:{}}'.format(3, 10**9) }}",
        "{{ 'x'.center(10**9) }}{{ 1 }}",
        "{{ 'x'.zfill(10**9) }}",
        "{{ '\t'.expandtabs(10**9) }}",
        "{{ '\t'.expandtabs(tabsize=10**9) }}",
        "{{ ('a' * 10**6) | replace('a', 'b' * 10**5) }}",
        "{{ ('a' * 10**6).replace('a', 'b' * 10**5) }}",
        "{{ ('a' * 10**5) | list | join('b' * 10**5) }}",
        "{{ ('b' * 10**5).join('a' * 10**5) }}",
        "{{ 'a' | indent(10**9) }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{{ 5 | round(-10**9) }}",
        "{{ strftime_now('%Y' * 10**4) }}",
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x=n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x=n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x=[]) %}{% for i in range(99) %}{% set n.x=[n.x, n.x] %}{% endfor %}",
        "{% set n = namespace(x=[]) %}{% for i in range(99) %}{% set n.x = (n.x,) %}{% endfor %}",
        "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = {'a': n.x, 'b': n.x} %}"
        "{% endfor %}",
        "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = dict(a=n.x, b=n.x) %}"
        "{% endfor %}",
        "{% set n = namespace(a=1) %}{% for i in range(99) %}{% set n = namespace(a=[n, n]) %}"
        "{% endfor %}{{ [n] }}",
    ],
)
def test_what_is_too_large_is_never_made(source):
    tracemalloc.start()
    try:
        refused(source, "was stopped")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


@pytest.mark.parametrize("copy", ["[1:]", " | upper", " | trim", " | e"])
def test_copies_count_together(copy):
    names = (f"{{% set a{i} = a{copy} %}}" for i in range(1000))
    tracemalloc.start()
    try:
        refused("{% set a = 'a' * 2000000 %}" + "".join(names), "was stopped")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200 << 20


def test_many_special_tokens_with_roles_in_them(short_time):
    tokens = [f"<|{i}_user_{i}|>" for i in range(20_000)]
    source = "".join("<{{ m.role }}>" for _ in range(4000))
    chat = ChatTemplate(source, bos_token="", eos_token="", special_tokens=tokens)
    with pytest.raises(TemplateError, match="ran for longer"):
        chat.render(user("x"))


def test_a_reason_cannot_move_the_cursor():
    refused(r"{{ raise_exception('\x1b]0;owned\x07') }}", "^[ -~\ufffd]*owned\ufffd$")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ self.__init__ }}",
        "{{ range.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ loop.__class__ }}{{ messages.__class__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ 'a'.encode() }}",
        "{{ 'a'.format_map({}) }}",
        "{{ (5).to_bytes(9, 'big') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ namespace(a=1) }}",
        "{{ '%c' % 55296 }}{{ 1 }}",
        "{{ '{:c}'.format(55296) }}",
        "{{ [['a']] | sum(start=[]) }}",
    ],
)
def test_what_a_template_may_not_have_is_refused(source):
    refused(source, "was stopped|undefined")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", r"is damaged: .* \(line 1\)"),
        ("{{ a.b.c }}", "'a' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{% include 'x' %}", "no loader"),
        ("{{ 'a' | center(3) }}", "No filter named 'center'"),
        ("{{ 1" + "+1" * 5000 + " }}", "nested too deeply"),
        ("{{ " + "(" * 3000 + ")" * 3000 + " }}", "nested too deeply"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
    ],
)
def test_damage_is_an_error_of_one_sentence(source, words):
    refused(source, words)


def test_a_template_that_is_too_long_is_refused():
    with pytest.raises(TemplateError, match="the limit is"):
        template(" " * 100_000)


def test_deep_messages_are_refused():
    deep: object = "x"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(TemplateError, match="nested too deeply"):
        template("").render(user(deep))


def test_ordinary_work_is_within_the_limits():
    messages = [{"role": "user", "content": "x" * 1000, "n": [1, {"a": None}]}] * 300
    source = (
        "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = n.x + m.content[:9] %}"
        "{{ m.content | trim }}{{ m | tojson }}{{ m.items() | list | length }}{% endfor %}{{ n.x }}"
    )
    assert len(template(source).render(messages).text) > 600_000
