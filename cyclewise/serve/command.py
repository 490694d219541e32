"""The command `cyclewise serve`. Everything heavy is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cyclewise.options import (
    KV,
    Context,
    ModelName,
    NamedLoras,
    Quantize,
    Threads,
    named_adapters,
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(serve)


def serve(
    model: ModelName,
    host: Annotated[str, typer.Option("--host", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: any that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", metavar="FILE", help="Keys, one a line; one must be given."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen to other computers without a key.")
    ] = False,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            "--cors", metavar="ORIGIN", help="Pages that may ask. May be given repeatedly."
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            "--name", help="What requests call the model. May be given repeatedly. Default: MODEL."
        ),
    ] = None,
    context: Context = None,
    parallel: Annotated[
        int,
        typer.Option(
            "--parallel", metavar="N", help="Requests of the whole context that memory is for."
        ),
    ] = 8,
    threads: Threads = None,
    kv: KV = "f16",
    lora: NamedLoras = None,
    quantize: Quantize = None,
    drain: Annotated[
        float,
        typer.Option("--drain", metavar="S", help="Seconds that answers may take at the end."),
    ] = 30.0,
) -> None:
    """Answer requests of OpenAI's API over HTTP.

    \b
      cyclewise serve smollm2
      curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
        -d '{"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}]}'
    """
    from cyclewise.serve import server

    settings = server.Settings(
        host=host,
        port=port,
        api_key_file=api_key_file,
        insecure=insecure,
        cors=cors or (),
        names=name or (),
        context=context,
        sequences=parallel,
        threads=threads,
        kv=kv,
        adapters=named_adapters(lora),
        quantize=quantize,
        drain=drain,
    )
    server.serve(model, settings)
