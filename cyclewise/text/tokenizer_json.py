"""The tokenizer of a Hugging Face directory: `tokenizer.json`, run by the library that defines it.

In: the file's text and tokenizer_config.json, both hostile. Out: a `Tokenizer` like that of a GGUF
file. Ids are those of transformers' fast tokenizers, with the exception of this house: plain text
never becomes a control token. For that, control tokens get names here that no text has before the
library sees the file; those that a chat's template writes are renamed on the way in, and ids are
translated back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from cyclewise.errors import ModelFileError, UnsupportedModelError
from cyclewise.text.encoders import SPACE, byte_level_alphabet
from cyclewise.text.tokenizer import Tokenizer, without_surrogates
from cyclewise.text.vocabulary import TokenType, Vocabulary, fill_texts, stop_ids
from cyclewise.weights.hf_files import STOP_IDS, TOKENIZER_CONFIG, TOKENIZER_JSON, VOCAB_SIZE

if TYPE_CHECKING:
    from cyclewise.text.chat import Rendered

_SECRET = "\U0010ffff"
"""A noncharacter, taken out of every text: names of control tokens are made of it."""
_MAX_ID = 1 << 20  # the largest known vocabulary has 0.9 million
_MAX_NESTING = 8
_MAX_GROWTH = 64  # times that a text may become longer, and characters put before it
_SPACE = re.compile("[ \t\n\r]*")
_WHERE = "tokenizer.json"
_FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
_NAMED = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")


class JsonTokenizer(Tokenizer):
    """Encodes and decodes; safe to use from any number of threads.

    Raises ModelFileError where the file is damaged, UnsupportedModelError for a kind of tokenizer
    that no decoder has.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._text = metadata[TOKENIZER_JSON]
        parsed, texts = _parse(self._text)
        settings = metadata.get(TOKENIZER_CONFIG, {})
        _check_growth(parsed)
        self._added = added = _added_tokens(parsed, settings)
        least_size = metadata.get(VOCAB_SIZE)
        least_size = least_size if type(least_size) is int and least_size <= _MAX_ID else 0
        stops = metadata.get(STOP_IDS, [])
        vocabulary = _vocabulary(parsed, settings, added, stops, least_size)
        hidden = vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN)
        self._secrets = {vocabulary.tokens[i]: f"{_SECRET}{i}{_SECRET}" for i in hidden}
        self._library = _Library(texts, added, self._secrets)
        for entry in added:
            if entry.get("normalized") and not entry["special"]:
                vocabulary.tokens[entry["id"]] = self._library.normalized(entry["content"])
        spell = _speller(vocabulary)
        outside = {*self._library.file_ids, vocabulary.unknown_id}
        self._spelled = {i: spell(vocabulary.tokens[i]) for i in hidden if i not in outside}
        self._before, self._after = _surroundings(
            parsed, settings, vocabulary.bos_id, vocabulary.eos_id
        )
        super().__init__(vocabulary, self._encode_text)

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Ids of `text`, as `Tokenizer.encode` says."""
        text = _clean(text)
        if parse_special:
            library = self._open_library
            ids = [library.file_ids.get(found, found) for found in library.encode(text)]
        else:
            ids = self._encode_text(text)
        return [*self._before, *ids, *self._after] if add_special else ids

    @cached_property
    def _open_library(self) -> _Library:
        """One that knows control tokens by the names that they have in the file."""
        return _Library(_parse(self._text)[1], self._added, {name: name for name in self._secrets})

    def encode_chat(self, rendered: Rendered) -> list[int]:
        """Ids of a rendered chat, as `Tokenizer.encode_chat` says: its text as a whole, as
        transformers encodes it.
        """
        ids = self._encode_text(
            "".join(
                (self._secrets.get(part.text) if part.is_special else None) or _clean(part.text)
                for part in rendered.parts
            )
        )
        if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        for found in self._library.encode(text):
            if found in self._library.file_ids:
                ids.append(self._library.file_ids[found])
            elif found in self._spelled:  # merges, or a whole word, that make a control token
                ids += self._spelled[found]
            else:
                ids.append(found)
        return ids


def _clean(text: str) -> str:
    return without_surrogates(text).replace(_SECRET, "\ufffd")


def _damaged(what: str) -> ModelFileError:
    return ModelFileError(f"{_WHERE}: {what}: the file is damaged, fetch it again")


@contextmanager
def _guarded(what: str) -> Iterator[None]:
    """What the library raises is of no class of its own, and it may panic."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise _damaged(f"{what} ({error})".partition("\n")[0][:200]) from None


