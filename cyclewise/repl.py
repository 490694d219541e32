"""The conversation of `cyclewise chat`: a line comes in, an answer goes out, turn by turn.

The KV cache of the turns before lies in the `LLM`; this module keeps the messages alone.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from difflib import get_close_matches

from cyclewise import terminal
from cyclewise.engine.request import SamplingParams
from cyclewise.errors import ContextLengthError
from cyclewise.llm import LLM
from cyclewise.paths import cache_dir

_HISTORY_LINES = 1000
_COMMANDS = {
    "/help": "show this",
    "/reset": "forget the conversation",
    "/exit": "leave (so does Ctrl-D)",
}


def converse(llm: LLM, params: SamplingParams, system: str | None) -> None:
    """Talk until the user leaves."""
    interactive = sys.stdin.isatty()
    beginning = [{"role": "system", "content": system}] if system is not None else []
    messages = list(beginning)
    if interactive:
        terminal.note("Ctrl-C stops an answer, Ctrl-D leaves, /help shows the commands.")
    with _history() if interactive else contextlib.nullcontext():
        for line in _lines(interactive):
            if line == "/exit":
                return
            if line == "/reset":
                messages = list(beginning)
                terminal.note("The conversation is forgotten.")
            elif line.startswith("/"):
                _explain(line)
            else:
                messages.append({"role": "user", "content": line})
                answer = _answer(llm, messages, params, interactive)
                if answer:
                    messages.append({"role": "assistant", "content": answer})
                else:  # nothing was said, so nothing was asked
                    messages.pop()


def _lines(interactive: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
            terminal.note("Ctrl-D or /exit leaves.")
            continue
        except UnicodeDecodeError:
            terminal.note("That was not UTF-8 text; say it again.")
            continue
        if line:
            yield line


def _answer(
    llm: LLM, messages: list[dict[str, str]], params: SamplingParams, interactive: bool
) -> str:
    """Show the answer; return it, or what there was of it when the user stopped it."""
    said: list[str] = []
    try:
        with contextlib.closing(llm.chat(messages, params, stream=True)) as pieces:
            for piece in pieces:
                said.append(piece.text)
                terminal.write(piece.text)
        terminal.write("\n")
        if piece.result is not None and sys.stderr.isatty():
            terminal.note(terminal.summary(piece.result, params, llm.context))
    except KeyboardInterrupt:
        terminal.write("\n")
        if not interactive:
            raise
        terminal.note("Stopped.")
    except ContextLengthError as error:
        terminal.note(f"error: {error}; or begin anew with /reset")
    return "".join(said)


def _explain(line: str) -> None:
    if line != "/help":
        near = get_close_matches(line, _COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "these are known:"
        terminal.note(f"{line.split()[0]} is no command; {hint}")
        if near:
            return
    for name, meaning in _COMMANDS.items():
        terminal.note(f"{name:8}{meaning}")


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Lines of earlier conversations, where Python has readline."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    path = cache_dir() / "chat_history"
    # A history that cannot be read or written is no reason to refuse the conversation.
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
