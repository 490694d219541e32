"""How many answers a machine can write at once, and how fast each comes: predicted, for servers.

`cyclewise whatif --streams` comes here. A stream is an answer that is being decoded at some length
of its context; all of them run in the same step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cyclewise.clock.calibrate import Progress, calibrated, usual_bandwidth
from cyclewise.clock.predict import Predictor, View
from cyclewise.clock.run import Settings
from cyclewise.clock.whatif import Estimate, bands
from cyclewise.terminal import size, table

if TYPE_CHECKING:
    from cyclewise.machine.profile import MachineProfile
    from cyclewise.models import Model

CONTEXTS = (512, 2048, 4096)
STREAMS = (1, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Streams:
    """So many answers at once, each with so many tokens before the next one."""

    context: int
    streams: int
    seconds_per_token: Estimate  # of each
    prompt_seconds: float  # of one prompt of this length, alone
    cache_bytes: int  # of all

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        token = self.seconds_per_token
        speed = {"value": 1 / token.value, "low": 1 / token.high, "high": 1 / token.low}
        return {
            "context": self.context,
            "streams": self.streams,
            "tokens_per_second_each": speed,
            "tokens_per_second": self.streams / token.value,
            "prompt_seconds": self.prompt_seconds,
            "cache_bytes": self.cache_bytes,
            "provenance": "modelled",
        }


def predict_streams(model: Model, machine: MachineProfile, progress: Progress) -> Iterator[Streams]:
    """For each of CONTEXTS that the model can hold, and each of STREAMS. The memory's bandwidth is
    read once, so that they differ by nothing else.
    """
    view, threads = View.of(model), model.machine.num_threads
    machine, costs = calibrated(machine, view.formats, threads, progress)
    predictor = Predictor(costs, threads, usual_bandwidth(model.machine, view.weight_bytes))
    _, band = bands(machine)
    for context in CONTEXTS:
        if context > model.config.context_length:
            continue
        prompt = predictor.times(view, Settings(context, 1)).first_token
        for count in STREAMS:
            token = predictor.times(view, Settings(context, 1, count)).per_token
            estimate = Estimate(token, token / (1 + band), token * (1 + band))
            num_bytes = count * context * model.kv_bytes_per_token
            yield Streams(context, count, estimate, prompt, num_bytes)


def print_streams(found: Sequence[Streams], model: Model) -> None:
    """Prints what was predicted, and what memory it takes."""
    rows = [["CONTEXT", "STREAMS", "TOKENS/S EACH", "OF ALL", "PROMPT, S", "CACHE"]]
    for each in found:
        facts = each.as_dict()
        speed = facts["tokens_per_second_each"]
        rows.append([
            str(each.context), str(each.streams),
            f"{speed['value']:.1f} ({speed['low']:.1f}-{speed['high']:.1f})",
            f"{facts['tokens_per_second']:.0f}", f"{each.prompt_seconds:.2f}",
            size(each.cache_bytes),
        ])  # fmt: skip
    print(table(rows))
    print(
        f"predicted for {model.machine.num_threads} threads; beside the cache "
        f"({model.kv_bytes_per_token} bytes a token, {model.kv}) stand "
        f"{size(model.bytes_per_token)} of weights"
    )
