"""Where chat templates run: jinja2's sandbox, with limits on time and size.

A template comes with a model file, so it is as hostile as the file. jinja2's sandbox keeps it from
attributes; this room adds what the sandbox lacks. Every loop turn, call, filter and operator passes
a `Budget`, and nothing that one C call could blow up (a product, a power, a format width, a join, a
nested list) is begun before its size is known. `text/chat.py` compiles and renders with it.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, ValuesView
from collections.abc import ItemsView as DictItems
from functools import wraps
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_SECONDS = 1.0
"""Time that one rendering may take."""

_MAX_BYTES = 1 << 21  # of one string, or of all strings in one list
_MAX_TOTAL_BYTES = 1 << 27  # of all strings that one rendering makes
_MAX_ITEMS = 100_000  # of one list, with all that is nested in it
_MAX_NESTING = 32
_MAX_WIDTH = 1000  # of a format, an indentation or a justified string
_MAX_BITS = 1 << 14  # of an integer

_STRING_METHODS_TEXT = (
    "capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii "
    "isdecimal isdigit islower isnumeric isspace istitle isupper join ljust lower lstrip "
    "partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip "
    "split splitlines startswith strip swapcase title upper zfill"
)
_STRING_METHODS = frozenset(_STRING_METHODS_TEXT.split())

_FILTERS_TEXT = (
    "abs attr capitalize count d default dictsort e escape first float forceescape groupby int "
    "items last length list lower map max min reject rejectattr reverse safe select selectattr "
    "sort title trim unique upper wordcount"
)
_FILTERS = _FILTERS_TEXT.split()

_WIDE = re.compile(r"[0-9]{4,}|\*")
_FORMAT_SPECS = re.compile(r"%[^a-zA-Z%]*[a-zA-Z%]")
_FIELD_SPECS = re.compile(r":([^{}]*)([{}])")


class TooMuchError(SecurityError):
    """A template went beyond its time or size."""


class Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS
        self._bytes_left = _MAX_TOTAL_BYTES

    def tick(self) -> None:
        """Raises once the time is up."""
        if time.monotonic() > self._deadline:
            raise TooMuchError(f"it ran for longer than {MAX_SECONDS} seconds")

    def spend(self, num_bytes: int) -> None:
        """Raises if `num_bytes` are too many for one value, or for what is left."""
        self._bytes_left -= num_bytes
        if num_bytes > _MAX_BYTES or self._bytes_left < 0:
            raise TooMuchError("it makes too much text")

    def measure(self, value: Any) -> int:
        """Bytes of the text in `value`, however deep; raises where that is too much.

        Once this has returned, `str(value)`, `value == other` and the like are known to be short.
        """
        num_bytes = num_items = 0
        level: list[Any] = [value]
        for _ in range(_MAX_NESTING):
            below: list[Any] = []
            for item in level:
                if isinstance(item, str):
                    num_bytes += _size(item)
                elif isinstance(item, (list, tuple, set, frozenset, KeysView, ValuesView)):
                    below += item if len(item) <= _MAX_ITEMS else _refuse_items()
                elif isinstance(item, Mapping | DictItems):
                    if len(item) > _MAX_ITEMS:
                        _refuse_items()
                    for pair in item.items() if isinstance(item, Mapping) else item:
                        below += pair
                elif isinstance(item, Namespace) and item is not value:
                    raise TooMuchError("it puts a namespace into a list")
                elif isinstance(item, int) and item.bit_length() > _MAX_BITS:
                    raise TooMuchError("it makes too large a number")
                num_items += 1
                if num_bytes > _MAX_BYTES:
                    raise TooMuchError("it makes too much text")
                if num_items + len(below) > _MAX_ITEMS:
                    _refuse_items()
            self.tick()
            if not below:
                return num_bytes
            level = below
        raise TooMuchError("it makes lists that are nested too deeply")


def _size(text: str) -> int:
    return len(text) if text.isascii() else 4 * len(text)


def _refuse_items() -> NoReturn:
    raise TooMuchError("it makes too long a list")


class _GenerationTag(Extension):
    """`{% generation %}` marks a model's own words for training; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template; renderings in several threads do not meet."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, special_role: Callable[[str, str, str], str]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing runs while a template is compiled
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
            finalize=self._printable,
        )
        self._local = threading.local()
        self._special_role = special_role
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        filters: dict[str, Callable[..., Any]] = {name: self.filters[name] for name in _FILTERS}
        filters |= {"join": self._join, "indent": self._indent, "sum": self._sum}
        filters |= {"tojson": self._to_json, "format": self._percent}
        filters |= {"replace": self._replace, "round": self._round, "string": self._text}
        self.filters = {name: self._guarded(function) for name, function in filters.items()}

    @property
    def budget(self) -> Budget:
        """The budget of the rendering that runs in this thread."""
        budget: Budget = self._local.budget
        return budget

    def begin(self) -> None:
        """Starts the clock for a rendering in this thread."""
        self._local.budget = Budget()

    # Called by compiled templates through nodes that chat.py writes into them.

    def guarded_loop(self, items: Iterable[Any]) -> Iterable[Any]:
        """`items`, one loop turn at a time."""
        if isinstance(items, Undefined):
            return items  # prints jinja2's own message, or loops over nothing

        return self._turns(items)

    def _turns(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.budget.tick()
            yield item

    def bounded(self, value: Any) -> Any:
        """`value`, a list or the like that a template has just made, if it is not too large."""
        self.budget.measure(value)
        return value

    def copied(self, value: Any) -> Any:
        """`bounded`, of what may be a text: one that was copied counts as made."""
        self._spend_sequence(value, 1)
        return self.bounded(value)

    def concat(self, parts: Iterable[Any]) -> str:
        """The texts of `parts`, one after the other: all that a template prints goes through it."""
        texts = []
        size = 0
        for part in parts:
            text = self._text(part)
            size += _size(text)
            if size > _MAX_BYTES:
                self.budget.spend(size)
            texts.append(text)
        self.budget.tick()
        self.budget.spend(size)
        return "".join(texts)

    def concatenated(self, *parts: Any) -> str:
        """The operator `~`."""
        return self.concat(parts)

    def special_role(self, opening: str, role: Any, closing: str) -> str:
        """A role between two literals that may make a special token of it."""
        return self._special_role(opening, self._text(role), closing)

    # What jinja2 asks of a sandbox.

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STRING_METHODS
        if isinstance(obj, (int, float, bytes)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        kind = type(obj).__name__
        raise SecurityError(f"it reaches for {attribute!r} of a {kind}, which it may not have")

    def getattr(self, obj: Any, attribute: str) -> Any:
        if attribute.startswith("__"):
            self.unsafe_undefined(obj, attribute)
        return super().getattr(obj, attribute)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.tick()
        if operator == "%" and isinstance(left, str):
            arguments = right if isinstance(right, (tuple, Mapping)) else (right,)
            self._check_percent(left, arguments)
        elif operator == "*":
            self._check_product(left, right)
        elif operator == "**":
            self._check_power(left, right)
        elif operator == "+":
            for side in (left, right):
                self._spend_sequence(side, 1)
        return self.bounded(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None or value.__name__ != "format":
            return None  # format_map is then refused as an attribute
        formatted = wrapped

        def format(*args: Any, **kwargs: Any) -> str:
            self._check_format(value.__self__, [*args, *kwargs.values()])
            return formatted(*args, **kwargs)

        return format

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self = __self
        self.budget.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            if __obj.__name__ == "join":
                args = tuple(list(self._turns(items)) for items in args)
            self._check_method(owner, __obj.__name__, (*args, *kwargs.values()))
        if isinstance(__obj, LoopContext):  # a recursive loop, over what is given here
            args = tuple(map(self.guarded_loop, args))
            kwargs = {name: self.guarded_loop(items) for name, items in kwargs.items()}
        if owner is self:  # bounded, guarded_loop and the like check for themselves
            return __obj(*args)
        return self.bounded(super().call(__context, __obj, *args, **kwargs))

    # Sizes, before anything is made.

    def _spend_sequence(self, value: Any, times: int) -> None:
        if isinstance(value, str):
            self.budget.spend(_size(value) * times)
        elif isinstance(value, (list, tuple)) and len(value) * times > _MAX_ITEMS:
            _refuse_items()

    def _check_product(self, left: Any, right: Any) -> None:
        for sequence, times in ((left, right), (right, left)):
            if isinstance(times, int) and not isinstance(sequence, int):
                self._spend_sequence(sequence, max(times, 0))
        if isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() + right.bit_length())

    def _check_power(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() * abs(right))

    def _check_bits(self, bits: int) -> None:
        if bits > _MAX_BITS:
            raise TooMuchError("it makes too large a number")

    def _check_percent(self, text: str, arguments: Any) -> None:
        specs = _FORMAT_SPECS.findall(text)
        for spec in specs:
            # %c would make a character out of a number, and with it a mark that is the template's.
            if _WIDE.search(spec) or spec.endswith("c"):
                raise TooMuchError(f"it formats with {spec[:20]!r}")
        size = self.budget.measure(arguments) + _MAX_WIDTH
        self.budget.spend(_size(text) + len(specs) * size)

    def _check_format(self, text: str, arguments: list[Any]) -> None:
        for spec, end in _FIELD_SPECS.findall(text):
            if end == "{" or _WIDE.search(spec) or spec.endswith("c"):
                raise TooMuchError(f"it formats with {spec[:20]!r}")
        size = self.budget.measure(arguments) + _MAX_WIDTH
        self.budget.spend(_size(text) + text.count("{") * size)

    def _check_method(self, owner: str, name: str, args: tuple[Any, ...]) -> None:
        width = args[0] if args else None
        if name in ("center", "ljust", "rjust", "zfill") and not _is_width(width):
            raise TooMuchError(f"it calls {name} with a width that is too large")
        if name == "expandtabs" and width is not None and not _is_width(width):
            raise TooMuchError("it calls expandtabs with a width that is too large")
        if name == "expandtabs":
            self.budget.spend(_size(owner) + owner.count("\t") * _MAX_WIDTH)
        elif name == "replace":
            self._check_replace(owner, args)
        elif name == "join" and args:
            self._check_join(owner, args[0])
        else:
            self.budget.spend(_size(owner))

    def _check_replace(self, owner: str, args: tuple[Any, ...]) -> None:
        old, new, *_ = [*args, "", ""]
        if isinstance(old, str) and isinstance(new, str):
            self.budget.spend(_size(owner) + owner.count(old) * _size(new))

    def _check_join(self, separator: str, items: list[Any]) -> None:
        self.budget.spend(len(items) * _size(separator) + self.budget.measure(items))

    # Filters of our own, and texts.

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # keeps jinja2's marks of what a filter wants passed
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.budget.tick()
            return self.copied(function(*args, **kwargs))

        return guarded

    def _printable(self, value: Any) -> Any:
        """jinja2's `finalize`: what a template prints becomes text here."""
        return self._text(value)

    def _text(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        if value is None or isinstance(value, (bool, int, float, Undefined)):
            return str(value)
        if isinstance(value, (list, tuple, dict)):
            self.budget.spend(4 * self.budget.measure(value))
            return str(value)
        raise SecurityError(f"it prints a {type(value).__name__}, which is no text")

    def _join(self, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        items = list(self.guarded_loop(value))
        if attribute is not None:
            items = [self.getitem(item, attribute) for item in items]
        texts = [self._text(item) for item in items]
        separator = self._text(d)
        self._check_join(separator, texts)
        return str(separator.join(texts))

    def _replace(self, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = self._text(s), self._text(old), self._text(new)
        self._check_replace(text, (old, new))
        return text.replace(old, new, -1 if count is None else count)

    def _indent(self, s: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
        text = self._text(s)
        if not isinstance(width, str):
            if not _is_width(width):
                raise TooMuchError("it indents by too much")
            width = " " * width
        lines = (text + "\n").splitlines()
        self.budget.spend(_size(text) + len(lines) * _size(width))
        rest = [width + line if line or blank else line for line in lines[1:]]
        return "\n".join([width + lines[0] if first else lines[0], *rest])

    def _round(self, value: float, precision: int = 0, method: str = "common") -> float:
        if abs(precision) > 100:
            raise TooMuchError("it rounds to too many digits")
        if method == "common":
            return float(round(value, precision))
        if method not in ("ceil", "floor"):
            raise SecurityError(f"it rounds by the unknown method {method[:20]!r}")
        scaled = value * 10**precision
        whole = math.ceil(scaled) if method == "ceil" else math.floor(scaled)
        return float(whole / 10**precision)

    def _sum(self, iterable: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
        total = start
        for item in self.guarded_loop(iterable):
            value = item if attribute is None else self.getitem(item, attribute)
            if not isinstance(value, (int, float)) or not isinstance(total, (int, float)):
                raise SecurityError("it sums what is no number")
            total += value
        return total

    def _percent(self, value: Any, *args: Any, **kwargs: Any) -> str:
        text = self._text(value)
        arguments: Any = kwargs or args
        self._check_percent(text, arguments)
        return str(text % arguments)

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as Hugging Face's templates expect it: as it is, without HTML's escapes."""
        width = len(indent) if isinstance(indent, str) else indent or 0
        if not 0 <= width <= 8:
            raise TooMuchError("it indents JSON by too much")
        self.budget.measure(value)
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and value <= _MAX_WIDTH


class RefusedError(Exception):
    """A template called `raise_exception`: it cannot render such a conversation."""


def _raise_exception(message: object) -> NoReturn:
    raise RefusedError(message[:500] if isinstance(message, str) else "no reason given")


def _strftime_now(format: str) -> str:
    from datetime import datetime

    if len(format) > _MAX_WIDTH:
        raise TooMuchError("it formats the time at too great a length")
    return datetime.now().strftime(format)
