"""What an answer must spell: a JSON schema, a regular expression or a grammar, token by token.

In: `SamplingParams` and a tokenizer. Out: a `Structure` for each generation, which says before
each token which ones may come next. The grammars are followed by `llguidance` (the extra
`structured`), which is imported when the first structure is asked for; `json_schema.py` prepares
schemas for it. The end of the text is allowed where the structure is complete, and nowhere else.
"""

from __future__ import annotations

import json
import re
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cyclewise.errors import (
    CyclewiseError,
    InvalidParameterError,
    OverloadedError,
    UnsupportedSchemaError,
)
from cyclewise.text.json_schema import NOTHING, prepare, without
from cyclewise.text.memo import Memo, key_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from cyclewise.engine.request import SamplingParams
    from cyclewise.text.tokenizer import Tokenizer
    from cyclewise.text.trial import Trials

CALL_BEGINS, CALL_ENDS = "<tool_call>", "</tool_call>"
"""Around the call of a tool: `{"name": ..., "arguments": ...}`, on a line of its own."""

_LONGEST = 1 << 20  # characters of a schema, expression or grammar
_MOST_BYTES = 1 << 30
"""Of all that structures which are being followed were compiled to."""
_MOST_STATES = 50_000
"""Of the lexer that follows a structure, about 2 KB each: a fifth of what the library allows."""
_SECONDS, _SECONDS_A_TOKEN = 1.0, 0.01
"""Of a processor, that following a structure may take: at first, and more for each token."""
_KEPT_BYTES, _LEAST_BYTES = 256 << 20, 4 << 20
"""Of all that is kept, and what each is counted as at least."""
_FORMATS = {"regex": "regex", "grammar": "lark"}  # as the library calls them
_ESCAPES = 'nrbtf\\"'  # what may follow a backslash
_CONTROLS = re.compile(r"\\u00[01][0-9a-f]|\x7f")  # in JSON text: characters that need a \u
_HOPELESS = re.compile(r"Unsatisfiable schema(?s:.*)#/\$defs/(\w+)")
_SIGNS = {
    "oneOf": "oneOf",
    "patternProperty": "patternProperties",
    "regex parse": "pattern",
    "multipleOf": "multipleOf",
    "min/maxProperties": "maxProperties",
    "circular references": "$ref",
}
"""What the library's messages about keywords have in them."""
_WHITE_SPACE = r"( |\r?\n[ \t]{0,40})"
"""Where JSON may have white space: a space, or a new line and its indent. Where there may be more,
small models go on with it."""


def call_head(name: str) -> str:
    """How the call of a function is written up to its arguments."""
    return f'{{"name": "{name}", "arguments": '


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _Compiled:
    """What a text was compiled to."""

    matcher: Any
    num_bytes: int = 0  # where that was tried out


