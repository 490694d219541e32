"""`cyclewise serve` under load, in turns with llama.cpp's `llama-server`.

    python benchmarks/serve.py MODEL.gguf --llama-server PATH
    python benchmarks/serve.py MODEL.gguf --phases cost idle        # of ours alone

What is measured, each with a server that was started for it and is ended after it:

- `closed`: 16 clients that send their next request when the last is answered, in turns; output
  tokens a second of all together.
- `decode`: the same with prompts of 16 tokens and answers of 128, so that all decode.
- `rate`: requests come when the traces say (open loop). The highest mean rate at which the 95th
  percentile of the time to the first token stays below --bound is looked for by bisection, for
  each server. Then, in turns: both at llama-server's highest rate, and ours at 2.5 times that.
- `cost`: 16 streams of our server against the same engine without a server, in turns, in tokens a
  second; what the load generator took of the cores is not counted as the server's.
- `idle`: processor time of our server with nothing to do.

Requests are those of two public traces, an equal number of each: Azure's LLM inference trace 2023
(conversations) and Mooncake's (conversations; prompts share beginnings). `load.py` says how they
are scaled: a 16th of Azure's lengths, and of Mooncake's a 128th of the prompts' and a 16th of the
answers'. Texts are pieces of WikiText-2. Answers are greedy and go on until their number of tokens
is reached; each is checked for form and length.

Both servers have the same model, threads, slots and context: llama-server `-t N -tb N -np 16
-c 16 * 1024`, otherwise with its defaults; ours `--threads N --parallel 16 --context 1024`. Build
llama-server from the sources of llama-cpp-python, for this processor:

    pip download --no-binary :all: --no-deps llama-cpp-python==0.3.36 && tar xf llama_cpp_python-*
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -DGGML_NATIVE=ON -DLLAMA_CURL=OFF
    cmake --build build --target llama-server

Everything runs on one machine. `others` in a result is the share of its cores that neither the
server nor the generator used while it was measured: beyond 0.1 a figure says little. Writes
`results/serve-NAME.json`; phases that are not asked for stay as they are in it. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from batches import PROMPT_TOKENS
from load import (
    Call,
    Prompts,
    Run,
    Scale,
    Sent,
    arrivals,
    body_of,
    closed_loop,
    open_loop,
    read_traces,
)

from cyclewise.bench.bench import HANDOVER_SECONDS, Spread, token_ids
from cyclewise.bench.host import busy_seconds, describe_host
from cyclewise.bench.report import show_progress
from cyclewise.engine.engine import Engine, Request
from cyclewise.models import load_model
from cyclewise.text.tokenizer import Tokenizer
from cyclewise.weights.gguf import GGUFFile
from cyclewise.weights.sources import resolve

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
DATA = HERE / "../../shared/data"
TEXT = "wikitext-2/wikitext-2-raw-test.joined.txt"
VARIABLE = "CYCLEWISE_LLAMA_SERVER"
STREAMS = 16
CONTEXT = 1024  # of a slot
ANSWER_TOKENS = 128  # where only decoding counts
START_SECONDS = 120.0
ROUGH, FINE = 1.5, 1.15  # steps between rates: until one is too much, and at the end
PHASES = ("closed", "decode", "rate", "cost", "idle")


@dataclass(frozen=True, slots=True)
class Settings:
    """What all measurements have in common."""

    path: pathlib.Path
    threads: int
    llama_server: str | None
    seconds: float
    seed: int
    bound: float


class Server:
    """A server's process. A context manager."""

    def __init__(self, name: str, settings: Settings) -> None:
        """Start it, and wait until it answers."""
        self.name = name
        self.port = _free_port()
        threads, port = str(settings.threads), str(self.port)
        if name == "cyclewise":
            command = [
                sys.executable, "-m", "cyclewise", "serve", str(settings.path), "--port", port,
                "--threads", threads, "--parallel", str(STREAMS), "--context", str(CONTEXT),
                "--name", "model",
            ]  # fmt: skip
        else:
            assert settings.llama_server is not None
            command = [
                settings.llama_server, "-m", str(settings.path), "--port", port, "-t", threads,
                "-tb", threads, "-np", str(STREAMS), "-c", str(STREAMS * CONTEXT), "--no-webui",
                "-a", "model",
            ]  # fmt: skip
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while True:
            if self._process.poll() is not None or time.monotonic() > end:
                self._log.seek(0)
                said = self._log.read().decode(errors="replace")[-2000:]
                raise SystemExit(f"{self.name} did not begin to serve. It said:\n{said}")
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), 1) as connection,
            ):
                connection.sendall(b"GET /health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
                if b" 200 " in connection.recv(64):
                    return
            time.sleep(0.05)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it in order."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    @property
    def cpu_seconds(self) -> float:
        """Processor time of its process, and of those that it has started."""
        return sum(_cpu_seconds(pid) for pid in _family(self._process.pid))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _family(root: int) -> list[int]:
    found = [root]
    for parent in found:
        for thread in pathlib.Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, thread.read_text().split())
    return found


