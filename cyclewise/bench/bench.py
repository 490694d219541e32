"""Prefill and decode speed of a loaded model, in turns with other engines on the same file.

A loaded model comes in, from `cyclewise bench` or a script in `benchmarks/`; a `BenchResult` goes
out. The engines take turns (peer, ours, peer, ours, ...) and each ratio is of two neighbouring
turns, because on a shared machine only such a ratio means something. While one runs the others are
idle, and the result says how idle: the share of one core that each used while it was not its turn.

Read bandwidth is probed right before and right after each decode of ours, with its threads, so the
share of bandwidth is within the pair too.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cyclewise.bench.host import busy_seconds, describe_host
from cyclewise.bench.peers import Peer, find_interpreter, peer_kind
from cyclewise.engine.engine import Engine
from cyclewise.engine.request import Machine, Model
from cyclewise.errors import InvalidParameterError

HANDOVER_SECONDS = 0.05  # threads that spin after their work have parked by then
PROBE_SECONDS = 0.15


class BenchMachine(Machine, Protocol):
    """What the benchmark asks of the machine."""

    @property
    def num_threads(self) -> int:
        """Threads that execute a step."""

    def read_bandwidth(self, seconds: float) -> float:
        """Read memory with the machine's threads for about that long; bytes per second."""


class BenchModel(Model, Protocol):
    """What the benchmark reads of a loaded model."""

    @property
    def path(self) -> Path:
        """The file, which the peers load too."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one decode step streams."""

    @property
    def kv(self) -> str:
        """What the KV cache holds."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that the cache holds of one token, all layers together."""

    @property
    def machine(self) -> BenchMachine: ...


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and how far the measurements lay from it."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class PeerResult:
    """A peer's speed, and ours over the peer's."""

    name: str
    version: str
    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    prefill_ratio: float  # median over pairs of ours / the peer's
    decode_ratio: float
    prefill_ratio_spread: Spread
    decode_ratio_spread: Spread
    idle_cpu_share: float  # of one core, while it was not its turn
    details: dict[str, Any]  # what the peer says of itself


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What `run_bench` measured. `as_dict` is the JSON of the command."""

    model: str
    threads: int
    kv: str  # what the KV cache holds
    prompt_tokens: int
    generate_tokens: int
    depth: int
    repeats: int
    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    bytes_per_decode_token: float  # weights, and the mean over the positions of the KV cache read
    read_bandwidth_bytes_per_second: float  # median over repeats
    decode_fraction_of_bandwidth: float  # median over repeats, each with its own bandwidth
    decode_fraction_of_bandwidth_spread: Spread
    idle_cpu_share: float  # of one core, while the peers had their turns; 0 without peers
    others_cpu_share: float | None  # of the whole machine, used by none of these engines meanwhile
    peers: tuple[PeerResult, ...]
    host: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class _Engine(Protocol):
    """What takes turns: ours, or a peer."""

    def prefill(self, token_ids: Sequence[int]) -> float: ...

    def decode(self, before: Sequence[int], token_ids: Sequence[int]) -> float: ...


@dataclass(frozen=True, slots=True)
class _Turn:
    """Seconds of one engine for the same work as its neighbour in the pair."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two engines on the same tokens, one right after the other."""

    peer: str | None  # no name: ours alone
    theirs: _Turn | None
    ours: _Turn
    bandwidth: float  # bytes/s, probed around our decode


class OurEngine:
    """Our engine behind the same two calls as a peer's."""

    def __init__(self, model: BenchModel, adapter: int | None = None) -> None:
        """`adapter`: the number of the LoRA adapter that all tokens have."""
        self.engine, self.adapter = Engine(model), adapter

    def prefill(self, token_ids: Sequence[int]) -> float:
        sequence = self.engine.new_sequence(self.adapter)
        start = time.perf_counter()
        self.engine.evaluate(sequence, token_ids, "last")
        seconds = time.perf_counter() - start
        self.engine.free(sequence)
        return seconds

    def decode(self, before: Sequence[int], token_ids: Sequence[int]) -> float:
        sequence = self.engine.new_sequence(self.adapter)
        if before:
            self.engine.evaluate(sequence, before, "none")
        start = time.perf_counter()
        for token_id in token_ids:
            self.engine.evaluate(sequence, [token_id], "last")
        seconds = time.perf_counter() - start
        self.engine.free(sequence)
        return seconds


