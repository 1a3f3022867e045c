"""Gathering second moments: one text at a time through the whole model with hooks, as published, against ours.

``python -m benchmarks.moments`` prints one table and writes benchmarks/results/moments.json. Rounds are
interleaved, times are CPU seconds, and each ratio is taken within one round.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import bundled, median, peak_memory, random_model, write_result
from editcli.heap import keep_freed
from editcli.models.forward import hooked
from editcli.models.loading import LoadedModel, bundled_folder
from editcli.plugin.interfaces import Site
from editcli.settings.core import StatisticsOptions
from editcli.statistics.moments import SecondMoments

CORPUS = bundled_folder() / "reference.txt"


@torch.no_grad()
def plain(loaded: LoadedModel, sites: Sequence[Site], rows: Sequence[Sequence[int]]) -> dict[Site, Tensor]:
    """Run one text at a time through the whole model; add k k^T of every token in float64."""
    width = loaded.architecture.shape(sites[0].layer)[1]
    sums = {site: torch.zeros(width, width, dtype=torch.float64) for site in sites}

    def tap(stack: ExitStack, site: Site) -> None:
        def see(owner: object, entered: Tensor, output: object) -> None:
            keys = entered.reshape(-1, width).double()
            sums[site].addmm_(keys.T, keys)

        stack.enter_context(hooked(loaded.architecture.projection(site.layer), see))

    with ExitStack() as stack:
        for site in sites:
            tap(stack, site)
        for row in rows:
            loaded.model(input_ids=torch.tensor([row]))
    read = sum(map(len, rows))
    return {site: total / read for site, total in sums.items()}


def ours(loaded: LoadedModel, sites: Sequence[Site], tokens: int) -> dict[Site, Tensor]:
    """Gather the same with the program, into an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        options = StatisticsOptions(tokens=tokens)
        moments = SecondMoments(loaded, options=options, corpus=str(CORPUS), cache=Path(cache))
        moments.plan(sites)
        return {site: moments(site) for site in sites}


def taken(loaded: LoadedModel, tokens: int) -> list[list[int]]:
    """Return the texts that the program reads for ``tokens`` tokens."""
    rows, left = [], tokens
    for row in SecondMoments(loaded, corpus=str(CORPUS)).corpus.rows():
        if left <= 0:
            break
        rows.append(row[:left])
        left -= len(rows[-1])
    return rows


@click.command()
@click.option("--model", default="bundled", show_default=True, help="'bundled' or a random shape.")
@click.option("--sites", "count", default=5, show_default=True)
@click.option("--tokens", default=8192, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(model: str, count: int, tokens: int, repeats: int, out: Path | None) -> None:
    """Time second moments, both ways."""
    keep_freed()
    loaded = bundled() if model == "bundled" else random_model(model)
    sites = [loaded.architecture.site(layer) for layer in range(1, min(loaded.architecture.layers, count + 1))]
    rows = taken(loaded, tokens)
    ways = {"published": lambda: plain(loaded, sites, rows), "ours": lambda: ours(loaded, sites, tokens)}
    found, rounds = {}, {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            started = time.process_time()
            found[name] = work()
            rounds[name].append(time.process_time() - started)
    rates = {name: tokens / median(times) for name, times in rounds.items()}
    ratio = median([one / other for one, other in zip(rounds["published"], rounds["ours"], strict=True)])
    apart = max(_apart(found["ours"][site], found["published"][site]) for site in sites)
    table = Table("way", "tokens per CPU second")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}")
    table.add_row("ratio", f"{ratio:.1f}")
    Console().print(table)
    result = {"model": model, "sites": len(sites), "tokens": tokens, "repeats": repeats, "tokens_per_second": rates}
    write_result("moments", {**result, "ratio": ratio, "apart": apart, "peak_bytes": peak_memory()}, out)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


if __name__ == "__main__":
    main()