def _cpu_seconds(pid: int) -> float:
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Work:
    """The requests of all measurements, as bytes."""

    def __init__(self, settings: Settings, data: pathlib.Path, scale: Scale) -> None:
        if not (data / TEXT).exists():
            raise SystemExit(f"there is no {data / TEXT}: say with --data where the traces are")
        with GGUFFile(settings.path) as file:
            words = Tokenizer.from_metadata(file.metadata)
        self._scale, self._seed = scale, settings.seed
        self._words, self._text = words, (data / TEXT).read_text()[:400_000]
        self._traces = read_traces(data, scale, settings.seed)

    def _prompts(self) -> Prompts:
        return Prompts(self._words, self._text, self._scale, self._seed)

    def timed(self, rate: float, seconds: float) -> list[tuple[float, Sent]]:
        """Requests of the traces and their times."""
        prompts = self._prompts()
        return [
            (call.at, Sent(body_of("model", prompts.of(call), call.answer_tokens),
                           call.answer_tokens))
            for call in arrivals(self._traces, rate, seconds)
        ]  # fmt: skip

    def clients(self, each: int) -> list[list[Sent]]:
        """Requests of the traces, dealt out to 16 clients."""
        calls = arrivals(self._traces, each * STREAMS, 1.0)
        prompts = self._prompts()
        sent = [
            Sent(body_of("model", prompts.of(call), call.answer_tokens), call.answer_tokens)
            for call in calls
        ]
        return [sent[client::STREAMS] for client in range(STREAMS)]

    def streams(self, each: int) -> list[list[Sent]]:
        """Short prompts and long answers for 16 clients."""
        prompts = self._prompts()
        call = Call(0.0, PROMPT_TOKENS, ANSWER_TOKENS)
        return [
            [
                Sent(body_of("model", prompts.of(call), ANSWER_TOKENS), ANSWER_TOKENS)
                for _ in range(each)
            ]
            for _ in range(STREAMS)
        ]


@dataclass(frozen=True, slots=True)
class Load:
    """A run against a server, and who used the machine meanwhile."""

    run: Run
    server_cpu: float  # of the cores
    generator_cpu: float
    others: float | None


def load(server: Server, generator: Coroutine[Any, Any, Run]) -> Load:
    """Run the generator; shares are of all cores."""
    busy, cpu, begin = busy_seconds(), server.cpu_seconds, time.perf_counter()
    run = asyncio.run(generator)
    whole = (time.perf_counter() - begin) * (os.cpu_count() or 1)
    used, others = server.cpu_seconds - cpu, None
    now = busy_seconds()
    if busy is not None and now is not None:
        others = max(0.0, (now - busy - used - run.cpu_seconds) / whole)
    return Load(run, used / whole, run.cpu_seconds / whole, others)


def summary(found: Load) -> dict[str, Any]:
    """Figures of a run. Ends the program if an answer is not what it must be."""
    answers, run = found.run.answers(), found.run
    problems = [answer.problem for answer in answers if answer.problem]
    if problems:
        raise SystemExit(f"{len(problems)} answers are wrong, the first: {problems[0]}")
    waited = [(answer.first or run.end) - answer.start for answer in answers]
    gaps = np.concatenate([np.diff(answer.times) for answer in answers] or [[]])
    events = [at for answer in answers for at in answer.times if at <= run.end]
    seconds = run.end - run.begin
    ended = [answer for answer in answers if answer.tokens is not None]
    return {
        "requests": len(answers), "ended": len(ended), "seconds": seconds,
        "first_token_p50": _quantile(waited, 0.5), "first_token_p95": _quantile(waited, 0.95),
        "first_token_max": max(waited, default=None), "cut_short": run.cut_short,
        "between_tokens_p50": _quantile(gaps, 0.5), "between_tokens_p95": _quantile(gaps, 0.95),
        "prompt_tokens": sum(answer.prompt_tokens or 0 for answer in ended),
        "answer_tokens": sum(answer.tokens or 0 for answer in ended),
        "events_per_second": len(events) / seconds,
        "server_cpu": found.server_cpu, "generator_cpu": found.generator_cpu,
        "others": found.others,
    }  # fmt: skip


def _quantile(values: Any, place: float) -> float | None:
    return float(np.quantile(values, place)) if len(values) else None