class _IdleClock:
    """The processor time that this process uses while a peer has its turn."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu_start

    @property
    def share(self) -> float:
        return self.cpu_seconds / self.seconds if self.seconds else 0.0


class _OthersClock:
    """How much of the machine is used by processes that take no part, from now on.

    With every core in use, an engine whose threads wait for each other falls far: a ratio measured
    beside busy processes says more about them than about the engines.
    """

    def __init__(self, peers: Sequence[Peer]) -> None:
        self.peers = peers
        self.start, self.others_start = time.perf_counter(), self._others()

    def _others(self) -> float | None:
        busy = busy_seconds()
        if busy is None:
            return None
        return busy - time.process_time() - sum(peer.cpu_seconds for peer in self.peers)

    @property
    def share(self) -> float | None:
        others = self._others()
        if others is None or self.others_start is None:
            return None
        wall = (time.perf_counter() - self.start) * (os.cpu_count() or 1)
        # The system counts in ticks of its own: on a busy machine they come to a little more.
        return min(max(0.0, (others - self.others_start) / wall), 1.0)


def bytes_per_decode_token(
    weight_bytes: int, kv_bytes: int, depth: int, generate_tokens: int
) -> float:
    """Bytes that a decode step reads on average: step i of n reads the KV of depth + i tokens."""
    return weight_bytes + kv_bytes * (depth + (generate_tokens + 1) / 2)


def run_bench(
    model: BenchModel,
    *,
    prompt_tokens: int = 512,
    generate_tokens: int = 64,
    depth: int = 0,
    repeats: int = 5,
    against: Sequence[str] = (),
    adapter: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> BenchResult:
    """Measure prefill from an empty context and, apart from it, decode from a context of `depth`.

    model     a loaded model; its machine's threads are what the peers get as well
    against   names of peers (`peers.PEERS`)
    adapter   the number of the LoRA adapter that our tokens have; peers have none
    repeats   of ours without peers; with them, pairs with each peer
    progress  is told in a few words what runs now

    No token is sampled: every engine but OpenVINO GenAI, which samples greedily, is fed the same
    random ids, others at every repeat, so that a cache of prompts gains nothing. Raises
    InvalidParameterError for counts out of range and PeerError for a peer that cannot run, both
    before anything is measured.
    """
    _check(model, prompt_tokens, generate_tokens, depth, repeats)
    names = list(dict.fromkeys(against))
    for name in names:
        find_interpreter(peer_kind(name))
    threads, vocab_size = model.machine.num_threads, model.config.vocab_size
    streamed = bytes_per_decode_token(
        model.bytes_per_token, model.kv_bytes_per_token, depth, generate_tokens
    )
    ours, idle = OurEngine(model, adapter), _IdleClock()
    pairs: list[_Pair] = []
    with ExitStack() as stack:
        peers: list[Peer] = []
        for name in names:
            progress(f"{name} loads the model")
            context = max(prompt_tokens, depth + generate_tokens)
            peer = Peer(name, model.path, num_threads=threads, context=context)
            peers.append(stack.enter_context(peer))
        opponents: list[Peer | None] = [*peers] or [None]
        progress("warming up")
        engines: list[_Engine] = [*peers, ours]
        for engine in engines:
            _warm_up(engine, token_ids(min(64, prompt_tokens), 0, vocab_size))
        model.machine.read_bandwidth(0)  # makes its buffer
        others = _OthersClock(peers)
        for repeat in range(repeats):
            prompt = token_ids(prompt_tokens, 2 * repeat + 1, vocab_size)
            answer = token_ids(depth + generate_tokens, 2 * repeat + 2, vocab_size)
            work = _Work(prompt, answer[:depth], answer[depth:])
            for opponent in opponents:
                told = f"repeat {repeat + 1} of {repeats}"
                progress(f"{told}, beside {opponent.kind.name}" if opponent else told)
                pairs.append(_run_pair(ours, opponent, work, model.machine, idle))
        others_cpu_share = others.share
    progress("")
    fractions = Spread.of([streamed * generate_tokens / p.ours.decode / p.bandwidth for p in pairs])
    return BenchResult(
        model=model.path.name,
        threads=threads,
        kv=model.kv,
        prompt_tokens=prompt_tokens,
        generate_tokens=generate_tokens,
        depth=depth,
        repeats=repeats,
        prefill_tokens_per_second=Spread.of([prompt_tokens / p.ours.prefill for p in pairs]),
        decode_tokens_per_second=Spread.of([generate_tokens / p.ours.decode for p in pairs]),
        bytes_per_decode_token=streamed,
        read_bandwidth_bytes_per_second=statistics.median(p.bandwidth for p in pairs),
        decode_fraction_of_bandwidth=fractions.median,
        decode_fraction_of_bandwidth_spread=fractions,
        idle_cpu_share=idle.share,
        others_cpu_share=others_cpu_share,
        peers=tuple(_peer_result(peer, pairs, prompt_tokens, generate_tokens) for peer in peers),
        host=describe_host(),
    )


def token_ids(count: int, seed: int, vocab_size: int) -> list[int]:
    """Random ids; the same for the same seed."""
    ids: list[int] = np.random.default_rng(seed).integers(vocab_size, size=count).tolist()
    return ids


@dataclass(frozen=True, slots=True)
class _Work:
    """What both engines of a pair do."""

    prompt: list[int]
    before: list[int]  # the context that decode starts from
    answer: list[int]  # fed one at a time


def _run_pair(
    ours: OurEngine, peer: Peer | None, work: _Work, machine: BenchMachine, idle: _IdleClock
) -> _Pair:
    """Prefill: the peer, ours; decode: the peer, ours between two probes of the bandwidth."""

    def turn(phase: Callable[[], float]) -> float:
        time.sleep(HANDOVER_SECONDS)
        return phase()

    theirs = None
    if peer is not None:
        with idle.running():
            prefill = turn(lambda: peer.prefill(work.prompt))
        our_prefill = turn(lambda: ours.prefill(work.prompt))
        with idle.running():
            theirs = _Turn(prefill, turn(lambda: peer.decode(work.before, work.answer)))
    else:
        our_prefill = turn(lambda: ours.prefill(work.prompt))
    time.sleep(HANDOVER_SECONDS)
    before = machine.read_bandwidth(PROBE_SECONDS)
    our_turn = _Turn(our_prefill, ours.decode(work.before, work.answer))
    bandwidth = (before + machine.read_bandwidth(PROBE_SECONDS)) / 2
    return _Pair(peer.kind.name if peer is not None else None, theirs, our_turn, bandwidth)


def _warm_up(engine: _Engine, tokens: list[int]) -> None:
    engine.prefill(tokens)
    engine.decode([], tokens[:4])


def _peer_result(
    peer: Peer, pairs: Sequence[_Pair], prompt_tokens: int, generate_tokens: int
) -> PeerResult:
    both = [(p.theirs, p.ours) for p in pairs if p.peer == peer.kind.name and p.theirs is not None]
    prefill = Spread.of([theirs.prefill / ours.prefill for theirs, ours in both])
    decode = Spread.of([theirs.decode / ours.decode for theirs, ours in both])
    return PeerResult(
        name=peer.kind.name,
        version=peer.version,
        prefill_tokens_per_second=Spread.of([prompt_tokens / t.prefill for t, _ in both]),
        decode_tokens_per_second=Spread.of([generate_tokens / t.decode for t, _ in both]),
        prefill_ratio=prefill.median,
        decode_ratio=decode.median,
        prefill_ratio_spread=prefill,
        decode_ratio_spread=decode,
        idle_cpu_share=peer.idle_cpu_seconds / max(peer.idle_seconds, 1e-9),
        details=peer.details,
    )


def _check(
    model: BenchModel, prompt_tokens: int, generate_tokens: int, depth: int, repeats: int
) -> None:
    for name, value, least in (
        ("prompt_tokens", prompt_tokens, 1),
        ("generate_tokens", generate_tokens, 1),
        ("depth", depth, 0),
        ("repeats", repeats, 1),
    ):
        if value < least:
            raise InvalidParameterError(f"{name} must be at least {least}, not {value}.")
    context = model.config.context_length
    longest = max(prompt_tokens, depth + generate_tokens)
    if longest > context:
        raise InvalidParameterError(
            f"the prompt, or the depth and the tokens to generate, take {longest} tokens, and the "
            f"context has {context}: ask for fewer, or load the model with a larger context."
        )
