"""The program that runs inside a peer's own interpreter and drives the peer for the benchmarks.

`peers.py` starts it by its path, because Cyclewise need not be installed beside the peer; so it
imports the standard library and the peer alone. In come requests, one JSON object a line, on
standard input; out goes one JSON object a line on what standard output was at the start. (Standard
output itself is pointed at standard error, since the libraries print to it.) Every time is taken
around the peer's own work, not around the pipe.

Requests: `load`, `prefill`, `decode`, `logits`; see the classes below for their fields. An answer
 holds either the result or `{"error": sentence}`, and in `cpu_seconds` the processor time
that this process had used when the request came and when its work was done: what lies between two
requests is what the peer uses while it should be idle.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

MICRO_BATCH = 512


class Refused(Exception):
    """The peer cannot do this; the message is the peer's own words."""


class LlamaCpp:
    """llama.cpp through its C interface, so that none of its Python wrapper is timed.

    Flash attention is left to the library or switched off, whichever is faster here: both are timed
    at load, for prefill and for decode, and each phase keeps its winner. That is kinder to the peer
    than any one setting of it. At a few hundred tokens, that is; who measures long contexts asks
    for flash attention, and gets it in both.
    """

    AUTOMATIC, OFF, ON = -1, 0, 1
    LOG_LEVEL_WARN = 3

    def __init__(self) -> None:
        self.api: Any = importlib.import_module("llama_cpp.llama_cpp")
        self.words: list[str] = []
        self._log = self.api.llama_log_callback(self._keep_words)
        self.api.llama_log_set(self._log, None)
        self.contexts: dict[str, Any] = {}

    def _keep_words(self, level: int, text: bytes, _: object) -> None:
        # Dots of progress are no words.
        if level in (self.LOG_LEVEL_WARN, self.LOG_LEVEL_WARN + 1) and text.strip(b". \n"):
            self.words = [*self.words, text.decode("utf-8", "replace").strip()][-4:]

    def load(
        self, model: str, threads: int, context: int, flash_attention: bool = False
    ) -> dict[str, Any]:
        api = self.api
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(
            model.encode(), api.llama_model_default_params()
        )
        if not self.model:
            raise Refused("; ".join(self.words) or "the model could not be loaded")
        self.vocab_size = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model)))
        self.threads = threads
        self.batch = api.llama_batch_init(MICRO_BATCH, 0, 1)
        settings = {"on": self.ON} if flash_attention else {
            "automatic": self.AUTOMATIC, "off": self.OFF,
        }  # fmt: skip
        contexts = {name: self._new_context(context, each) for name, each in settings.items()}
        self._choose(contexts, min(256, context))
        return {
            "version": importlib.metadata.version("llama-cpp-python"),
            "vocab_size": self.vocab_size,
            "flash_attention": self.chosen,
            "system": api.llama_print_system_info().decode(),
        }

    def _choose(self, settings: dict[str, Any], num_tokens: int) -> None:
        """The fastest context for each phase, on so many tokens; the others are freed."""
        trial = [index * 37 % self.vocab_size for index in range(num_tokens)]
        self.chosen: dict[str, str] = {}
        for phase, timed in (
            ("prefill", functools.partial(self._prefill, tokens=trial)),
            ("decode", functools.partial(self._decode, before=[], tokens=trial[:16])),
        ):
            for handle in settings.values():
                self._decode(handle, [], trial[:4])
            best = {name: min(timed(c), timed(c)) for name, c in settings.items()}
            self.chosen[phase] = min(best, key=lambda name: best[name])
            self.contexts[phase] = settings[self.chosen[phase]]
        for name, handle in settings.items():
            if name not in self.chosen.values():
                self.api.llama_free(handle)

    def _new_context(self, context: int, flash_attention: int) -> Any:
        parameters = self.api.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_batch = parameters.n_ubatch = MICRO_BATCH
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.flash_attn_type = flash_attention
        parameters.no_perf = True
        handle = self.api.llama_init_from_model(self.model, parameters)
        if not handle:
            raise Refused("; ".join(self.words) or "the context could not be made")
        return handle

    def _forget(self, context: Any) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(context), False)

    def _evaluate(self, context: Any, tokens: list[int], position: int, every: bool) -> None:
        """Appends at most MICRO_BATCH tokens; logits of every one of them, or of the last alone."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = every or index == len(tokens) - 1
        status = self.api.llama_decode(context, batch)
        if status != 0:
            raise Refused(f"llama_decode returned {status}: {'; '.join(self.words)}")

    def _prefill(self, context: Any, tokens: list[int]) -> float:
        self._forget(context)
        start = time.perf_counter()
        for position in range(0, len(tokens), MICRO_BATCH):
            self._evaluate(context, tokens[position : position + MICRO_BATCH], position, False)
        self.api.llama_synchronize(context)
        return time.perf_counter() - start

    def _decode(self, context: Any, before: list[int], tokens: list[int]) -> float:
        self._prefill(context, before)
        start = time.perf_counter()
        for index, token in enumerate(tokens):
            self._evaluate(context, [token], len(before) + index, True)
            self.api.llama_synchronize(context)
        return time.perf_counter() - start

    def prefill(self, tokens: list[int]) -> dict[str, Any]:
        return {"seconds": self._prefill(self.contexts["prefill"], tokens)}

    def decode(self, before: list[int], tokens: list[int]) -> dict[str, Any]:
        return {"seconds": self._decode(self.contexts["decode"], before, tokens)}

    def logits(self, tokens: list[int], path: str) -> dict[str, Any]:
        """Writes the logits after every token to `path`, as float32 (tokens, vocab_size)."""
        context = self.contexts["prefill"]
        self._forget(context)
        row_bytes = self.vocab_size * ctypes.sizeof(ctypes.c_float)
        with open(path, "wb") as file:
            for position in range(0, len(tokens), MICRO_BATCH):
                part = tokens[position : position + MICRO_BATCH]
                self._evaluate(context, part, position, True)
                for index in range(len(part)):
                    row = self.api.llama_get_logits_ith(context, index)
                    file.write(ctypes.string_at(row, row_bytes))
        return {"rows": len(tokens), "columns": self.vocab_size}


class OpenVINO:
    """OpenVINO GenAI reading the same GGUF file; the times are those of its own `perf_metrics`."""

    def load(self, model: str, threads: int, context: int) -> dict[str, Any]:
        self.genai: Any = importlib.import_module("openvino_genai")
        self.openvino: Any = importlib.import_module("openvino")
        try:
            self.pipe = self.genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise Refused("; ".join(lines[-2:])) from None
        return {"version": importlib.metadata.version("openvino-genai")}

    def _generate(self, tokens: list[int], count: int) -> Any:
        numpy: Any = importlib.import_module("numpy")
        ids = numpy.array([tokens], dtype=numpy.int64)
        inputs = self.genai.TokenizedInputs(
            self.openvino.Tensor(ids), self.openvino.Tensor(numpy.ones_like(ids))
        )
        config = self.genai.GenerationConfig()
        config.max_new_tokens = count
        config.ignore_eos = True
        config.do_sample = False
        result = self.pipe.generate(inputs, config)
        if len(result.tokens[0]) != count:
            raise Refused(f"it generated {len(result.tokens[0])} tokens, not {count}")
        return result.perf_metrics

    def prefill(self, tokens: list[int]) -> dict[str, Any]:
        return {"seconds": self._generate(tokens, 1).get_ttft().mean / 1000}

    def decode(self, before: list[int], tokens: list[int]) -> dict[str, Any]:
        """It chooses its own tokens, and needs one to begin with: the first of `tokens`."""
        metrics = self._generate([*before, tokens[0]], len(tokens) + 1)
        return {"seconds": metrics.get_tpot().mean / 1000 * len(tokens)}


def serve(peer: Any, lines: Any, answer: Callable[[dict[str, Any]], None]) -> None:
    """Answers one request a line until the end of the input."""
    for line in lines:
        request = json.loads(line)
        command = request.pop("command")
        before = time.process_time()
        try:
            result = getattr(peer, command)(**request)
        except Refused as error:
            result = {"error": str(error)}
        except Exception as error:  # whatever it is, the parent says it in its own error
            result = {"error": f"{type(error).__name__}: {error}"}
        answer({**result, "cpu_seconds": [before, time.process_time()]})


def main() -> None:
    """Serves the peer named on the command line."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peers = {"llama.cpp": LlamaCpp, "openvino": OpenVINO}

    def answer(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")

    serve(peers[sys.argv[1]](), sys.stdin, answer)


if __name__ == "__main__":
    main()
