"""What a person sees of a measurement: a table, and a line that says what runs.

`cyclewise bench` and `cyclewise perplexity` come here where they do not print JSON; the scripts in
`benchmarks/` use the progress line.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from cyclewise.bench.bench import BenchResult, Spread


NOISY = 0.1  # of the machine, used by others: beyond that a ratio says little


def show_progress(text: str) -> None:
    """Keep one line of progress on standard error where that is a terminal; "" clears it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def print_bench(result: BenchResult, console: Console | None = None) -> None:
    """Print a result as a table."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    table = Table(title=f"{result.model}, {_count(result.threads, 'thread')}", title_justify="left")
    table.add_column("tokens/s")
    for heading in ("median", "least", "most", "ours / theirs", "least", "most"):
        table.add_column(heading, justify="right")
    decode = f"decode {result.generate_tokens}"
    if result.depth:
        decode += f" from {result.depth}"
    table.add_row(f"prefill {result.prompt_tokens}", style="bold")
    table.add_row("  cyclewise", *_cells(result.prefill_tokens_per_second, 1))
    for peer in result.peers:
        speed, ratio = peer.prefill_tokens_per_second, peer.prefill_ratio_spread
        table.add_row(f"  {peer.name} {peer.version}", *_cells(speed, 1), *_cells(ratio, 2))
    table.add_row(decode, style="bold")
    table.add_row("  cyclewise", *_cells(result.decode_tokens_per_second, 1))
    for peer in result.peers:
        speed, ratio = peer.decode_tokens_per_second, peer.decode_ratio_spread
        table.add_row(f"  {peer.name} {peer.version}", *_cells(speed, 1), *_cells(ratio, 2))
    console.print(table)
    console.print(
        f"decode streams {result.bytes_per_decode_token / 1e6:.1f} MB a token: "
        f"{result.decode_fraction_of_bandwidth:.0%} of the "
        f"{result.read_bandwidth_bytes_per_second / 1e9:.1f} GB/s that "
        f"{_count(result.threads, 'thread')} can read here"
    )
    if result.others_cpu_share is not None and result.others_cpu_share > NOISY:
        console.print(
            f"other processes used {result.others_cpu_share:.0%} of this machine meanwhile: "
            f"measure again when it is quiet"
        )


def _cells(spread: Spread, digits: int) -> list[str]:
    return [f"{value:.{digits}f}" for value in (spread.median, spread.min, spread.max)]


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