def warm(server: Server, work: Work) -> None:
    """A request before those that count, so that nothing is done for the first time."""
    one = work.timed(1.0, 2.0)
    asyncio.run(open_loop(server.port, [(0.0, sent) for _, sent in one]))


def open_run(name: str, rate: float, settings: Settings, work: Work, *, search: bool) -> Any:
    """One run at a rate."""
    show_progress(f"{name} at {rate:.3g} requests/s")
    with Server(name, settings) as server:
        warm(server, work)
        calls = work.timed(rate, settings.seconds)
        give_up = settings.bound if search else None
        found = summary(load(server, open_loop(server.port, calls, give_up=give_up)))
    show_progress("")
    p95 = found["first_token_p95"]
    kept = not found["cut_short"] and p95 is not None and p95 < settings.bound
    print(
        f"  {name} at {rate:.3g}/s: P95 to the first token {p95:.2f} s"
        f"{' and more' if found['cut_short'] else ''}, others {found['others']:.0%}",
        flush=True,
    )
    return {"rate": rate, "kept": kept, **found}


def find_rate(name: str, start: float, settings: Settings, work: Work) -> dict[str, Any]:
    """The highest rate that a server sustains, and the runs that say so."""
    runs: list[dict[str, Any]] = []
    low, high, rate = 0.0, math.inf, start
    while high > FINE * low or not low:
        runs.append(open_run(name, rate, settings, work, search=True))
        if runs[-1]["kept"]:
            low = rate
        else:
            high = rate
        if math.isinf(high):
            rate = low * ROUGH
        elif not low:
            rate = high / ROUGH
        else:
            rate = math.sqrt(low * high)
    return {"sustained": low, "runs": runs}


def measure_rate(start: float, rounds: int, factor: float, settings: Settings, work: Work) -> Any:
    """Both servers' highest rates, and how they compare."""
    theirs = find_rate("llama-server", start, settings, work)
    rate = theirs["sustained"]
    ours = find_rate("cyclewise", factor * rate, settings, work)
    turns: dict[str, list[Any]] = {"llama-server": [], "cyclewise": [], "cyclewise x": []}
    for _ in range(rounds):
        for key, one in (
            ("llama-server", rate),
            ("cyclewise", rate),
            ("cyclewise x", factor * rate),
        ):
            turns[key].append(open_run(key.split()[0], one, settings, work, search=False))
    p95 = {key: [run["first_token_p95"] for run in runs] for key, runs in turns.items()}
    ratios = [a / b for a, b in zip(p95["cyclewise"], p95["llama-server"], strict=True)]
    return {
        "bound": settings.bound, "search": {"llama-server": theirs, "cyclewise": ours},
        "rate_ratio": ours["sustained"] / rate, "factor": factor, "turns": turns,
        "first_token_p95": {key: asdict(Spread.of(values)) for key, values in p95.items()},
        "first_token_ratio": asdict(Spread.of(ratios)),
    }  # fmt: skip