class Structures:
    """Makes structures for one model's vocabulary; keeps what texts were compiled to. Any thread
    may ask.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, trials: Trials | None = None) -> None:
        """Read the vocabulary, which takes up to a second for a large one.

        vocab_size  the number of logits of a token, which may be more than there are tokens
        trials      where texts are tried out first, if they are nobody's own

        Raises CyclewiseError if `llguidance` is missing, or the model has no token that ends a
        text.
        """
        if not tokenizer.stop_ids:
            raise CyclewiseError(
                "this model has no token that ends a text, so it cannot end a structure"
            )
        self._library = _library()
        self._vocab_size = vocab_size
        # A tokenizer may have tokens behind those that the model has logits of.
        self._num_tokens = max(vocab_size, tokenizer.vocab_size)
        self._tokens = self._library.LLTokenizer(
            _Tokens(tokenizer, self._num_tokens),
            eos_token=sorted(tokenizer.stop_ids),
            slices=self._library.LLTokenizer.json_slices(),
        )
        self.known: Memo[_Compiled] = Memo(_KEPT_BYTES)
        self._trials = trials
        self._lock = threading.Lock()  # of what follows
        self._num_bytes = 0  # of all that is alive and was tried out
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="cyclewise-structure")

    def make(
        self, params: SamplingParams, tool_calls: str | None = None, *, salt: bytes = b""
    ) -> Structure | None:
        """The structure that the parameters ask for, at its beginning; None if they ask for none.

        tool_calls  in its place: the calls that the answer may or must be made of, as JSON
        salt        who has the same one may learn that this was asked before

        Raises InvalidParameterError if it is malformed, needs what is not supported, allows nothing
        or is too large; OverloadedError if those that are being followed leave no memory for it.
        """
        asked = params.structure if tool_calls is None else ("tool_calls", tool_calls)
        if asked is None:
            return None
        key = key_of(salt, *asked)
        compiled = self.known.find(key)
        if compiled is None:
            compiled = self._compile(*asked)
            self.known.keep(key, compiled, max(_LEAST_BYTES, compiled.num_bytes))
        greedy = params.temperature == 0
        sizes = self._vocab_size, self._num_tokens
        return Structure(compiled, sizes, self._worker, ahead=not greedy)

    def close(self) -> None:
        """End the thread that works out what is allowed."""
        self._worker.shutdown()
        if self._trials is not None:
            self._trials.close()

    def _compile(self, kind: str, text: str) -> _Compiled:
        if self._trials is None or len(text) > _LONGEST:
            return _Compiled(self.compile(kind, text))
        size = self._trials.run(kind, text)
        if self._num_bytes + size > _MOST_BYTES:
            self.known.clear()  # before anybody is refused for what nobody follows
        with self._lock:
            if self._num_bytes + size > _MOST_BYTES:
                raise OverloadedError("structures take up all the memory that they may have", 1.0)
            self._num_bytes += size
        try:
            compiled = _Compiled(self.compile(kind, text), size)
        except BaseException:
            self._give_back(size)
            raise
        weakref.finalize(compiled, self._give_back, size)
        return compiled

    def _give_back(self, size: int) -> None:
        with self._lock:
            self._num_bytes -= size

    def compile(self, kind: str, text: str) -> Any:
        if len(text) > _LONGEST:
            raise InvalidParameterError(
                f"{kind} has {len(text)} characters, and {_LONGEST} are the most"
            )
        try:
            if kind == "json_schema":
                _, matcher = self._compile_schema(text)
            elif kind == "tool_calls":
                matcher = self._compile_tool_calls(json.loads(text))
            else:
                of_text = getattr(self._library.LLMatcher, f"grammar_from_{_FORMATS[kind]}")
                matcher = self._matcher(of_text(text))
        except ValueError as error:  # half a character, a number of a thousand digits
            reason = " ".join(str(error).split())
            raise InvalidParameterError(f"{kind} cannot be followed: {reason}") from None
        if matcher.is_error():
            raise _refusal(kind, matcher)
        trial = matcher.deep_copy()
        begins = any(trial.compute_bitmask())
        if "NoExtension" in str(trial.get_error()) or not (begins or trial.is_error()):
            raise InvalidParameterError(f"{kind} allows nothing: no text satisfies it")
        if trial.is_error():
            raise _refusal(kind, trial)
        return matcher

    def _compile_tool_calls(self, wanted: dict[str, Any]) -> Any:
        """Text, or calls of functions whose arguments obey their schemas.

        functions  the schema of each one's arguments, by its name
        required   there is no text
        many       there may be more than one call
        content    the schema of the text, or None
        """
        grammars = []

        def part(name: str, schema: Any) -> str:
            grammar, _ = self._compile_schema(json.dumps(schema))
            grammars.append({**json.loads(grammar)["grammars"][0], "name": name})
            return f"@{name}"

        names = list(wanted["functions"])
        arguments = [
            part(f"arguments_{i}", schema) for i, schema in enumerate(wanted["functions"].values())
        ]
        calls = [
            f"{json.dumps(call_head(name))} {each}"
            for name, each in zip(names, arguments, strict=True)
        ]
        rest = f'"\\n" ({" | ".join(calls)}) "}}\\n{CALL_ENDS}"'
        more = f'("\\n{CALL_BEGINS}" rest)*' if wanted["many"] else ""
        ways = [f'"{CALL_BEGINS}" rest {more}']
        if wanted["content"] is not None and not wanted["required"]:
            ways.append(part("content", wanted["content"]))
        elif not wanted["required"]:
            bare = [f'head_{i} {each} "}}"' for i, each in enumerate(arguments)]
            ways = [*bare, f"before rest {more}", "TEXT"]
        rules = [f"start: {' | '.join(ways)}", f"rest: {rest}"]
        if "TEXT" in ways:
            rules += [f"head_{i}[lazy]: {json.dumps(call_head(n))}" for i, n in enumerate(names)]
            rules += [f"before[lazy]: /(.|\\n)*{CALL_BEGINS}/", r"TEXT: /(.|\n)*/"]
        whole = {"lark_grammar": "\n".join(rules)}
        return self._matcher(json.dumps({"grammars": [whole, *grammars]}))

    def _compile_schema(self, text: str) -> tuple[str, Any]:
        """The grammar of a schema, and what follows it."""
        expand_one_of = False
        schema = prepare(text)
        while True:
            grammar = self._of_schema(schema)
            matcher = self._matcher(grammar)
            if not matcher.is_error():
                return grammar, matcher
            error = str(matcher.get_error())
            hopeless = _HOPELESS.search(error)
            if hopeless and hopeless[1] in schema["$defs"]:
                # of a reference to what nothing satisfies, the library makes nothing of the whole
                schema = without(schema, f"#/$defs/{hopeless[1]}")
                schema["$defs"] = {k: v for k, v in schema["$defs"].items() if k != hopeless[1]}
            elif error.startswith("Unsatisfiable"):
                raise InvalidParameterError(NOTHING)
            elif "oneOf" in error and not expand_one_of:
                expand_one_of = True
                schema = prepare(text, expand_one_of=True)
            else:
                keyword = _blamed(error)
                if keyword is not None:
                    raise UnsupportedSchemaError(keyword, _sentence(matcher))
                raise _refusal("json_schema", matcher)

    def _of_schema(self, schema: dict[str, Any]) -> str:
        text = json.dumps(schema)
        escapes = _ESCAPES
        if _CONTROLS.search(text):
            # with \u a name that is not listed could be one that is, in disguise
            if '"properties"' in text or '"patternProperties"' in text:
                raise UnsupportedSchemaError("properties", "beside strings with control characters")
            escapes += "u"
        options = {"whitespace_pattern": _WHITE_SPACE, "json_allowed_escapes": escapes}
        grammar: str = self._library.LLMatcher.grammar_from_json_schema(text, overrides=options)
        return grammar

    def _matcher(self, grammar: str) -> Any:
        limits = self._library.LLParserLimits(verbose_errors=False, max_lexer_states=_MOST_STATES)
        return self._library.LLMatcher(self._tokens, grammar, log_level=0, limits=limits)


class Structure:
    """One text in the making.

    Where tokens are drawn, what may come next is found out on a thread of its own, for which the
    library lets go of Python's lock: while the machine runs a step, that is. A greedy choice needs
    it only where the likeliest token is not allowed, which is seldom, and then waits for it.
    """

    def __init__(
        self,
        compiled: _Compiled,
        sizes: tuple[int, int],
        worker: ThreadPoolExecutor,
        *,
        ahead: bool,
    ) -> None:
        """`sizes`: how many tokens have logits, and how many there are."""
        self._compiled = compiled  # it is alive for as long as this
        self._matcher = compiled.matcher.deep_copy()
        self._vocab_size, num_tokens = sizes
        self._worker = worker
        self._ahead = ahead
        self._seconds = _SECONDS
        self._bits = np.zeros(-(-num_tokens // 32), dtype=np.uint32)
        self._next: Future[npt.NDArray[np.bool_]] | None = None
        self._begin()

    def allowed(self) -> npt.NDArray[np.bool_]:
        """(vocab_size,): which tokens may come next.

        Raises CyclewiseError if the structure has grown too complex to be followed.
        """
        return self._find() if self._next is None else self._next.result()

    def allows(self, token_id: int) -> bool:
        """Whether a token may come next, however else its text could be cut into tokens."""
        if self._next is not None:
            return bool(self._next.result()[token_id])
        with self._measured():
            allowed: int = self._matcher.validate_tokens([token_id])
        return allowed == 1

    def advance(self, token_id: int) -> bool:
        """Take note of the token chosen; return whether the text is complete and ends here."""
        if self._next is not None:
            self._next.result()  # nobody else may be at the matcher
        self._seconds = min(_SECONDS, self._seconds + _SECONDS_A_TOKEN)
        with self._measured():
            self._matcher.consume_token(token_id)
        if self._matcher.is_stopped():
            return True
        self._begin()
        return False

    def _begin(self) -> None:
        if self._ahead:
            self._next = self._worker.submit(self._find)

    def _find(self) -> npt.NDArray[np.bool_]:
        bits = self._bits
        with self._measured():
            self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        # bits of little-endian words are in the order of the bytes
        packed = bits.astype("<u4", copy=False).view(np.uint8)
        found = np.unpackbits(packed, count=self._vocab_size, bitorder="little")
        return found.view(np.bool_)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Around what the library does for a token."""
        begin = time.thread_time()
        yield
        self._seconds -= time.thread_time() - begin
        if self._matcher.is_error():
            raise _too_complex(_sentence(self._matcher))
        if self._seconds < 0:
            raise _too_complex("what may come next takes too long to be worked out")


