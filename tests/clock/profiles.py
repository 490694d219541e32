"""A synthetic profile with every field filled: a model of the size of SmolLM2 on two threads.

Tests of pictures draw it. Its sums hold: in each phase the moments and what is unaccounted add up
to the wall, and so does every account.
"""

from __future__ import annotations

import random
from typing import Any

HIDDEN, FEED_FORWARD, VOCABULARY, KV_WIDTH = 576, 1536, 49152, 192
CORE_HERTZ, TICKS_PER_SECOND = 3.55e9, 2.445e9
UNACCOUNTED = 0.006
PROMPT_TOKENS, GENERATE_TOKENS, REPEATS, THREADS = 512, 64, 5, 2

LAYER_MOMENTS = (
    "attention.norm",
    "attention.qkv.quantize",
    "attention.qkv",
    "attention.rope",
    "attention.attend",
    "attention.output.quantize",
    "attention.output",
    "ffn.norm",
    "ffn.gate_up.quantize",
    "ffn.gate_up",
    "ffn.down.quantize",
    "ffn.down",
)
_MATRICES = {
    "attention.qkv": (HIDDEN + 2 * KV_WIDTH, HIDDEN),
    "attention.output": (HIDDEN, HIDDEN),
    "ffn.gate_up": (2 * FEED_FORWARD, HIDDEN),
    "ffn.down": (HIDDEN, FEED_FORWARD),
    "output": (VOCABULARY, HIDDEN),
}
_HOST = {
    "prefill": {"template": 91_000, "tokenizing": 420_000, "scheduling": 64_000},
    "decode": {
        "scheduling": 31_000, "sampling": 186_000, "detokenizing": 12_000, "writing": 9_000
    },
}  # fmt: skip


def make_profile(num_layers: int = 30, name: str = "smollm2", seed: int = 1) -> dict[str, Any]:
    """A profile with all optional sections, different at every seed."""
    noise = random.Random(seed)
    names = ["embed"]
    names += [f"layers.{n}.{moment}" for n in range(num_layers) for moment in LAYER_MOMENTS]
    names += ["output.norm", "output.quantize", "output"]
    moments = [_moment(each, phase, noise) for phase in ("prefill", "decode") for each in names]
    for phase, stages in _HOST.items():
        moments += [_host_stage(each, phase, cycles, noise) for each, cycles in stages.items()]
    phases = {phase: _phase(moments, phase) for phase in ("prefill", "decode")}
    decode = phases["decode"]["cycles"]
    token_seconds = decode / CORE_HERTZ
    weight_bytes = sum(m["weight_bytes"] for m in moments if m["phase"] == "decode")
    return {
        "schema": "cyclewise.profile",
        "schema_version": 1,
        "model": {
            "name": name, "file": f"{name}.gguf", "architecture": "llama", "layers": num_layers,
            "hidden_size": HIDDEN, "vocab_size": VOCABULARY, "bytes_per_token": weight_bytes,
            "kv_bytes_per_token": 4 * KV_WIDTH * num_layers,
            "formats": {"Q4_1": weight_bytes - 11_000_000, "F32": 11_000_000},
        },
        "settings": {
            "prompt_tokens": PROMPT_TOKENS, "generate_tokens": GENERATE_TOKENS, "batch": 1,
            "threads": THREADS, "repeats": REPEATS,
        },
        "host": {
            "cpu": "AMD EPYC 7763 64-Core Processor (family 25, model 1)", "cores": 2,
            "target": "avx2", "system": "Linux 6.1.0", "python": "3.11.2",
            "packages": {"cyclewise": "0.1.0", "llvmlite": "0.50.0", "numpy": "2.4.6"},
            "commit": "0123abc", "date": "2026-11-24T09:30:00+00:00", "load_average": 0.4,
        },
        "clock_source": "tsc+chain",
        "clock_error_fraction": 0.004,
        "clock": {
            "ticks_per_second": TICKS_PER_SECOND, "core_hertz": CORE_HERTZ,
            "core_hertz_low": 0.996 * CORE_HERTZ, "core_hertz_high": 1.004 * CORE_HERTZ,
            "read_cost_seconds": 9.5e-9, "counts_cycles": True,
            "notes": ["The processor's event counters are not visible in this virtual machine."],
        },
        "overhead_fraction": 0.0029,
        "unaccounted_fraction": UNACCOUNTED,
        "cycles_per_token": decode,
        "tokens_per_second": 1 / token_seconds,
        "limit_fraction": phases["decode"]["limit_fraction"],
        "tokens_per_second_spread": _spread(1 / token_seconds, 0.02),
        "time_to_first_token": _spread(phases["prefill"]["cycles"] / CORE_HERTZ, 0.03),
        "time_per_token": _spread(token_seconds, 0.02),
        "prefill": {
            "tokens_per_second": PROMPT_TOKENS * CORE_HERTZ / phases["prefill"]["cycles"],
            **phases["prefill"],
        },
        "decode": phases["decode"],
        "moments": moments,
        "accounts": _accounts(moments, phases),
        "tokens": _tokens(decode, noise),
        "timeline": _timeline(moments, names),
        "roofs": _roofs(),
        "growth": _growth(noise),
        "whatif": _whatif(token_seconds, phases["prefill"]["cycles"] / CORE_HERTZ),
        "advice": [
            {
                "change": "q4_0", "gain_fraction": 0.093, "low": 0.07, "high": 0.12,
                "sentence": "Store the weights as Q4_0: a token then streams 10 % fewer bytes.",
            },
            {
                "change": "kv=int8", "gain_fraction": 0.018, "low": 0.01, "high": 0.03,
                "sentence": "Keep keys and values as 8-bit integers; it pays from 2,000 tokens on.",
            },
        ],
        "provenance": {
            "cycles": "derived from ticks of the time-stamp counter and a chain of dependent adds",
            "time": "measured in ticks of the time-stamp counter",
            "operations": "derived in closed form from the program",
            "bytes": "derived in closed form from the program",
            "limit_cycles": "modelled: closed forms divided by the measured roofs",
            "roofs": "measured on this machine",
            "growth": "measured; the laws are fitted",
            "whatif": "modelled from the program and the measured roofs",
        },
    }  # fmt: skip


