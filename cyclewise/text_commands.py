"""The commands that make text: run and chat.

`cli.py` registers them; everything heavy is imported inside.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cyclewise.engine.request import SamplingParams
from cyclewise.errors import InvalidParameterError
from cyclewise.options import (
    KV,
    AsJson,
    Context,
    DefaultModelName,
    Draft,
    FrequencyPenalty,
    Lora,
    MaxTokens,
    MinP,
    ModelName,
    PresencePenalty,
    Quantize,
    RepetitionPenalty,
    Seed,
    Speculate,
    System,
    Temperature,
    Threads,
    TopK,
    TopP,
    TypicalP,
    adapters,
    print_json,
    read_file,
)

_DEFAULTS = SamplingParams()


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    for command in (run, chat):
        app.command()(command)


def run(
    model: ModelName,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Default: standard input.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")
    ] = False,
    as_json: AsJson = False,
    system: System = None,
    max_tokens: MaxTokens = _DEFAULTS.max_tokens or 0,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    typical_p: TypicalP = _DEFAULTS.typical_p,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = _DEFAULTS.presence_penalty,
    frequency_penalty: FrequencyPenalty = _DEFAULTS.frequency_penalty,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            "--logit-bias",
            metavar="ID=BIAS",
            help="Added to a token's logit, -100 to 100. May be given repeatedly.",
        ),
    ] = None,
    seed: Seed = None,
    n: Annotated[
        int,
        typer.Option(
            "--n", metavar="N", help="Answers; their seeds are S, S + 1, ... of --seed S."
        ),
    ] = _DEFAULTS.n,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="Ends the answer. May be given repeatedly."),
    ] = None,
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option(
            "--stop-token-id", metavar="ID", help="A token that does. May be given repeatedly."
        ),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on when the model ends its turn.")
    ] = False,
    json_schema: Annotated[
        str | None,
        typer.Option(
            "--json-schema",
            metavar="FILE|JSON",
            help="The answer is an instance of this schema. '{}': any JSON.",
        ),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option("--regex", metavar="REGEX", help="The whole answer matches it."),
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option("--grammar", metavar="FILE", help="The answer follows this Lark grammar."),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            "--logprobs",
            metavar="K",
            help="With --json: how likely each token was, and the K likeliest.",
        ),
    ] = None,
    prompt_logprobs: Annotated[
        int | None,
        typer.Option("--prompt-logprobs", metavar="K", help="The same of the prompt's tokens."),
    ] = None,
    context: Context = None,
    threads: Threads = None,
    kv: KV = "f16",
    speculate: Speculate = True,
    draft: Draft = None,
    lora: Lora = None,
    quantize: Quantize = None,
) -> None:
    """Answer one prompt.

    \b
      cyclewise run smollm2 "Name three rivers."
      cyclewise run smollm2 < question.txt > answer.txt
      cyclewise run smollm2 --raw --temperature 0 "The capital of France is"
      cyclewise run smollm2 --n 3 --seed 1 "Name a river."
      cyclewise run smollm2 --json --logprobs 5 --max-tokens 1 "Yes or no?"
      cyclewise run smollm2 --regex "(Yes|No), because .{20,80}[.]" "Is the sky blue?"
      cyclewise run smollm2 --json-schema city.json "Facts about Paris, as JSON."
    """
    params = SamplingParams(
        **_named(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        ),
        typical_p=typical_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=_read_biases(logit_bias or []),
        seed=seed,
        n=n,
        max_tokens=max_tokens or None,
        stop=stop or (),
        stop_token_ids=stop_token_id or (),
        ignore_eos=ignore_eos,
        json_schema=_read_schema(json_schema),
        regex=regex,
        grammar=None if grammar is None else read_file(grammar, "grammar"),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        adapter=lora,
    )
    if raw and system is not None:
        raise InvalidParameterError("--raw continues the text as it is, so there is no --system")
    if not as_json and (logprobs is not None or prompt_logprobs is not None):
        raise InvalidParameterError("--logprobs and --prompt-logprobs are shown with --json alone")
    text = _read_prompt() if prompt is None else prompt
    from cyclewise import terminal
    from cyclewise.llm import LLM

    with LLM(
        model, context=context, threads=threads, kv=kv, speculate=speculate, draft=draft,
        adapters=adapters(lora), quantize=quantize,
    ) as llm:  # fmt: skip
        if raw or (system is None and not llm.has_chat_template):
            pieces = llm.stream(text, params)
        else:
            messages = [] if system is None else [{"role": "system", "content": system}]
            messages.append({"role": "user", "content": text})
            pieces = llm.chat(messages, params, stream=True)
        if as_json:
            import dataclasses

            *_, last = pieces
            assert last.result is not None
            facts = dataclasses.asdict(last.result)
            if n == 1:  # it is what stands there already
                del facts["choices"]
            print_json({"model": model, **facts})
        else:
            result = terminal.show(pieces) if n == 1 else terminal.show_choices(pieces)
            terminal.note(terminal.summary(result, params, llm.context))


def _read_schema(given: str | None) -> str | None:
    """A JSON schema, given as it is or by the name of its file."""
    if given is None or given.lstrip()[:1] in ("{", "") or given.strip() in ("true", "false"):
        return given
    return read_file(Path(given), "JSON schema")


def _named(**options: float | None) -> dict[str, Any]:
    """The options that were given: of the others the model may have defaults of its own."""
    return {name: value for name, value in options.items() if value is not None}


def _read_biases(pairs: list[str]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for pair in pairs:
        token_id, _, bias = pair.partition("=")
        try:
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise InvalidParameterError(
                f"--logit-bias must be like 42=-100, a token's id and its bias, not {pair!r}"
            ) from None
    return biases


def _read_prompt() -> str:
    if sys.stdin is None:
        text = ""
    else:
        if sys.stdin.isatty():
            from cyclewise import terminal

            terminal.note("Type the prompt; Ctrl-D on a line of its own ends it.")
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidParameterError(
                f"standard input is not UTF-8 text: byte {error.start} cannot be read"
            ) from None
    if not text.strip():
        raise InvalidParameterError(
            "the prompt is empty: give it after the model's name, or on standard input"
        )
    return text.removesuffix("\n").removesuffix("\r")  # the end of the last line is not meant


def chat(
    model: DefaultModelName = "smollm2",
    system: System = None,
    max_tokens: MaxTokens = _DEFAULTS.max_tokens or 0,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    typical_p: TypicalP = _DEFAULTS.typical_p,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = _DEFAULTS.presence_penalty,
    frequency_penalty: FrequencyPenalty = _DEFAULTS.frequency_penalty,
    seed: Seed = None,
    context: Context = None,
    threads: Threads = None,
    kv: KV = "f16",
    speculate: Speculate = True,
    draft: Draft = None,
    lora: Lora = None,
    quantize: Quantize = None,
) -> None:
    """Talk with a model, turn by turn.

    Ctrl-C stops an answer, Ctrl-D or /exit leaves, /reset begins anew, /help shows the commands.

    \b
      cyclewise chat
      cyclewise chat qwen2.5-0.5b --system "Answer in rhymes." --temperature 1
    """
    params = SamplingParams(
        **_named(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        ),
        typical_p=typical_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        max_tokens=max_tokens or None,
        adapter=lora,
    )
    from cyclewise.llm import LLM
    from cyclewise.repl import converse

    with LLM(
        model, context=context, threads=threads, kv=kv, speculate=speculate, draft=draft,
        adapters=adapters(lora), quantize=quantize,
    ) as llm:  # fmt: skip
        if not llm.has_chat_template:
            raise InvalidParameterError(
                f"{model} has no chat template, so it cannot hold a conversation: "
                f"continue a text with `cyclewise run --raw` instead"
            )
        converse(llm, params, system)