class _Tokens:
    """The vocabulary, as the library wants to read it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        named = tokenizer.all_bytes()
        self.tokens = [*named, *([b""] * (vocab_size - len(named)))]  # what is empty never comes
        self.eos_token_id = min(tokenizer.stop_ids)
        self.special_token_ids: list[int] = []
        self._ids: dict[bytes, int] = {}
        self._longest = 0
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens that print a text and nothing else; the tokenizer's own wherever they do.

        A tokenizer may put a space before a text, but not behind a new line.
        """
        wanted = text.encode() if isinstance(text, str) else text
        decoded = wanted.decode(errors="replace")
        for before in ("", "\n"):
            token_ids = self._tokenizer.encode(before + decoded, add_special=False)
            printed = b""
            place = 0
            while before and place < len(token_ids) and printed.lstrip(b" ") != b"\n":
                printed += self.tokens[token_ids[place]]
                place += 1
            if b"".join(self.tokens[i] for i in token_ids[place:]) == wanted:
                return token_ids[place:]
        return self._spell(wanted)

    def _spell(self, text: bytes) -> list[int]:
        """The longest token at each place."""
        if not self._ids:
            self._ids = {piece: i for i, piece in enumerate(self.tokens) if piece}
            self._longest = max(map(len, self._ids))
        token_ids: list[int] = []
        place = 0
        while place < len(text):
            ends = range(min(len(text), place + self._longest), place, -1)
            found = next((end for end in ends if text[place:end] in self._ids), None)
            if found is None:  # a byte without a token
                break
            token_ids.append(self._ids[text[place:found]])
            place = found
        return token_ids


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise CyclewiseError(
            "json_schema, regex and grammar need the package llguidance, which is not installed: "
            "pip install 'cyclewise[structured]'"
        ) from None
    return llguidance


def _too_complex(reason: str) -> CyclewiseError:
    return CyclewiseError(
        f"the structure cannot be followed any further: {reason}; make it simpler"
    )


def _blamed(error: str) -> str | None:
    """The keyword that the library's message about a schema is about."""
    return next((keyword for sign, keyword in _SIGNS.items() if sign in error), None)


def _refusal(kind: str, matcher: Any) -> InvalidParameterError:
    return InvalidParameterError(f"{kind} cannot be followed: {_sentence(matcher)}")


def _sentence(matcher: Any) -> str:
    """The first line of what the library says, which goes on with its own state, and the error
    that a regular expression's parser puts below.
    """
    error = str(matcher.get_error()).strip()
    if "NoExtension" in error:
        return "nothing can follow what was written"
    lines = error.splitlines() or ["unknown error"]
    below = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return " ".join([lines[0].rstrip("."), *below])