def without_optional(profile: dict[str, Any]) -> dict[str, Any]:
    """The same profile where nothing beyond the moments was measured."""
    empty: dict[str, Any] = {
        "growth": [], "whatif": [], "advice": [], "tokens": [], "accounts": [], "provenance": {},
        "timeline": None,
    }  # fmt: skip
    return {**profile, **empty}


def _spread(value: float, width: float) -> dict[str, float]:
    return {"median": value, "min": value * (1 - width), "max": value * (1 + width)}


def _moment(name: str, phase: str, noise: random.Random) -> dict[str, Any]:
    kind = name.split(".", 2)[2] if name.startswith("layers.") else name
    tokens = PROMPT_TOKENS if phase == "prefill" else 1
    of_logits = kind.startswith("output")
    rows = 1 if of_logits else tokens
    unit, weight_bytes, kv_bytes = "fma", 0, 0
    if kind in _MATRICES:
        num_rows, columns = _MATRICES[kind]
        group, unit = "matmul", "dot"
        operations = 2 * num_rows * columns * rows
        weight_bytes = num_rows * columns * 5 // 8
        activation_bytes = 4 * (num_rows + columns) * rows
    elif kind == "attention.attend":
        keys = tokens / 2 if phase == "prefill" else PROMPT_TOKENS + GENERATE_TOKENS / 2
        group, operations = "activation", int(4 * HIDDEN * keys * tokens)
        kv_bytes = int(4 * KV_WIDTH * (tokens if phase == "prefill" else keys))
        activation_bytes = 8 * HIDDEN * tokens
    elif kind in ("embed", "attention.rope"):
        group, operations = "memory", 0 if kind == "embed" else 6 * (HIDDEN + KV_WIDTH) * rows
        kv_bytes = 0 if kind == "embed" else 4 * KV_WIDTH * rows
        activation_bytes = 8 * HIDDEN * rows
    else:
        width = FEED_FORWARD if kind == "ffn.down.quantize" else HIDDEN
        group, operations, activation_bytes = "activation", 4 * width * rows, 8 * width * rows
    num_bytes = weight_bytes + kv_bytes + activation_bytes
    rate = {"dot": 236e9, "fma": 98e9}[unit] * (2 if phase == "prefill" or weight_bytes else 1)
    of_operations = operations / rate
    of_bytes = (weight_bytes + kv_bytes) / 18.2e9 + activation_bytes / 150e9
    limit = CORE_HERTZ * max(of_operations, of_bytes)
    share = {"matmul": 0.74, "activation": 0.4, "memory": 0.3}[group]
    if kind in ("ffn.down", "attention.attend"):
        share -= 0.14
    total = limit / (share * noise.uniform(0.9, 1.1)) + 300
    waiting = total * noise.uniform(0.0, 0.09)
    return {
        "name": name, "class": group, "phase": phase,
        "cycles": total - waiting, "waiting_cycles": waiting,
        "operations": operations, "bytes": num_bytes, "weight_bytes": weight_bytes,
        "kv_bytes": kv_bytes, "activation_bytes": activation_bytes, "unit": unit,
        "limit_cycles": limit, "limit_fraction": limit / total,
        "bound": "operations" if of_operations > of_bytes else "bytes",
        "samples": [total * noise.uniform(0.97, 1.03) for _ in range(REPEATS)],
        "provenance": "measured",
    }  # fmt: skip


