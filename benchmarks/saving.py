"""Save a sharded random model with one edited layer: ours against ``save_pretrained``.

``python -m benchmarks.saving`` builds a model of about 2 GB in a temporary folder, prints one table and writes
benchmarks/results/saving.json. Peak memory is that of a process that does nothing else.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from benchmarks.common import median, peak_memory, random_model, write_result
from editcli.models.checkpoint import Checkpoint
from editcli.runs.output import verify, write_model

SITE = "model.layers.4.mlp.down_proj.weight"


def ours(base: Path, out: Path) -> None:
    """Write the base with one tensor changed, and verify it."""
    checkpoint = Checkpoint(base)
    tensors = {SITE: checkpoint.read(SITE) + 1}
    write_model(checkpoint, out, tensors)
    verify(checkpoint, out, tensors)


def theirs(base: Path, out: Path) -> None:
    """Load, change one tensor, save the whole model."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_parameter(SITE).add_(1)
    model.save_pretrained(out, max_shard_size="500MB")


def measure(how: str, base: Path) -> tuple[float, int]:
    """Run one way of saving in a process of its own; return its seconds without imports, and its peak memory."""
    command = [sys.executable, "-m", "benchmarks.saving", "--worker", how, "--base", str(base)]
    seconds, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return float(seconds), int(peak)


@click.command()
@click.option("--repeats", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
@click.option("--worker", type=click.Choice(["ours", "theirs"]), hidden=True)
@click.option("--base", type=click.Path(path_type=Path), hidden=True)
def main(repeats: int, out: Path | None, worker: str | None, base: Path | None) -> None:
    """Time saving an edited model, and its peak memory."""
    if worker and base:
        with tempfile.TemporaryDirectory(dir=base.parent) as folder:
            started = time.perf_counter()
            {"ours": ours, "theirs": theirs}[worker](base, Path(folder))
            click.echo(f"{time.perf_counter() - started} {peak_memory()}")
        return
    table = Table("way", "seconds", "peak memory, GB")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        random_model("llama-1b", dtype=torch.bfloat16).model.save_pretrained(base, max_shard_size="500MB")
        found = {how: [measure(how, base) for _ in range(repeats)] for how in ("theirs", "ours")}
    result = {}
    for how, runs in found.items():
        result[how] = {"seconds": median([s for s, _ in runs]), "peak_bytes": median([float(p) for _, p in runs])}
        table.add_row(how, f"{result[how]['seconds']:.2f}", f"{result[how]['peak_bytes'] / 1e9:.2f}")
    Console().print(table)
    write_result("saving", result, out)


if __name__ == "__main__":
    main()
