"""The nouns of the engine: what a user asks for, and what the machine is given for one step.

`SamplingParams` comes in from `llm.py` or the command line and is read by the sampler. `Batch` is
made by the engine's `schedule` and read by `Machine.step`. This module imports nothing heavy, so
that the command line can show defaults without paying for numpy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Protocol

from cyclewise.errors import InvalidParameterError, ModelFileError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cyclewise.machine.machine import Chunk


MAX_ANSWERS = 128
MAX_LOGPROBS = 1000
STRUCTURES = ("json_schema", "regex", "grammar")


class _Ours(float):
    """A default of this package, for which `of_model` puts the model's own."""


class _OurInteger(int):
    """The same, a whole number."""


_MODEL_KEYS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""What a model's file may have a default of, as `general.sampling.*`."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when generation ends.

    The first six default to what the model's file says, of those that it names (`of_model`), else
    to llama.cpp's (`common/common.h`, `common_params_sampling`), so that the same file gives the
    same kind of text here and there; `sampler.py` says in which order the filters act. A value out
    of its range raises InvalidParameterError.
    """

    temperature: float = _Ours(0.8)  # 0: greedy, always the most likely token
    top_k: int = _OurInteger(40)  # only the k most likely tokens; 0: all
    top_p: float = _Ours(0.95)  # the smallest set with this share of the probability; 1: all
    min_p: float = _Ours(0.05)  # this share of the most likely token's probability; 0: all
    typical_p: float = 1.0  # tokens about as surprising as is usual, of this share; 1: all
    repetition_penalty: float = _Ours(1.0)  # over the last 64 tokens, prompt included; 1: none
    presence_penalty: float = 0.0  # taken once off the logit of each token generated; 0: none
    frequency_penalty: float = 0.0  # taken off each time that the token was generated; 0: none
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id: added to its logit
    seed: int | None = None  # same seed, same text; None: a fresh one each time
    n: int = 1  # answers to one prompt; the i-th from 0 on is that of seed + i
    max_tokens: int | None = 512
    """None: until the model stops or the context is full. 0: no answer, for `prompt_logprobs`."""
    stop: Sequence[str] = ()  # text that ends the answer, and is not part of it; kept as a tuple
    stop_token_ids: Sequence[int] = ()  # tokens that end it as well; kept as a tuple
    ignore_eos: bool = False  # go on after the end-of-turn token
    json_schema: str | Mapping[str, Any] | bool | None = None
    """A JSON schema that the answer is an instance of; kept as text. {} allows any JSON."""
    regex: str | None = None  # a regular expression that the whole answer matches
    grammar: str | None = None  # a Lark grammar that the whole answer follows
    logprobs: int | None = None
    """The log probability of each token, and of so many most likely ones beside it; None: none.

    They are of the distribution that the model gave: before bias, penalties, structure, filters
    and temperature (as OpenAI and vLLM have it).
    """
    prompt_logprobs: int | None = None  # the same of the prompt's tokens, none reused then
    adapter: str | None = None  # a LoRA adapter by its name; None: the model as it is

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0, math.inf, "0 is greedy")
        check_integer("top_k", self.top_k, 0, 2**31 - 1, "0 keeps all tokens")
        for name in ("top_p", "typical_p"):
            check_number(name, getattr(self, name), 0, 1, "1 keeps all tokens")
            if getattr(self, name) == 0:
                raise InvalidParameterError(
                    f"{name} must be greater than 0 (1 keeps all tokens), not 0; "
                    f"for the most likely token alone use temperature 0"
                )
        check_number("min_p", self.min_p, 0, 1, "0 keeps all tokens")
        # logits that it multiplies or divides stay far from float32's limits
        check_number("repetition_penalty", self.repetition_penalty, 0.01, 100, "1 is none")
        check_number("presence_penalty", self.presence_penalty, -2, 2, "0 is none")
        check_number("frequency_penalty", self.frequency_penalty, -2, 2, "0 is none")
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidParameterError(
                f"logit_bias must be like {{token id: bias}}, not {self.logit_bias!r}"
            )
        for token_id, bias in self.logit_bias.items():
            check_integer("logit_bias", token_id, 0, 2**31 - 1, "ids of tokens")
            check_number("logit_bias", bias, -100, 100, "which rule a token out and in")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        if self.seed is not None:
            check_integer("seed", self.seed, 0, 2**64 - 1, "None draws a fresh one")
        check_integer("n", self.n, 1, MAX_ANSWERS, "the number of answers")
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, 0, 2**31 - 1, "None is no limit")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise InvalidParameterError(f"stop must hold strings that are not empty: {text!r}")
        object.__setattr__(self, "stop", stop)
        if isinstance(self.stop_token_ids, int | str):
            raise InvalidParameterError(
                f"stop_token_ids must be a list of token ids, not {self.stop_token_ids!r}"
            )
        stop_token_ids = tuple(self.stop_token_ids)
        for token_id in stop_token_ids:
            check_integer("stop_token_ids", token_id, 0, 2**31 - 1, "ids of tokens")
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidParameterError(
                f"ignore_eos must be True or False, not {self.ignore_eos!r}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 0, MAX_LOGPROBS, "None is none")

        if self.adapter is not None and not isinstance(self.adapter, str):
            raise InvalidParameterError(f"adapter must be a name, not {self.adapter!r}")
        self._check_structure()

    def _check_structure(self) -> None:
        schema = self.json_schema
        if isinstance(schema, Mapping | bool):
            import json

            try:
                object.__setattr__(self, "json_schema", json.dumps(schema))
            except (TypeError, ValueError) as error:
                raise InvalidParameterError(f"json_schema is no JSON: {error}") from None
        given = []
        for name in STRUCTURES:
            value = getattr(self, name)
            if value is not None:
                given.append(name)
                if not isinstance(value, str):
                    raise InvalidParameterError(f"{name} must be a string, not {value!r}")
        if len(given) > 1:
            raise InvalidParameterError(f"an answer has one structure, not {' and '.join(given)}")
        if given and self.ignore_eos:
            raise InvalidParameterError(
                f"ignore_eos would go on after the end of what {given[0]} allows: leave one of "
                f"them out"
            )

    @property
    def structure(self) -> tuple[str, str] | None:
        """The structure that an answer must have: the parameter's name and its text."""
        for name in STRUCTURES:
            text = getattr(self, name)
            if text is not None:
                return name, text
        return None

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise InvalidParameterError if a token id that is named here is none of the model's."""
        named = {
            "logit_bias": self.logit_bias,
            "stop_token_ids": self.stop_token_ids,
        }
        for name, token_ids in named.items():
            for token_id in token_ids:
                if token_id >= vocab_size:
                    raise InvalidParameterError(
                        f"{name} names token {token_id}, and this model's token ids are from 0 to "
                        f"{vocab_size - 1}"
                    )

    def of_model(self, metadata: Mapping[str, Any]) -> SamplingParams:
        """The same, with the model's own values for those that were not named.

        metadata  a model's: `general.sampling.*`, which in a Hugging Face directory is its
                  generation_config.json

        Raises ModelFileError for such a value that cannot be.
        """
        params = self
        for name, key in _MODEL_KEYS.items():
            value = metadata.get(f"general.sampling.{key}")
            if value is None or not isinstance(getattr(self, name), _Ours | _OurInteger):
                continue
            try:
                if name == "top_k" and int(value) == value:
                    value = max(0, int(value))  # -1 is all, too
                named: dict[str, Any] = {name: value}
                params = replace(params, **named)
            except (InvalidParameterError, TypeError, ValueError, OverflowError):
                raise ModelFileError(
                    f"the model's own {name} is {value!r}, which cannot be: give one of yours"
                ) from None
        return params

    def all_stop_ids(self, of_model: frozenset[int]) -> frozenset[int]:
        """The tokens that end an answer, of those of the model and those that are named here."""
        named = frozenset(self.stop_token_ids)
        return named if self.ignore_eos else named | of_model

    def of_answer(self, index: int) -> SamplingParams:
        """What the answer `index` of `n` is alone: the same with a seed of its own, and n = 1."""
        seed = None if self.seed is None else (self.seed + index) % 2**64
        return replace(self, seed=seed, n=1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Make parameters from names and values; an unknown name is an error with the nearest."""
        known = [known_field.name for known_field in fields(cls)]
        for name in values:
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
                raise InvalidParameterError(f"unknown sampling parameter {name!r}: {hint}")
        return cls(**values)


def check_number(name: str, value: object, low: float, high: float, note: str) -> None:
    """Raise InvalidParameterError unless `value` is a finite number from `low` to `high`."""
    # bool is an int to Python, and True as a temperature is a mistake
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        wanted = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise InvalidParameterError(
            f"{name} must be a number {wanted} ({note}), not {value!r}",
        )


def check_integer(name: str, value: object, low: int, high: int, note: str) -> None:
    """Raise InvalidParameterError unless `value` is a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidParameterError(
            f"{name} must be a whole number from {low} to {high} ({note}), not {value!r}"
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """What the machine is given for one step: a flat list of tokens from any sequences."""

    token_ids: npt.NDArray[np.int32]  # (tokens,)
    chunks: list[Chunk]  # whose tokens they are; they cover the batch in order
    logit_rows: list[int]  # indices of the tokens whose logits are wanted, rising


class Machine(Protocol):
    """What the engine asks of the machine."""

    @property
    def max_batch_tokens(self) -> int:
        """Most tokens of one step."""

    @property
    def page_tokens(self) -> int:
        """Tokens that one page of the KV cache holds."""

    @property
    def num_pages(self) -> int:
        """Pages of the KV cache."""

    def copy_page(self, source: int, to: int) -> None:
        """Copies the keys and values of a page."""

    def step(
        self,
        token_ids: npt.NDArray[np.int32],
        chunks: Sequence[Chunk],
        logit_rows: Sequence[int],
    ) -> npt.NDArray[np.float32]:
        """Run the program for a batch; return a view (logit_rows, vocab_size), valid until the
        next step."""


class ModelConfig(Protocol):
    """What the engine reads of a model's configuration."""

    @property
    def context_length(self) -> int:
        """Most tokens of one sequence."""

    @property
    def vocab_size(self) -> int:
        """Number of logits of one token."""


class Model(Protocol):
    """What the engine reads of a loaded model."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def machine(self) -> Machine: ...
