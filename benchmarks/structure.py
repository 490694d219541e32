"""What following a structure costs a token, in turns with plain decoding of as many tokens.

    python benchmarks/structure.py qwen.gguf

Guessing is off on both sides. A plain answer goes on after the end of the model's turn, so that
both sides run as many steps over as many tokens of context.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from cyclewise import LLM, SamplingParams
from cyclewise.bench.host import describe_host

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mail": {"type": "string", "pattern": "^[a-z.]+@[a-z]+[.](com|org)$"},
        "about": {"type": "string"},
    },
    "required": ["name", "age", "mail", "about"],
    "additionalProperties": False,
}
STRUCTURES: dict[str, dict[str, Any]] = {
    "any JSON": {"json_schema": {"type": "array", "minItems": 200}},
    "people": {"json_schema": {"type": "array", "items": PERSON, "minItems": 200}},
    "one long string": {"json_schema": {"type": "string", "minLength": 5000}},
    "regex": {"regex": "([A-Z][a-z]+( [a-z]+){2,12}[.?!]\n){200}"},
    "grammar": {
        "grammar": 'start: line+\nline: /[a-z]+/ "=" sum ";\\n"\nsum: N ("+" N)*\nN: /[0-9]+/'
    },
}
PROMPT = "Write a list of people with name, age, mail address and something about them, as JSON."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--what", choices=STRUCTURES, action="append")
    parser.add_argument("--json", type=Path, help="Where to write the figures.")
    options = parser.parse_args()
    messages = [{"role": "user", "content": PROMPT}]
    rows = []
    with LLM(options.model, threads=options.threads, speculate=False) as llm:
        for name in options.what or STRUCTURES:
            for sampling in ({"temperature": 0.0}, {"seed": 1}):
                limit = {"max_tokens": options.tokens, **sampling}
                plain = SamplingParams(ignore_eos=True, **limit)
                structured = SamplingParams(**STRUCTURES[name], **limit)
                costs = []
                for turn in range(options.rounds + 1):
                    order = (plain, structured) if turn % 2 else (structured, plain)
                    rates = {}
                    for params in order:
                        result = llm.chat(messages, params)
                        assert result.generated_tokens == options.tokens, (name, result.text)
                        rates[params is structured] = result.decode_tokens_per_second
                    costs.append(rates[False] / rates[True] - 1)
                costs = costs[1:]  # the first warms up
                row = {
                    "structure": name,
                    "sampling": "greedy" if "temperature" in sampling else "sampled",
                    "cost": statistics.median(costs),
                    "least": min(costs),
                    "most": max(costs),
                    "plain_tokens_per_second": rates[False],
                }
                rows.append(row)
                print(
                    f"{name:16} {row['sampling']:8} {row['cost']:+.1%} ({row['least']:+.1%} to "
                    f"{row['most']:+.1%}) of a token at {rates[False]:.0f} tok/s",
                    flush=True,
                )
    if options.json:
        found = {"model": Path(options.model).name, "tokens": options.tokens, "rows": rows}
        found |= {"threads": options.threads, "host": describe_host()}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
