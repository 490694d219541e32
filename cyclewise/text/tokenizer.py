"""Text to token ids and back, from a model's metadata.

The first and the last step on a token's way: `LLM` encodes a prompt or a rendered chat here, the
engine runs the ids, and a `Detokenizer` prints what comes out. Ids are those of llama.cpp, with
one exception on purpose: plain text never becomes a control token, whatever the vocabulary says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cyclewise.text.detokenizer import Detokenizer, Pieces, decode
from cyclewise.text.encoders import Encode, make_encoder
from cyclewise.text.vocabulary import TokenType, Vocabulary, read_vocabulary
from cyclewise.weights.hf_files import TOKENIZER_JSON

if TYPE_CHECKING:
    from cyclewise.text.chat import Rendered

_SURROGATES = re.compile("[\ud800-\udfff]")
_ASCII_SPACE = " \t\n\v\f\r"


def without_surrogates(text: str) -> str:
    """Text that UTF-8 can hold: pairs become characters, others U+FFFD."""
    if _SURROGATES.search(text):
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer:
    """Encodes and decodes; safe to use from any number of threads."""

    def __init__(self, vocabulary: Vocabulary, encode_plain: Encode | None = None) -> None:
        self._vocabulary = vocabulary
        self._encode_plain = encode_plain or make_encoder(vocabulary)
        self._pieces = Pieces(vocabulary)
        self._control = self._longest_first(TokenType.CONTROL, TokenType.UNKNOWN)
        self._user_defined = self._longest_first(TokenType.USER_DEFINED)
        self._special = self._longest_first(
            TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED
        )
        kept = {"<unk>", "<s>", "<|endoftext|>"}
        strips = vocabulary.strips_after_special
        self._stripping = {i for t, i in self._special if strips and t not in kept}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that a GGUF file's `tokenizer.ggml.*` keys describe, or a directory's
        `tokenizer.json`.

        Raises `ModelFileError` where they are damaged, `UnsupportedModelError` where they name a
        kind of tokenizer or a pre-tokenizer that is not known here.
        """
        if "tokenizer.ggml.model" not in metadata and TOKENIZER_JSON in metadata:
            from cyclewise.text.tokenizer_json import JsonTokenizer

            return JsonTokenizer(metadata)
        return cls(read_vocabulary(metadata))

    def _longest_first(self, *types: TokenType) -> list[tuple[str, int]]:
        tokens = self._vocabulary.tokens
        found = [(tokens[index], index) for index in self._vocabulary.ids_of(*types)]
        return sorted(found, key=lambda token: -len(token[0].encode()))

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self._vocabulary.tokens)

    @property
    def bos_id(self) -> int | None:
        """The token that begins a sequence, where there is one."""
        return self._vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        """The token that ends a sequence, where there is one."""
        return self._vocabulary.eos_id

    @property
    def bos_token(self) -> str:
        """Text of the BOS token for templates; empty where there is none."""
        return self.token_text(self.bos_id)

    @property
    def eos_token(self) -> str:
        """Text of the EOS token for templates; empty where there is none."""
        return self.token_text(self.eos_id)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a generation: end of text, of a turn, of a message."""
        return self._vocabulary.stop_ids

    @property
    def add_bos(self) -> bool:
        """Whether a sequence begins with the BOS token."""
        return self._vocabulary.add_bos

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts of the tokens that only a template can write, never a user."""
        return tuple(text for text, _ in self._control)

    def token_text(self, token_id: int | None) -> str:
        """A token as the vocabulary spells it, for messages and templates; empty for None."""
        return "" if token_id is None else self._vocabulary.tokens[token_id]

    def show(self, token_id: int) -> str:
        """What a token prints, with U+FFFD for part of a character; the name of one that prints
        nothing.
        """
        piece = self._pieces.of(token_id)
        return piece.decode(errors="replace") if piece else self.token_text(token_id)

    def all_bytes(self) -> list[bytes]:
        """What each token prints, by its id; of one that only a template can write, b"\\xff" and
        its name, which is no UTF-8.
        """
        found = self._pieces.all()
        for token_id in self._vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN):
            found[token_id] = b"\xff" + self._vocabulary.tokens[token_id].encode()
        return found

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Ids of `text`.

        `add_special` puts BOS before and EOS after as the file says. `parse_special` reads control
        tokens in the text: for prompts written by the program's own user as a whole, never for
        text from elsewhere. User-defined tokens are plain text with an id, and always read.
        """
        special = self._special if parse_special else self._user_defined
        return self._assemble(self._partition(text, special), add_special=add_special)

    def encode_chat(self, rendered: Rendered) -> list[int]:
        """Ids of a rendered chat, in which only its template wrote control tokens.

        A BOS token is put before it where the file wants one and the template wrote none.
        """
        control = dict(self._control)
        fragments: list[str | int] = []
        text = ""
        for part in rendered.parts:
            token_id = control.get(part.text) if part.is_special else None
            if token_id is None:
                text += part.text
                continue
            fragments += [*self._partition(text, self._user_defined), token_id]
            text = ""
        fragments += self._partition(text, self._user_defined)
        if self.add_bos and fragments[:1] != [self.bos_id]:
            fragments.insert(0, self._vocabulary.bos_id or 0)
        return self._assemble(fragments, add_special=False)

    def _partition(self, text: str, special: Sequence[tuple[str, int]]) -> list[str | int]:
        """Text cut at special tokens, the longest token first, as llama.cpp does it."""
        text = without_surrogates(text)
        fragments: list[str | int] = [text] if text else []
        for token, token_id in special:
            if token not in text:
                continue
            cut: list[str | int] = []
            for fragment in fragments:
                if isinstance(fragment, int):
                    cut.append(fragment)
                    continue
                first, *others = fragment.split(token)
                cut.append(first)
                for other in others:
                    cut += [token_id, other]
            fragments = [fragment for fragment in cut if fragment != ""]
        return fragments

    def _assemble(self, fragments: list[str | int], *, add_special: bool) -> list[int]:
        vocabulary = self._vocabulary
        ids: list[int] = []
        if add_special and vocabulary.add_bos and vocabulary.bos_id is not None:
            ids.append(vocabulary.bos_id)
        prefix = " " if vocabulary.add_space_prefix and vocabulary.kind == "llama" else ""
        previous: int | None = None
        at_special = True
        for fragment in fragments:
            if isinstance(fragment, int):
                ids.append(fragment)
                previous, at_special = fragment, True
                continue
            if previous in self._stripping and at_special:
                fragment = fragment.lstrip(_ASCII_SPACE)
                if not fragment:
                    continue
            ids += self._encode_plain(prefix + fragment if at_special else fragment)
            at_special = False
        if add_special and vocabulary.add_eos and vocabulary.eos_id is not None:
            ids.append(vocabulary.eos_id)
        return ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of `token_ids`, without control tokens; bytes that are no UTF-8 become U+FFFD."""
        return decode(self._pieces, token_ids)

    def stream(self, prompt_ids: Sequence[int] = (), *, exact: bool = False) -> Detokenizer:
        """A detokenizer for the tokens that follow `prompt_ids`.

        Where the prompt ends in text, the stream goes on with it: a leading space stays. Where
        there is no prompt, or it ends in a control token, the stream begins a text, unless
        `exact` asks for just what the tokens print.
        """
        continues = exact or (bool(prompt_ids) and self._pieces.of(prompt_ids[-1]) != b"")
        return Detokenizer(self._pieces, continues=continues)