def _parse(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The members of the file's object, and the text of each: the vocabulary is written back as it
    was read.
    """
    decode = json.JSONDecoder().raw_decode
    members: dict[str, Any] = {}
    texts: dict[str, str] = {}
    try:
        at = _after(text, 0, "{")
        while True:
            key, at = decode(text, _after(text, at))
            start = _after(text, at, ":")
            members[key], at = decode(text, start)
            texts[key] = text[start:at]
            at = _after(text, at)
            if text[at : at + 1] == "}":
                break
            at = _after(text, at, ",")
    except RecursionError:
        raise _damaged("its JSON is nested too deeply") from None
    except (ValueError, TypeError) as error:  # a key that is a list has no hash
        raise _damaged(f"no JSON ({error})"[:200]) from None
    if not isinstance(members.get("model"), dict):
        raise _damaged("it has no model")
    return members, texts


def _after(text: str, at: int, sign: str = "") -> int:
    """Behind white space, a sign where one is asked for, and white space."""
    at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # may be empty
    if not text.startswith(sign, at):
        raise ValueError(f"{sign!r} is missing at character {at}")
    return _SPACE.match(text, at + len(sign)).end()  # type: ignore[union-attr]


def _added_tokens(parsed: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tokens beside the model's, in order of their ids; control tokens have `special` set."""
    added = parsed.get("added_tokens") or []
    more = settings.get("added_tokens_decoder") or {}
    if not isinstance(added, list) or not isinstance(more, dict):
        raise _damaged("added_tokens is no list")
    tokens: dict[int, dict[str, Any]] = {}
    for entry in added:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise _damaged("an added token has no content")
        if type(entry.get("id")) is not int or not 0 <= entry["id"] < _MAX_ID:
            raise _damaged(f"an added token has the id {entry.get('id')!r}"[:80])
        tokens[entry["id"]] = dict(entry)
    for key, entry in more.items():
        is_id = key.isdecimal() and len(key) < 9 and int(key) < _MAX_ID
        if isinstance(entry, dict) and _content(entry) and is_id:
            tokens.setdefault(int(key), {**_FLAGS, **entry, "id": int(key)})
    named = {_content(settings.get(f"{name}_token")) for name in _NAMED}
    others = settings.get("additional_special_tokens") or []
    named |= {_content(other) for other in (others if isinstance(others, list) else [])}
    for entry in tokens.values():
        entry["special"] = bool(entry.get("special")) or entry["content"] in named
    return [tokens[i] for i in sorted(tokens) if tokens[i]["content"]]


def _content(token: Any) -> str:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _vocabulary(
    parsed: Mapping[str, Any],
    settings: Mapping[str, Any],
    added: list[dict[str, Any]],
    stops: list[int],
    least_size: int,
) -> Vocabulary:
    ids = _model_ids(parsed["model"])
    beside = {entry["content"]: entry["id"] for entry in added}
    ids |= beside
    size = max(max(ids.values(), default=-1) + 1, least_size)
    if len(set(ids.values())) != len(ids):
        raise _damaged("two tokens have one id")
    tokens = [f"[EMPTY_{i}]" for i in range(size)]
    for token, index in ids.items():
        tokens[index] = token
    types = np.full(size, TokenType.NORMAL, np.int32)
    types[[i for i, token in enumerate(tokens) if token not in ids]] = TokenType.UNUSED
    kind, drops_space, bytes_fall_back = _decoder(parsed)
    if bytes_fall_back:
        byte = re.compile(r"<0x[0-9A-Fa-f]{2}>")
        types[[i for token, i in ids.items() if byte.fullmatch(token)]] = TokenType.BYTE
    for entry in added:
        types[entry["id"]] = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
    bos, eos = (ids.get(_content(settings.get(f"{name}_token"))) for name in ("bos", "eos"))
    unknown = ids.get(_content(parsed["model"].get("unk_token") or settings.get("unk_token")))
    unk_id = parsed["model"].get("unk_id")
    unknown = unk_id if type(unk_id) is int and 0 <= unk_id < size else unknown
    ends = {*stop_ids({}, beside), *(i for i in stops if 0 <= i < size)}
    ends |= {eos} if eos is not None else set()
    fills = [beside[content] for content in fill_texts() if content in beside]
    types[[*ends, *fills, *(i for i in (bos, unknown) if i is not None)]] = TokenType.CONTROL
    for entry in added:
        entry["special"] = bool(types[entry["id"]] == TokenType.CONTROL)
    before, after = _surroundings(parsed, settings, bos, eos)
    if not all(0 <= i < size for i in (*before, *after)):
        raise _damaged("its post-processor writes a token that is not there")
    return Vocabulary(
        kind=kind,
        pre=_WHERE,
        tokens=tokens,
        ids=ids,
        types=types,
        scores=None,
        merges=[],
        charsmap=b"",
        bos_id=bos,
        eos_id=eos,
        unknown_id=unknown,
        stop_ids=frozenset(ends),
        add_bos=bos is not None and before[:1] == [bos],
        add_eos=eos is not None and after[-1:] == [eos],
        add_space_prefix=drops_space,
        merge_spaces=False,
        strips_after_special=False,
    )


def _model_ids(model: Mapping[str, Any]) -> dict[str, int]:
    vocab = model.get("vocab")
    if isinstance(vocab, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in vocab
    ):
        return {pair[0]: i for i, pair in enumerate(vocab)}
    if model.get("type") not in (None, "BPE") or "merges" not in model:
        raise UnsupportedModelError(
            f"{_WHERE}: a tokenizer of type {model.get('type')!r} is not supported; BPE and Unigram"
            " are"
        )
    if not isinstance(vocab, dict) or not all(
        type(index) is int and 0 <= index < _MAX_ID for index in vocab.values()
    ):
        raise _damaged("its vocabulary is no table of ids")
    return dict(vocab)


def _parts(part: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """A decoder, pre-tokenizer or the like, and what a sequence of them is made of."""
    if depth > _MAX_NESTING:
        raise _damaged("its parts are nested too deeply")
    if isinstance(part, dict):
        yield part
        for key in ("decoders", "pretokenizers", "processors", "normalizers"):
            inner = part.get(key)
            for each in inner if isinstance(inner, list) else []:
                yield from _parts(each, depth + 1)


def _check_growth(parsed: Mapping[str, Any]) -> None:
    """That normalizers, one after the other, cannot make an endless text of a short one."""
    growth, added = 1, 0
    for part in _parts(parsed.get("normalizer")):
        content, pattern = part.get("content"), part.get("pattern")
        if part.get("type") == "Replace" and isinstance(content, str):
            found = _member(pattern, "String")
            growth *= max(1, len(content) // max(1, len(found if isinstance(found, str) else "")))
        added += len(_content(part.get("prepend")))
        if growth > _MAX_GROWTH or added > _MAX_GROWTH:
            raise _damaged("its normalizer makes texts too long")


def _decoder(parsed: Mapping[str, Any]) -> tuple[str, bool, bool]:
    """The kind of `Vocabulary` by which ids become bytes, whether the first space of a text is
    dropped, and whether tokens like <0x0A> are bytes.
    """
    parts = list(_parts(parsed.get("decoder")))
    types = [part.get("type") for part in parts]
    if "ByteLevel" in types or (
        not parts and any(p.get("type") == "ByteLevel" for p in _parts(parsed.get("pre_tokenizer")))
    ):
        return "gpt2", False, False
    metaspace = [part for part in parts if part.get("type") == "Metaspace"]
    replaced = [part for part in parts if part.get("type") == "Replace"]
    if not metaspace and not any(
        part.get("pattern") == {"String": SPACE} and part.get("content") == " " for part in replaced
    ):
        raise UnsupportedModelError(
            f"{_WHERE}: its decoder ({', '.join(map(str, types)) or 'none'}) is not supported; "
            "byte-level and SentencePiece's are"
        )
    if any(part.get("replacement", SPACE) != SPACE for part in metaspace):
        raise UnsupportedModelError(
            f"{_WHERE}: its decoder has another sign for a space than {SPACE}"
        )
    drops = any(part.get("type") == "Strip" and part.get("start") == 1 for part in parts) or any(
        part.get("prepend_scheme", "always") != "never" and part.get("add_prefix_space", True)
        for part in metaspace
    )
    return "llama", drops, "ByteFallback" in types or bool(parsed["model"].get("byte_fallback"))


def _template_ids(parsed: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before a text and after it."""
    before: list[int] = []
    after: list[int] = []
    for part in _parts(parsed.get("post_processor")):
        if part.get("type") == "TemplateProcessing":
            side = before
            special = part.get("special_tokens")
            steps = part.get("single")
            for step in steps if isinstance(steps, list) else [steps]:
                if not isinstance(step, dict) or not isinstance(special, dict):
                    raise _damaged("its post-processor is no template")
                if "Sequence" in step:
                    side = after
                    continue
                name = _member(step.get("SpecialToken"), "id")
                ids = _member(special.get(name) if isinstance(name, str) else None, "ids")
                if not isinstance(ids, list) or not all(type(i) is int for i in ids):
                    raise _damaged("its post-processor names a token that is not there")
                side += ids
        elif part.get("type") in ("BertProcessing", "RobertaProcessing"):
            for key, side in (("cls", before), ("sep", after)):
                pair = part.get(key)
                if isinstance(pair, list) and len(pair) == 2 and type(pair[1]) is int:
                    side.append(pair[1])
    return before, after


def _member(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _surroundings(
    parsed: Mapping[str, Any], settings: Mapping[str, Any], bos: int | None, eos: int | None
) -> tuple[list[int], list[int]]:
    """Ids before and after a text: the post-processor's, as in transformers 5. Where the file has
    none, the flags in tokenizer_config.json say whether they are a BOS and an EOS token.
    """
    if parsed.get("post_processor") is not None:
        return _template_ids(parsed)
    before, after = (
        [i] if i is not None and settings.get(f"add_{name}_token") is True else []
        for name, i in (("bos", bos), ("eos", eos))
    )
    return before, after


class _Library:
    """The library's tokenizer, which knows control tokens by other names only.

    texts    the members of the file
    added    tokens beside the model's; the library gives new ids to those that its model lacks
    secrets  the name of each control token
    """

    def __init__(
        self, texts: dict[str, str], added: list[dict[str, Any]], secrets: Mapping[str, str]
    ) -> None:
        from tokenizers import Tokenizer as Library

        renamed = [_renamed(entry, secrets.get(entry["content"])) for entry in added]
        known = {entry["content"] for entry in added}
        renamed += [
            {**_FLAGS, "id": 0, "content": secret, "special": True}
            for token, secret in secrets.items() if token not in known
        ]  # fmt: skip
        none = dict.fromkeys(("post_processor", "truncation", "padding"), "null")
        members = {**texts, "added_tokens": json.dumps(renamed), **none}
        text = ",".join(f"{json.dumps(key)}:{member}" for key, member in members.items())
        with _guarded("it cannot be used"):
            self._library = Library.from_str(f"{{{text}}}")
        names = {secrets.get(entry["content"], entry["content"]): entry["id"] for entry in added}
        self.file_ids = {self._library.token_to_id(name): i for name, i in names.items()}

    def encode(self, text: str) -> list[int]:
        """The library's ids; `file_ids` translates those of added tokens."""
        with _guarded("it fails on this text"):
            found: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return found

    def normalized(self, text: str) -> str:
        """How an added token is looked for, and printed."""
        normalizer = self._library.normalizer
        if normalizer is None:
            return text
        with _guarded("its normalizer fails on an added token"):
            found: str = normalizer.normalize_str(text)
        return found.replace(SPACE, " ")


def _renamed(entry: dict[str, Any], name: str | None) -> dict[str, Any]:
    """An added token under another name, found wherever that is, if it is another."""
    if name is None or name == entry["content"]:
        return entry
    return {**entry, "content": name, "normalized": False, "single_word": False}


def _speller(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """The function that writes a text with the smallest tokens there are."""
    alphabet = {byte: character for character, byte in byte_level_alphabet().items()}
    hidden = set(vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN))
    ids = {token: i for token, i in vocabulary.ids.items() if i not in hidden}

    def spell(text: str) -> list[int]:
        if vocabulary.kind == "gpt2":
            return [ids[alphabet[b]] for b in text.encode() if alphabet[b] in ids]
        spelled: list[int] = []
        for character in text.replace(" ", SPACE):
            alone = (
                [character] if character in ids else [f"<0x{b:02X}>" for b in character.encode()]
            )
            spelled += [ids[piece] for piece in alone if piece in ids]
        return spelled

    return spell
