"""Save a sharded random model with one edited layer: ours against ``save_pretrained``.

``python -m benchmarks.saving`` writes a model of about 2.5 GB to a temporary folder, prints one table and writes
benchmarks/results/saving.json. Each way runs in a process of its own that does nothing else, rounds are interleaved,
and what the disk has yet to write is waited for before each of them. The disk's own speed is the same for all ways,
so CPU seconds and peak memory tell them apart better than wall seconds do.

- theirs: load the model, change a weight, ``save_pretrained``;
- parsed: read every shard that holds a changed tensor, write it anew with safetensors, copy the others;
- ours: copy every shard and replace the changed tensor's bytes, then reopen the folder and compare every tensor.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import median, peak_memory, random_model, write_result
from editcli.runs.output import verify, write_model
from editcli.storage.checkpoint import Checkpoint

FIGURES = ("seconds", "cpu_seconds", "peak_bytes")
ENDING = ".mlp.down_proj.weight"


def site(checkpoint: Checkpoint) -> str:
    """Return the name of the tensor that is changed."""
    return next(name for name in checkpoint.names() if name.endswith(ENDING))


def ours(base: Path, out: Path) -> None:
    """Write the base with one tensor changed, and verify it."""
    unverified(base, out)
    checkpoint = Checkpoint(base)
    verify(checkpoint, out, {site(checkpoint): checkpoint.read(site(checkpoint)) + 1})


def unverified(base: Path, out: Path) -> None:
    """Write the base with one tensor changed."""
    checkpoint = Checkpoint(base)
    write_model(checkpoint, out, {site(checkpoint): checkpoint.read(site(checkpoint)) + 1})


def parsed(base: Path, out: Path) -> None:
    """Copy the shards without the tensor, and write the one with it anew."""
    from safetensors.torch import load_file, save_file

    checkpoint = Checkpoint(base)
    name = site(checkpoint)
    for path in base.iterdir():
        if path.name != checkpoint.entries[name].file:
            shutil.copyfile(path, out / path.name)
            continue
        tensors = load_file(path)
        tensors[name] += 1
        save_file(tensors, out / path.name, {"format": "pt"})
    os.sync()


def theirs(base: Path, out: Path) -> None:
    """Load, change one tensor, save the whole model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_parameter(site(Checkpoint(base))).add_(1)
    model.save_pretrained(out, max_shard_size="500MB")
    os.sync()


WAYS: Mapping[str, Callable[[Path, Path], None]] = {
    "theirs": theirs,
    "parsed": parsed,
    "unverified": unverified,
    "ours": ours,
}


def measure(how: str, base: Path) -> dict[str, float]:
    """Run one way of saving in a process of its own; return its figures, imports left out."""
    os.sync()
    command = [sys.executable, "-m", "benchmarks.saving", "--worker", how, "--base", str(base)]
    figures = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-len(FIGURES) :]
    return dict(zip(FIGURES, map(float, figures), strict=True))


@click.command()
@click.option("--shape", default="llama-1b", show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
@click.option("--worker", type=click.Choice(list(WAYS)), hidden=True)
@click.option("--base", type=click.Path(path_type=Path), hidden=True)
def main(shape: str, repeats: int, out: Path | None, worker: str | None, base: Path | None) -> None:
    """Time saving an edited model, and its peak memory."""
    if worker and base:
        _work(WAYS[worker], base)
        return
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        random_model(shape, dtype=torch.bfloat16).model.save_pretrained(base, max_shard_size="500MB")
        size = sum(path.stat().st_size for path in base.iterdir())
        rounds = [{how: measure(how, base) for how in WAYS} for _ in range(repeats)]
    middle = {how: {name: median([found[how][name] for found in rounds]) for name in FIGURES} for how in WAYS}
    ratios = {name: median([found["theirs"][name] / found["ours"][name] for found in rounds]) for name in FIGURES}
    table = Table("way", "seconds", "CPU seconds", "peak memory, GB")
    for how, found in middle.items():
        table.add_row(how, f"{found['seconds']:.2f}", f"{found['cpu_seconds']:.2f}", f"{found['peak_bytes'] / 1e9:.2f}")
    table.add_row("theirs / ours", *(f"{ratio:.1f}" for ratio in ratios.values()))
    Console().print(table)
    write_result("saving", {"bytes": size, "repeats": repeats, "ways": middle, "ratios": ratios}, out)


def _work(save: Callable[[Path, Path], None], base: Path) -> None:
    with tempfile.TemporaryDirectory(dir=base.parent) as folder:
        started, busy = time.perf_counter(), time.process_time()
        save(base, Path(folder))
        click.echo(f"{time.perf_counter() - started} {time.process_time() - busy} {peak_memory()}")


if __name__ == "__main__":
    main()
