"""The clock's commands: profile, diff, complexity, whatif, validate.

`cli.py` registers them; everything heavy is imported inside.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cyclewise.errors import InvalidParameterError
from cyclewise.options import KV, AsJson, Context, ModelName, Quantize, Threads, load, print_json

if TYPE_CHECKING:
    from cyclewise.clock.run import Settings
    from cyclewise.machine.profile import MachineProfile
    from cyclewise.models import Model

PromptTokens = Annotated[
    int, typer.Option("--prompt-tokens", metavar="N", help="Tokens of each prompt.")
]
GenerateTokens = Annotated[
    int, typer.Option("--generate-tokens", metavar="M", help="Tokens of each answer.")
]
Batch = Annotated[int, typer.Option("--batch", metavar="B", help="Sequences at once.")]
Recalibrate = Annotated[
    bool,
    typer.Option("--recalibrate", help="Measure this computer again, not only the first time."),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    for command in (profile, diff, complexity, whatif, validate):
        app.command()(command)


def profile(
    model: ModelName,
    prompt_tokens: PromptTokens = 512,
    generate_tokens: GenerateTokens = 64,
    batch: Batch = 1,
    repeats: Annotated[
        int, typer.Option("--repeats", metavar="N", help="Turns; `diff` needs 5 to be sure.")
    ] = 5,
    as_json: AsJson = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with pictures.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Write a trace for ui.perfetto.dev."),
    ] = None,
    mermaid: Annotated[
        Path | None,
        typer.Option("--mermaid", metavar="FILE", help="Write diagrams for Markdown."),
    ] = None,
    recalibrate: Recalibrate = False,
    context: Context = None,
    threads: Threads = None,
    kv: KV = "f16",
    quantize: Quantize = None,
) -> None:
    """Count the cycles of each moment of inference, and say how far it is from its limit.

    A moment is a step of inference that stands on its own, like layers.12.ffn.down. Its limit is
    what this computer's memory and arithmetic allow, which is measured first, once.

    \b
      cyclewise profile smollm2
      cyclewise profile smollm2 --html report.html --trace smollm2.pftrace
      cyclewise profile smollm2 --json > before.json
    """
    from cyclewise.bench.report import show_progress
    from cyclewise.clock.profile import profile_model
    from cyclewise.clock.run import Settings

    for file in (html, trace, mermaid):
        if file is not None:
            _require_writable(file)
    settings = Settings(prompt_tokens, generate_tokens, batch, repeats)
    machine = _machine_profile(recalibrate)
    loaded = load(model, context or _needed_context(settings), threads, kv=kv, quantize=quantize)
    try:
        result, turns = profile_model(loaded, model, settings, machine, show_progress)
    finally:
        loaded.close()
    if html is not None:
        from cyclewise.clock.html import write_html

        write_html(result, html)
    if mermaid is not None:
        from cyclewise.clock.mermaid import write_mermaid

        write_mermaid(result, mermaid)
    if trace is not None:
        from cyclewise.clock.trace import write_trace
        from cyclewise.terminal import note

        written = write_trace(trace, loaded, turns)
        if written.left_out:
            note(f"the trace holds {written.num_steps} steps; {written.left_out} had no room")
    if as_json:
        print_json(result)
    else:
        from cyclewise.clock.report import print_profile

        print_profile(result)


def diff(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="The earlier profile.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="The later one.")],
    as_json: AsJson = False,
) -> None:
    """Compare two profiles: what became faster and what slower, and what may be chance.

    \b
      cyclewise profile smollm2 --json > before.json
      cyclewise profile smollm2 --json > after.json
      cyclewise diff before.json after.json
    """
    from cyclewise.clock.diff import compare, read_profile

    difference = compare(read_profile(before), read_profile(after))
    if as_json:
        print_json(difference.as_dict())
    else:
        from cyclewise.clock.report import print_diff

        print_diff(difference)


def complexity(
    model: ModelName,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", help="Visits of each point; more, less noise.")
    ] = 3,
    as_json: AsJson = False,
    context: Context = None,
    threads: Threads = None,
    kv: KV = "f16",
    quantize: Quantize = None,
) -> None:
    """Measure how cycles grow, and fit a law to each moment.

    With the length of the prompt and of the context, with batch, threads and layers. Each law comes
    with its error on points that the fit has not seen.

    \b
      cyclewise complexity smollm2
      cyclewise complexity smollm2 --rounds 5 --json
    """
    from cyclewise.bench.report import show_progress
    from cyclewise.clock.complexity import measure_growth
    from cyclewise.clock.growth import print_complexity

    loaded = load(model, context, threads, kv=kv, quantize=quantize)
    try:
        growth = measure_growth(loaded, rounds=rounds, progress=show_progress)
    finally:
        loaded.close()
        show_progress("")
    if as_json:
        print_json(
            {
                "schema": "cyclewise.complexity",
                "schema_version": 1,
                "core_hertz": growth.core_hertz,
                "counts_cycles": growth.counts_cycles,
                "growth": growth.as_list(),
                "left_out": growth.left_out,
            }
        )
    else:
        print_complexity(growth)


def whatif(
    model: ModelName,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--change",
            metavar="CHANGE",
            help="q8_0, q4_0, kv=int8, threads=N, batch=N, prune-heads=X, prune-layers=N, "
            "speculate, bandwidth=X (GB/s, or 2x), machine=FILE (or laptop, server, gpu, tpu). "
            "Repeatable: each is asked by itself.",
        ),
    ] = None,
    streams: Annotated[
        bool,
        typer.Option("--streams", help="How fast 1 to 16 answers come that are written at once."),
    ] = False,
    prompt_tokens: PromptTokens = 512,
    generate_tokens: GenerateTokens = 64,
    batch: Batch = 1,
    no_measure: Annotated[
        bool,
        typer.Option("--no-measure", help="Do not measure those that can be."),
    ] = False,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour", metavar="P", min=0, help="Of the machine, for the cost of tokens."
        ),
    ] = None,
    as_json: AsJson = False,
    recalibrate: Recalibrate = False,
    context: Context = None,
    threads: Threads = None,
    kv: KV = "f16",
    quantize: Quantize = None,
) -> None:
    """Predict what a change would bring, before anything is changed.

    A change that can be made already is then measured; prediction and measurement go to a ledger.

    \b
      cyclewise whatif smollm2 --change q8_0 --change threads=1
      cyclewise whatif smollm2 --change machine=server --price-per-hour 2.5
      cyclewise whatif smollm2 --streams
    """
    from cyclewise.bench.report import show_progress
    from cyclewise.clock.changes import parse_change
    from cyclewise.clock.run import Settings
    from cyclewise.clock.whatif import WhatIfs, print_whatif
    from cyclewise.text.tokenizer import Tokenizer

    if streams == bool(change):
        raise InvalidParameterError("give --change, or --streams")
    if streams:
        machine = _machine_profile(recalibrate)
        _streams(load(model, context, threads, kv=kv, quantize=quantize), machine, as_json)
        return
    changes = [parse_change(text) for text in change or ()]
    settings = Settings(prompt_tokens, generate_tokens, batch, 3)
    machine = _machine_profile(recalibrate)
    largest = replace(settings, batch=max(batch, *(each.batch for each in changes)))
    loaded = load(model, context or _needed_context(largest), threads, kv=kv, quantize=quantize)
    try:
        asked = WhatIfs(loaded, settings, machine, show_progress)
        tokenizer = Tokenizer.from_metadata(loaded.metadata)
        answers = []
        for each in changes:
            answer = asked.ask(each)
            if each.measurable and not no_measure:
                answer = asked.measure(each, answer, tokenizer)
            answers.append(answer)
    finally:
        loaded.close()
        show_progress("")
    if as_json:
        print_json(
            {
                "schema": "cyclewise.whatif",
                "schema_version": 1,
                "whatif": [answer.as_dict(price_per_hour) for answer in answers],
            }
        )
    else:
        print_whatif(answers, price_per_hour)


def _streams(model: Model, machine: MachineProfile, as_json: bool) -> None:
    from cyclewise.bench.report import show_progress
    from cyclewise.clock.streams import predict_streams, print_streams

    try:
        found = list(predict_streams(model, machine, show_progress))
    finally:
        model.close()
        show_progress("")
    if as_json:
        facts = {"schema": "cyclewise.streams", "schema_version": 1}
        print_json({**facts, "streams": [each.as_dict() for each in found]})
    else:
        print_streams(found, model)


def validate(
    model: ModelName,
    as_json: AsJson = False,
    recalibrate: Recalibrate = False,
    context: Context = None,
    threads: Threads = None,
    kv: KV = "f16",
    quantize: Quantize = None,
) -> None:
    """Compare what is predicted with what is measured.

    The predictor knows this computer and programs of SmolLM2's shape. Here it meets prompts,
    contexts, batches and numbers of threads that it has not seen, with any model.

    \b
      cyclewise validate smollm2
    """
    from cyclewise.bench.report import show_progress
    from cyclewise.clock.validate import print_validation, validate_model
    from cyclewise.text.tokenizer import Tokenizer

    machine = _machine_profile(recalibrate)
    loaded = load(model, context, threads, kv=kv, quantize=quantize)
    try:
        tokenizer = Tokenizer.from_metadata(loaded.metadata)
        validation = validate_model(loaded, tokenizer, machine, show_progress)
    finally:
        loaded.close()
    if as_json:
        print_json(validation.as_dict())
    else:
        print_validation(validation)


def _needed_context(settings: Settings) -> int | None:
    """Room for all sequences, where that is more than a model is given by itself."""
    from cyclewise.machine.kernels.layout import PAGE_TOKENS
    from cyclewise.models.config import DEFAULT_CONTEXT

    longest = settings.prompt_tokens + settings.generate_tokens
    needed = settings.batch * -(-longest // PAGE_TOKENS) * PAGE_TOKENS
    return needed if needed > DEFAULT_CONTEXT else None


def _machine_profile(recalibrate: bool) -> MachineProfile:
    from cyclewise.bench.report import show_progress
    from cyclewise.clock.roofs import machine_profile

    found = machine_profile(recalibrate, show_progress)
    show_progress("")
    return found


def _require_writable(file: Path) -> None:
    """Raises, before minutes of measuring, what writing would raise after them."""
    existed = file.exists()
    with file.open("ab"):
        pass
    if not existed:
        file.unlink()
