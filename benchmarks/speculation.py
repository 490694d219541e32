"""What guessing tokens gains, in turns with plain decoding: passages to rewrite with one word
changed, and general prompts, where it must cost next to nothing.

    python benchmarks/speculation.py qwen.gguf --text ../shared/data
    python benchmarks/speculation.py smollm2 --what general

Each answer is generated with and without guesses, in turns, greedily; the texts must be the same,
token for token. Figures are decode times; the prompts are in `benchmarks/prompts`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from cyclewise import LLM, SamplingParams
from cyclewise.bench.host import describe_host

HERE = Path(__file__).parent


def rewrites(data: Path) -> list[str]:
    chosen = json.loads((HERE / "prompts/rewrite.json").read_text())
    text = (data / chosen["text"]).read_text(encoding="utf-8")
    prompts = []
    for passage in chosen["passages"]:
        start = passage["start"]
        body = text[start : start + passage["characters"]]
        task = f'Rewrite this text exactly as it is, but change the word "{passage["word"]}" to '
        prompts.append(f'{task}"{passage["instead"]}":\n\n{body}')
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--what", choices=("rewrite", "general"), default="rewrite")
    parser.add_argument("--text", type=Path, default=Path("../shared/data"))
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--limit", type=int, help="Prompts to take.")
    parser.add_argument("--rounds", type=int, default=1, help="Turns of each prompt.")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--draft")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--json", type=Path, help="Where to write the figures.")
    options = parser.parse_args()
    if options.what == "rewrite":
        prompts = rewrites(options.text)
    else:
        prompts = json.loads((HERE / "prompts/general.json").read_text())
    params = SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens, seed=1)
    llm = LLM(options.model, threads=options.threads, draft=options.draft)
    rows = []
    for prompt in prompts[: options.limit]:
        messages = [{"role": "user", "content": prompt}]
        seconds: dict[bool, list[float]] = {False: [], True: []}
        results = {}
        for turn in range(options.rounds):
            for guessing in (True, False) if (len(rows) + turn) % 2 else (False, True):
                llm.speculate = guessing
                results[guessing] = found = llm.chat(messages, params)
                seconds[guessing].append(found.generated_tokens / found.decode_tokens_per_second)
        slow, fast = results[False], results[True]
        if slow.token_ids != fast.token_ids:
            raise SystemExit(f"the answers differ: {slow.text!r} and {fast.text!r}")
        plain, guessing_ = (statistics.median(seconds[guessing]) for guessing in (False, True))
        rows.append(
            {
                "tokens": slow.generated_tokens,
                "plain_seconds": plain,
                "guessing_seconds": guessing_,
                "ratio": plain / guessing_,
                "guessed": fast.guessed_tokens,
                "accepted": fast.accepted_tokens,
            }
        )
        print(
            f"{slow.generated_tokens:4} tokens: {slow.generated_tokens / plain:6.1f} -> "
            f"{slow.generated_tokens / guessing_:6.1f} tok/s, x {plain / guessing_:.2f}; "
            f"{fast.accepted_tokens} of {fast.guessed_tokens} came true",
            flush=True,
        )
    ratios = [row["ratio"] for row in rows]
    total = sum(r["plain_seconds"] for r in rows) / sum(r["guessing_seconds"] for r in rows)
    print(
        f"median x {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"all together x {total:.3f}"
    )
    if options.json:
        found = {"model": Path(options.model).name, "what": options.what, "draft": options.draft}
        found |= {"host": describe_host(), "threads": llm.model.machine.num_threads}
        found |= {"temperature": options.temperature, "rounds": options.rounds}
        found |= {"median": statistics.median(ratios), "together": total, "answers": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
