"""Token ids back to text, whole or token by token.

In: ids as the sampler chooses them. Out: text that never holds half a character. `Pieces` knows
the bytes of every token; `Detokenizer` is the state of one stream. Special tokens print nothing.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from cyclewise.errors import InvalidParameterError
from cyclewise.text.encoders import SPACE, byte_level_alphabet
from cyclewise.text.vocabulary import TokenType, Vocabulary


class Pieces:
    """The bytes that each token prints; made as they are first needed."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokens = vocabulary.tokens
        self._types = vocabulary.types
        self._alphabet = byte_level_alphabet() if vocabulary.kind == "gpt2" else None
        self._known: dict[int, bytes] = {}
        self.drops_leading_space = vocabulary.add_space_prefix

    def __len__(self) -> int:
        return len(self._tokens)

    def of(self, token_id: int) -> bytes:
        """Bytes that `token_id` prints: none for control tokens, raw bytes for byte tokens."""
        piece = self._known.get(token_id)
        if piece is None:
            if not 0 <= token_id < len(self._tokens):
                raise InvalidParameterError(
                    f"token id {token_id} is not in the vocabulary of {len(self._tokens)} tokens"
                )
            piece = self._known[token_id] = self._make(token_id)
        return piece

    def all(self) -> list[bytes]:
        """The bytes of every token, by its id."""
        return list(map(self.of, range(len(self))))

    def _make(self, token_id: int) -> bytes:
        text, kind = self._tokens[token_id], int(self._types[token_id])
        if kind == TokenType.USER_DEFINED:
            return text.encode()
        if kind == TokenType.BYTE:
            digits = text[3:5] if len(text) == 6 and text.startswith("<0x") else ""
            try:
                return bytes([int(digits, 16)])
            except ValueError:
                return b""
        if kind != TokenType.NORMAL:
            return b""
        if self._alphabet is None:
            return text.replace(SPACE, " ").encode()
        alphabet = self._alphabet
        try:
            return bytes([alphabet[c] for c in text])
        except KeyError:  # a token that is no byte-level text
            parts = (bytes([alphabet[c]]) if c in alphabet else c.encode() for c in text)
            return b"".join(parts)


class Detokenizer:
    """Text of a stream of tokens: what is complete comes out, the rest of a character waits.

    Bytes that no further byte can complete become U+FFFD at once. Where the vocabulary puts a space
    before every text, the first one is dropped, unless the stream goes on with text before it.
    """

    def __init__(self, pieces: Pieces, *, continues: bool) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = pieces.drops_leading_space and not continues

    def push(self, token_id: int) -> str:
        """Text that is complete now that `token_id` has come; often one token's, at times none."""
        piece = self._pieces.of(token_id)
        if self._drop_space and piece:
            self._drop_space = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """The end: U+FFFD where a character was left unfinished. The stream may then go on."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def decode(pieces: Pieces, token_ids: Iterable[int]) -> str:
    """Text of a whole sequence: what a `Detokenizer` that begins with it would print."""
    joined = b"".join(map(pieces.of, token_ids))
    if pieces.drops_leading_space:
        joined = joined.removeprefix(b" ")
    return joined.decode("utf-8", errors="replace")