def _host_stage(name: str, phase: str, cycles: int, noise: random.Random) -> dict[str, Any]:
    total = cycles * noise.uniform(0.95, 1.05)
    return {
        "name": name, "class": "host", "phase": phase, "cycles": total, "waiting_cycles": 0.0,
        "operations": 0, "bytes": 0, "weight_bytes": 0, "kv_bytes": 0, "activation_bytes": 0,
        "unit": None, "limit_cycles": None, "limit_fraction": None, "bound": None,
        "samples": [total * noise.uniform(0.9, 1.1) for _ in range(REPEATS)],
        "provenance": "measured",
    }  # fmt: skip


def _phase(moments: list[dict[str, Any]], phase: str) -> dict[str, float]:
    chosen = [moment for moment in moments if moment["phase"] == phase]
    accounted = sum(moment["cycles"] + moment["waiting_cycles"] for moment in chosen)
    cycles = accounted / (1 - UNACCOUNTED)
    limit = sum(moment["limit_cycles"] or 0.0 for moment in chosen)
    return {"cycles": cycles, "limit_cycles": limit, "limit_fraction": limit / cycles}


def _accounts(
    moments: list[dict[str, Any]], phases: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    accounts = []
    for phase, times in (("prefill", REPEATS), ("decode", REPEATS * GENERATE_TOKENS)):
        chosen = [moment for moment in moments if moment["phase"] == phase]
        work = times * sum(m["cycles"] for m in chosen if m["class"] != "host")
        waiting = times * sum(m["waiting_cycles"] for m in chosen)
        python = times * sum(m["cycles"] for m in chosen if m["class"] == "host")
        wall = times * phases[phase]["cycles"]
        for thread in range(THREADS):
            moved = (0.01 if thread else -0.01) * work
            accounts.append(
                {
                    "thread": thread, "phase": phase, "moments": work - moved,
                    "waiting": waiting + moved, "python": python,
                    "unaccounted": wall - work - waiting - python, "wall": wall,
                }
            )  # fmt: skip
    return accounts


def _tokens(cycles: float, noise: random.Random) -> list[dict[str, Any]]:
    tokens = []
    for index in range(REPEATS * GENERATE_TOKENS):
        at = cycles * (0.985 + 0.03 * (index % GENERATE_TOKENS) / GENERATE_TOKENS)
        outlier = index in (37, 121, 290)
        at *= noise.uniform(1.3, 2.1) if outlier else noise.gauss(1, 0.006)
        reason = "another process ran on thread 1's core" if index == 121 else None
        tokens.append({"index": index, "cycles": at, "outlier": outlier, "reason": reason})
    return tokens


def _timeline(moments: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    decode = {m["name"]: m for m in moments if m["phase"] == "decode"}
    threads: list[list[list[float]]] = [[] for _ in range(THREADS)]
    at = 0.0
    for index, name in enumerate(names):
        total = decode[name]["cycles"] + decode[name]["waiting_cycles"]
        for thread in range(THREADS):
            waits = (index + thread) % THREADS == 0
            wait = 2 * decode[name]["waiting_cycles"] if waits else 0.0
            threads[thread].append([at, total - wait, wait])
        at += total
    ratio = CORE_HERTZ / TICKS_PER_SECOND
    return {"phase": "decode", "ticks_to_cycles": ratio, "threads": threads}


def _roofs() -> dict[str, Any]:
    def level(name: str, num_bytes: int, cores: int, one: float, two: float) -> dict[str, Any]:
        scaling = [[1, one], [2, two]]
        return {"name": name, "num_bytes": num_bytes, "cores": cores, "bytes_per_second": scaling}

    return {
        "core_hertz": CORE_HERTZ,
        "levels": [
            level("L1", 32 << 10, 1, 212e9, 424e9),
            level("L2", 512 << 10, 1, 104e9, 207e9),
            level("L3", 32 << 20, 2, 61e9, 96e9),
            level("memory", 0, 2, 14.1e9, 18.2e9),
        ],
        "operations_per_second": {
            "dot": [[1, 236e9], [2, 471e9]],
            "fma": [[1, 98e9], [2, 196e9]],
        },
        "instructions": {"dot": "VPMADDUBSW", "fma": "VFMADD231PS"},
        "handover_seconds": 1.4e-7,
        "memory_bytes_per_second_within_run": 17.6e9,
        "threads": THREADS,
    }


def _growth(noise: random.Random) -> list[dict[str, Any]]:
    laws = [
        ("total", None, "prefill", "prompt_tokens", {"n": 1.4e6, "n^2": 410.0}),
        ("total", None, "decode", "context", {"1": 1.55e7, "n": 2900.0}),
        ("layers.*.attention.attend", "activation", "prefill", "prompt_tokens",
         {"n": 9e3, "n^2": 402.0}),
        ("layers.*.attention.attend", "activation", "decode", "context",
         {"1": 3.1e4, "n": 2850.0}),
        ("layers.*.ffn.gate_up", "matmul", "prefill", "prompt_tokens", {"1": 2e6, "n": 5.1e5}),
        ("layers.*.ffn.down", "matmul", "prefill", "prompt_tokens", {"1": 1e6, "n": 2.9e5}),
        ("output", "matmul", "decode", "context", {"1": 3.4e6}),
    ]  # fmt: skip
    return [_law(noise, *law) for law in laws]


def _law(
    noise: random.Random, name: str, group: str | None, phase: str, variable: str,
    terms: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    powers = {"1": 0, "n": 1, "n^2": 2}
    points = []
    for index, x in enumerate((32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)):
        fitted = sum(scale * x ** powers[form] for form, scale in terms.items())
        cycles = fitted * noise.gauss(1, 0.015)
        points.append({"x": x, "cycles": cycles, "fitted": fitted, "held_out": index % 3 == 1})
    errors = sorted(abs(p["cycles"] / p["fitted"] - 1) for p in points if p["held_out"])
    return {
        "name": name, "class": group, "phase": phase, "variable": variable,
        "law": " + ".join(f"{c:.3g}" + ("" if f == "1" else f" {f}") for f, c in terms.items()),
        "terms": [{"form": form, "coefficient": scale} for form, scale in terms.items()],
        "points": points, "median_error": errors[len(errors) // 2], "provenance": "measured",
    }  # fmt: skip


def _whatif(token: float, prompt: float) -> list[dict[str, Any]]:
    def band(value: float, width: float) -> dict[str, float]:
        return {"value": value, "low": value * (1 - width), "high": value * (1 + width)}

    changes = (
        ("threads=1", "one thread instead of two", 1.29, 1.96, 0.05),
        ("q4_0", "all matrices as Q4_0", 0.907, 0.98, 0.03),
        ("q8_0", "all matrices as Q8_0", 1.62, 1.31, 0.06),
        ("kv=int8", "keys and values as 8-bit integers", 0.982, 1.0, 0.02),
        ("bandwidth=2", "memory twice as fast", 0.61, 0.99, 0.08),
    )
    return [
        {
            "change": change, "meaning": meaning,
            "time_to_first_token": band(prompt * of_prompt, width),
            "time_per_token": band(token * of_token, width),
            "tokens_per_second": band(1 / (token * of_token), width),
            "gain_fraction": 1 / of_token - 1, "provenance": "modelled",
        }
        for change, meaning, of_token, of_prompt, width in changes
    ]  # fmt: skip
