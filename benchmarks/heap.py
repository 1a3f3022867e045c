"""A batch's targets with freed memory kept for the next pass against glibc's own way, which gives it back.

``python -m benchmarks.heap`` starts one process for each round and way, in turn, prints one table and writes
benchmarks/results/heap.json: wall seconds, the pages that the system cleared, and peak resident memory.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import median, peak_memory, sample_edits, write_result
from benchmarks.targets import last_layer, opened
from editcli.editing.session import generate_prefixes
from editcli.editing.targets import optimise
from editcli.heap import give_back, keep_freed
from editcli.reporting import Silent
from editcli.settings.core import TargetOptions

WAYS = ("given back", "kept")
WARM = 2
"""Batches before the one that is measured."""


def measured(model: str, batch: int, steps: int, *, kept: bool) -> dict[str, float]:
    """Return what one batch takes in this process once it is warm."""
    if kept:
        keep_freed()
    loaded, options = opened(model, "cpu"), TargetOptions(steps=steps, stop_loss=0.0, lr=0.1)
    prefixes, edits = generate_prefixes(loaded, options, seed=0), sample_edits(batch)
    seconds = pages = 0.0
    for _ in range(WARM + 1):
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        optimise(loaded, edits, prefixes, last_layer(loaded), options, Silent())
        seconds = time.perf_counter() - started
        pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        # As a stream does after every batch.
        give_back()
    return {"seconds": seconds, "pages": pages, "peak_bytes": peak_memory()}


@click.command()
@click.option("--model", default="bundled", show_default=True)
@click.option("--batch", default=100, show_default=True, help="Edits.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--steps", default=10, show_default=True)
@click.option("--way", type=click.Choice(WAYS), help="Measure one way in this process and print it as JSON.")
@click.option("--out", type=click.Path(path_type=Path))
def main(model: str, batch: int, repeats: int, steps: int, way: str | None, out: Path | None) -> None:
    """Time a batch's targets with and without keeping what is freed."""
    if way is not None:
        click.echo(json.dumps(measured(model, batch, steps, kept=way == "kept")))
        return
    arguments = ("--model", model, "--batch", str(batch), "--steps", str(steps))
    rounds = [{name: _child(name, arguments) for name in WAYS} for _ in range(repeats)]
    found: dict[str, Any] = {
        name: {figure: median([turn[name][figure] for turn in rounds]) for figure in rounds[0][name]} for name in WAYS
    }
    ratio = median([turn["given back"]["seconds"] / turn["kept"]["seconds"] for turn in rounds])
    table = Table("freed memory is", "seconds", "pages cleared", "peak, MB")
    for name, figures in found.items():
        cells = (f"{figures['seconds']:.2f}", f"{figures['pages']:,.0f}", f"{figures['peak_bytes'] / 1e6:,.0f}")
        table.add_row(name, *cells)
    Console().print(table, f"ratio {ratio:.2f}")
    shape = {"model": model, "batch": batch, "steps": steps, "repeats": repeats, "threads": torch.get_num_threads()}
    write_result("heap", {**shape, "ways": found, "ratio": ratio}, out)


def _child(way: str, arguments: tuple[str, ...]) -> dict[str, float]:
    """Measure one way in a fresh process."""
    command = (sys.executable, "-m", "benchmarks.heap", "--way", way, *arguments)
    return json.loads(subprocess.run(command, env=os.environ, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    main()
