"""A conversation to a prompt: the chat template of a model file.

In: messages. Out: a `Rendered`, which knows of every stretch of text whether the template wrote it
as a special token; `Tokenizer.encode_chat` turns it into ids. Called by `LLM.chat` for every turn.

How text of a user stays text: before rendering, every special token that stands in the template's
own literals is replaced by one lone surrogate, a code point that no valid text has and that is
taken out of all that the caller passes in. What the template then does to messages (strip, split,
replace, join) cannot make a surrogate, so each one found in the output was written by the template.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cyclewise.errors import TemplateError

if TYPE_CHECKING:
    from jinja2 import Template

    from cyclewise.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Used for a model whose file has no template but whose vocabulary has ChatML's tokens."""

ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython")
"""Roles that a template may make a special token of, as in `'<|' + message.role + '|>'`."""

_MAX_SOURCE = 1 << 16
_FIRST_MARK = 0xD800
_NUM_MARKS = 0x800
_MARKS = re.compile("([\ud800-\udfff])")


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a rendered chat."""

    text: str
    is_special: bool  # the template wrote it as a special token


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered chat: its parts in order."""

    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The prompt as text, for people: what is special in it cannot be told from this."""
        return "".join(part.text for part in self.parts)


class ChatTemplate:
    """A jinja2 template of the kind that models carry; renders in any number of threads.

    `special_tokens` are the texts that may become control tokens (`Tokenizer.control_tokens`).
    `with_tools` is the source of another template, for chats with tools.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str,
        eos_token: str,
        special_tokens: Iterable[str],
        with_tools: str | None = None,
    ) -> None:
        if len(source) > _MAX_SOURCE:
            raise TemplateError(
                f"the chat template is {len(source)} characters long; the limit is {_MAX_SOURCE}"
            )
        self._source = source
        special_tokens = [*special_tokens, bos_token, eos_token]
        self._marks = _Marks(special_tokens)
        self._with_tools: ChatTemplate | None = None
        if with_tools is not None:
            self._with_tools = ChatTemplate(
                with_tools, bos_token=bos_token, eos_token=eos_token, special_tokens=special_tokens
            )
        self._variables = {
            "bos_token": self._marks.mark(bos_token),
            "eos_token": self._marks.mark(eos_token),
        }
        self._lock = threading.Lock()
        self._template: Template | None = None

    @classmethod
    def for_model(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate:
        """The template in a model file's metadata, or ChatML where the vocabulary speaks it.

        Chats with tools take the one of the name `tool_use`, where there is one. Raises
        `TemplateError` for a model that has no template.
        """
        source = metadata.get("tokenizer.chat_template")
        if not isinstance(source, str):
            if "<|im_start|>" not in tokenizer.control_tokens:
                raise TemplateError(
                    "the model file has no chat template, so it cannot chat; "
                    "complete a prompt with it instead"
                )
            source = CHATML
        with_tools = metadata.get("tokenizer.chat_template.tool_use")
        return cls(
            source,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            special_tokens=tokenizer.control_tokens,
            with_tools=with_tools if isinstance(with_tools, str) else None,
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> Rendered:
        """The prompt for `messages`; `variables` (`tools`, ...) are passed to the template.

        Raises `TemplateError` where the template refuses the conversation, is damaged, reaches for
        what it may not have, or goes beyond its limits of time and size (`text/sandbox.py`).
        """
        if self._with_tools and variables.get("tools") is not None:
            return self._with_tools.render(
                messages, add_generation_prompt=add_generation_prompt, **variables
            )
        given = {
            "tools": None,
            "documents": None,
            **variables,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        clean = {name: _without_marks(value) for name, value in given.items()}

        def run() -> str:
            template = self._compiled()
            template.environment.begin()  # type: ignore[attr-defined]
            return template.render({**clean, **self._variables})

        return self._marks.parts(self._guarded(run))

    def _compiled(self) -> Template:
        with self._lock:
            if self._template is None:
                from cyclewise.text.sandbox import Sandbox
                from cyclewise.text.template_marks import mark_literals

                sandbox = Sandbox(self._marks.of_role)
                sandbox.begin()
                parsed = sandbox.parse(self._source)
                tree = mark_literals(parsed, self._marks, ROLES, sandbox.budget.tick)
                code = sandbox.compile(tree)
                self._template = sandbox.template_class.from_code(
                    sandbox, code, sandbox.make_globals(None)
                )
            return self._template

    def _guarded(self, run: Callable[[], str]) -> str:
        """`run()`, with whatever a template may raise as a `TemplateError` of one sentence."""
        from jinja2.exceptions import SecurityError, TemplateSyntaxError

        from cyclewise.text.sandbox import RefusedError

        try:
            return run()
        except TemplateError:
            raise
        except RefusedError as error:
            reason = f"refuses this conversation: {error}"
        except TemplateSyntaxError as error:
            reason = f"is damaged: {error.message} (line {error.lineno})"
        except SecurityError as error:
            reason = f"was stopped: {error}"
        except RecursionError:
            reason = "was stopped: it is nested too deeply"
        except Exception as error:  # a template can raise anything that Python can
            reason = f"failed: {type(error).__name__}: {error}"
        reason = self._marks.parts(" ".join(reason.split())[:600]).text
        reason = "".join(c if c.isprintable() else "\ufffd" for c in reason)
        raise TemplateError(f"the chat template {reason}")


def _without_marks(value: Any, depth: int = 0) -> Any:
    """A copy of JSON-like `value` in which no text has a lone surrogate."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        if _MARKS.search(value):
            return str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return str(value)
    if depth > 30:
        raise TemplateError("the messages are nested too deeply for a chat template")
    if isinstance(value, Mapping):
        return {
            _without_marks(key, depth + 1): _without_marks(item, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_without_marks(item, depth + 1) for item in value]
    raise TemplateError(
        f"a chat template takes texts, numbers, lists and dictionaries, not a "
        f"{type(value).__name__}"
    )


class _Marks:
    """Special tokens and the lone surrogates that stand for those that a template writes."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        self.tokens = sorted(
            {t for t in special_tokens if t}, key=lambda token: (-len(token), token)
        )
        self._token_set = frozenset(self.tokens)
        self._pattern = re.compile("|".join(map(re.escape, self.tokens)) or r"(?!)")
        self._lock = threading.Lock()
        self._mark_of: dict[str, str] = {}
        self._written: list[str] = []

    def of_role(self, opening: str, role: str, closing: str) -> str:
        """A role between a template's literals: a mark where the three make a special token."""
        text = opening + role + closing
        return self._of(text) if role in ROLES and text in self._token_set else text

    def _of(self, token: str) -> str:
        with self._lock:  # a role's mark is made while a template renders
            mark = self._mark_of.get(token)
            if mark is None:
                if len(self._written) == _NUM_MARKS:
                    raise TemplateError(f"the chat template has over {_NUM_MARKS} special tokens")
                mark = self._mark_of[token] = chr(_FIRST_MARK + len(self._written))
                self._written.append(token)
            return mark

    def mark(self, literal: str) -> str:
        """A template's literal with its special tokens marked, the longest at each place."""
        return self._pattern.sub(lambda match: self._of(match.group()), _without_marks(literal))

    def parts(self, text: str) -> Rendered:
        """A template's output with marks as special tokens again."""
        pieces = [piece for piece in _MARKS.split(text) if piece]
        return Rendered(tuple(map(self._part, pieces)))

    def _part(self, piece: str) -> Part:
        index = ord(piece[0]) - _FIRST_MARK
        if not 0 <= index < _NUM_MARKS:
            return Part(piece, is_special=False)
        if index >= len(self._written):
            return Part("\ufffd", is_special=False)
        return Part(self._written[index], is_special=True)