def measure_closed(what: str, rounds: int, settings: Settings, work: Work, names: list[str]) -> Any:
    """Output tokens a second of 16 clients, in turns."""
    turns: dict[str, list[Any]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            show_progress(f"{name}, 16 clients ({what})")
            with Server(name, settings) as server:
                warm(server, work)
                each = math.ceil(settings.seconds * 4)
                clients = work.clients(each) if what == "closed" else work.streams(8)
                found = summary(load(server, closed_loop(server.port, clients, settings.seconds)))
            show_progress("")
            print(
                f"  {name}, {what}: {found['events_per_second']:.0f} tokens/s, P95 to the first "
                f"token {found['first_token_p95']:.2f} s, others {found['others']:.0%}",
                flush=True,
            )
            turns[name].append(found)
    rates = {name: [run["events_per_second"] for run in runs] for name, runs in turns.items()}
    found = {
        "tokens_per_second": {name: asdict(Spread.of(each)) for name, each in rates.items()},
        "turns": turns,
    }
    if len(names) == 2:
        pairs = zip(rates["cyclewise"], rates["llama-server"], strict=True)
        found["ratio"] = asdict(Spread.of([ours / theirs for ours, theirs in pairs]))
    return found


def engine_rate(engine: Engine, seed: int) -> float:
    """Tokens a second of 16 sequences, one token each a step, behind short prompts."""
    sequences = [engine.new_sequence() for _ in range(STREAMS)]
    count = PROMPT_TOKENS + ANSWER_TOKENS
    ids = np.array(token_ids(STREAMS * count, seed, engine.vocab_size), np.int32)
    ids = ids.reshape(STREAMS, -1)
    for sequence, row in zip(sequences, ids, strict=True):
        sequence.reserve(count)
        engine.step([Request(sequence, row[:PROMPT_TOKENS], "none")])
    time.sleep(HANDOVER_SECONDS)
    begin = time.perf_counter()
    for at in range(PROMPT_TOKENS, count):
        pairs = zip(sequences, ids, strict=True)
        engine.step([Request(sequence, row[at : at + 1], "last") for sequence, row in pairs])
    seconds = time.perf_counter() - begin
    for sequence in sequences:
        engine.free(sequence)
    return STREAMS * ANSWER_TOKENS / seconds


def served_rate(run: Run) -> float:
    """Tokens a second while all 16 streams ran."""
    answers = run.answers()
    begin = max(answer.times[0] for answer in answers)
    end = min(answer.times[-1] for answer in answers)
    shares = [
        sum(begin < at <= end for at in answer.times) * (answer.tokens or 0) / len(answer.times)
        for answer in answers  # an event may hold more than one token, where a character does
    ]
    return sum(shares) / (end - begin)


def measure_cost(rounds: int, settings: Settings, work: Work) -> Any:
    """What serving takes from the engine's speed."""
    turns = []
    model = load_model(settings.path, context=STREAMS * CONTEXT, threads=settings.threads)
    engine = Engine(model)
    try:
        with Server("cyclewise", settings) as server:
            warm(server, work)
            for number in range(rounds):
                show_progress(f"cost, round {number + 1} of {rounds}")
                alone = engine_rate(engine, number)
                streams = work.streams(1)
                found = load(server, closed_loop(server.port, streams, 600.0))
                summary(found)
                served = served_rate(found.run)
                after = engine_rate(engine, number)
                left = 1 - found.generator_cpu
                cost = 1 - served / (left * (alone + after) / 2)
                turns.append({
                    "engine": [alone, after], "served": served, "cost": cost,
                    "generator_cpu": found.generator_cpu, "others": found.others,
                })  # fmt: skip
                show_progress("")
                print(
                    f"  engine {alone:.0f} and {after:.0f} tokens/s, served {served:.0f}, "
                    f"generator {found.generator_cpu:.1%} of the cores: costs {cost:.1%}, "
                    f"others {found.others:.0%}",
                    flush=True,
                )
    finally:
        model.close()
    return {"cost": asdict(Spread.of([turn["cost"] for turn in turns])), "turns": turns}


def measure_idle(settings: Settings, work: Work) -> Any:
    """Share of one core that a server uses with nothing to do."""
    with Server("cyclewise", settings) as server:
        warm(server, work)
        time.sleep(1)
        cpu = server.cpu_seconds
        time.sleep(30)
        share = (server.cpu_seconds - cpu) / 30
    print(f"  idle: {share:.2%} of a core")
    return {"share_of_a_core": share, "seconds": 30}


def measurements(
    arguments: argparse.Namespace, settings: Settings, work: Work
) -> Iterator[tuple[str, Any]]:
    names = ["llama-server", "cyclewise"] if settings.llama_server else ["cyclewise"]
    rounds = arguments.rounds
    for phase in arguments.phases:
        print(f"{settings.path.name}, {phase}", flush=True)
        if phase in ("closed", "decode"):
            yield phase, measure_closed(phase, rounds, settings, work, names)
        elif phase == "rate":
            if settings.llama_server is None:
                raise SystemExit(f"rate needs llama-server: give --llama-server or {VARIABLE}")
            yield phase, measure_rate(arguments.start, rounds, 2.5, settings, work)
        elif phase == "cost":
            yield phase, measure_cost(rounds, settings, work)
        else:
            yield phase, measure_idle(settings, work)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument(
        "--llama-server", default=os.environ.get(VARIABLE), help=f"its path (${VARIABLE})"
    )
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of turns (3)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a run (60)")
    parser.add_argument("--bound", type=float, default=2.0, help="on P95 to the first token (2 s)")
    parser.add_argument("--start", type=float, default=1.0, help="rate tried first (1/s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=pathlib.Path, default=DATA, help="where the traces are")
    arguments = parser.parse_args()
    settings = Settings(
        resolve(arguments.model), arguments.threads, arguments.llama_server, arguments.seconds,
        arguments.seed, arguments.bound,
    )  # fmt: skip
    scale = Scale()
    work = Work(settings, arguments.data, scale)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"serve-{settings.path.stem}.json"
    for phase, found in measurements(arguments, settings, work):
        result = json.loads(file.read_text()) if file.exists() else {}
        result[phase] = {
            "model": settings.path.name, "threads": settings.threads, "streams": STREAMS,
            "context": CONTEXT, "run_seconds": settings.seconds, "seed": settings.seed,
            "scale": asdict(scale), **found, "host": describe_host(),
        }  # fmt: skip
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
