"""Every error that Cyclewise raises on purpose: one hierarchy, one sentence each.

    CyclewiseError
    ├── ModelFileError          a model file is malformed, truncated or hostile
    ├── UnsupportedModelError   a sound file of an unknown architecture, block format or tokenizer
    ├── ModelNotFoundError      no model of that name or path; the nearest names are given
    ├── DownloadError           a model could not be fetched: no network, not there, not allowed
    ├── TemplateError           a chat template failed, ran too long or wrote too much
    ├── InvalidParameterError   a parameter is out of its range or unknown
    │   └── UnsupportedSchemaError  a JSON schema uses a keyword that cannot be followed
    ├── ContextLengthError      the tokens do not fit into the context
    ├── OverloadedError         there is too much to do; it says when to ask again
    ├── DeadlineError           an answer was not complete in time
    ├── EngineError             the engine was closed, or failed
    ├── CacheError              the cache cannot be written or is full
    ├── PeerError               a program to compare with is missing or failed
    └── ClockError              this machine has no counter that the clock could stand on

`str(error)` is one clear sentence: what was wrong, where, and what to do. The command line prints
it after `error: ` and exits with code 2; a library user catches `CyclewiseError`.
"""

from __future__ import annotations


class CyclewiseError(Exception):
    """Base of all errors of this package."""


class ModelFileError(CyclewiseError):
    """A model file is malformed, truncated, hostile or cannot be read."""


class UnsupportedModelError(CyclewiseError):
    """A sound model file needs an architecture, block format or tokenizer unknown here."""


class ModelNotFoundError(CyclewiseError):
    """A model's name or path is unknown."""


class DownloadError(CyclewiseError):
    """A model could not be fetched."""


class TemplateError(CyclewiseError):
    """A chat template could not be rendered."""


class InvalidParameterError(CyclewiseError):
    """A parameter is unknown or out of its range."""


class UnsupportedSchemaError(InvalidParameterError):
    """A JSON schema uses a keyword that cannot be followed."""

    def __init__(self, keyword: str, reason: str) -> None:
        super().__init__(f"json_schema uses `{keyword}`, which cannot be followed here: {reason}")
        self.keyword = keyword
        self.reason = reason


class ContextLengthError(CyclewiseError):
    """A prompt, or a prompt with its answer, is longer than the context."""


class OverloadedError(CyclewiseError):
    """So much is to be done already that nothing more is taken on."""

    def __init__(self, reason: str, retry_after: float) -> None:
        """retry_after  seconds until it may be worth to ask again"""
        super().__init__(f"{reason}; ask again in {retry_after:.0f} s")
        self.retry_after = retry_after


class DeadlineError(CyclewiseError):
    """An answer was not complete when the time for it had passed."""


class EngineError(CyclewiseError):
    """The engine runs no more: it was closed, or failed; or a step of it failed."""


class CacheError(CyclewiseError):
    """The cache directory cannot be used: not writable, or the disk is full."""


class PeerError(CyclewiseError):
    """A program that a benchmark compares with is not installed or failed."""


class ClockError(CyclewiseError):
    """The processor's counters cannot be read, or what they count is not time."""
