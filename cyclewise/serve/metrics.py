"""What Prometheus is told at `/metrics`: the engine's own numbers, and times that clients felt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cyclewise.engine.scheduler import Numbers
from cyclewise.text.memo import Memo

ROUTES = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/tokenize",
    "/detokenize", "/health", "/ready", "/metrics", "/openapi.json", "/v1/batch", "/", "/batch",
)  # fmt: skip
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)
_GAUGES = {
    "jobs": "Jobs that run or wait",
    "running": "Answers that are evaluated or decoded",
    "waiting": "Answers that wait",
    "queued_tokens": "Tokens of prompts that are still to be evaluated",
    "pages_used": "Pages of the KV cache that answers hold",
    "pages_cached": "Pages that nobody holds and that prompts could find",
    "pages_free": "Pages that hold nothing",
}
_COUNTERS = {
    "steps": "Steps of the engine",
    "step_seconds": "Seconds in them",
    "prompt_tokens": "Tokens of prompts that have begun",
    "reused_tokens": "Of these, those that the prefix cache held",
    "generated_tokens": "Tokens generated",
    "preemptions": "Answers that gave their pages up for a while",
    "ended": "Answers that ended by themselves",
    "cancelled": "Answers that nobody wanted any more, or that a stop string ended",
    "failed": "Answers that ended with an error",
    "refused": "Jobs that were refused because there was too much to do",
}


class _Engine(Collector):
    def __init__(self, numbers: Callable[[], Numbers], memos: Mapping[str, Memo[Any]]) -> None:
        self._numbers = numbers
        self._memos = memos

    def collect(self) -> Iterable[Metric]:
        numbers = self._numbers()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"cyclewise_{name}", text, value=getattr(numbers, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"cyclewise_{name}", text, value=getattr(numbers, name))
        lookups = CounterMetricFamily(
            "cyclewise_memo_lookups", "Whether something was worked out before",
            labels=["memo", "result"],
        )  # fmt: skip
        for name, memo in self._memos.items():
            lookups.add_metric([name, "hit"], memo.lookups.hits)
            lookups.add_metric([name, "miss"], memo.lookups.misses)
        yield lookups


class Metrics:
    """Of one server."""

    def __init__(self, numbers: Callable[[], Numbers], memos: Mapping[str, Memo[Any]]) -> None:
        """memos  by what they hold"""
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(numbers, memos))
        self._requests = Counter(
            "cyclewise_requests", "HTTP requests", ["route", "status"], registry=self._registry
        )
        self.first_token = Histogram(
            "cyclewise_time_to_first_token_seconds", "From a job's arrival to its first token",
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self.between_tokens = Histogram(
            "cyclewise_time_between_tokens_seconds", "Between two tokens of an answer",
            buckets=_TOKEN_SECONDS, registry=self._registry,
        )  # fmt: skip
        self.answer = Histogram(
            "cyclewise_answer_seconds", "From a job's arrival to the end of an answer",
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip

    def count_request(self, path: str, status: int) -> None:
        """status  0: the client left before there was one"""
        route = next(
            (route for route in ROUTES if path in (route, route.removeprefix("/v1"))), "other"
        )
        self._requests.labels(route, status or "none").inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
