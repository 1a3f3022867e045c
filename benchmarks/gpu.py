"""A Llama-3-8B shape with random bfloat16 weights on an accelerator: edits per second, time split, matrix-unit use.

``python -m benchmarks.gpu`` runs unattended in a few minutes and prints one table. ``--shape`` and ``--device`` let the
same script run small on a CPU, which is how it is tested where there is no accelerator.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import random_model, sample_edits, write_result
from editcli.editing.leastsquares import InverseGram
from editcli.editing.session import ModelSession
from editcli.editing.targets import TargetOptions
from editcli.interfaces import Problem
from editcli.report import Silent


def matrix_rate(device: torch.device, size: int) -> float:
    """Measure the device's bfloat16 matrix rate in FLOP/s on random data."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _best(lambda: left @ right, device)


def _best(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        started = _now(device)
        work()
        times.append(_now(device) - started)
    return min(times[1:])


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


@click.command()
@click.option("--shape", default="llama-3-8b", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--batches", default=2, show_default=True)
@click.option("--batch-size", default=100, show_default=True)
@click.option("--layers", default="4,5,6,7,8", show_default=True)
@click.option("--steps", default=25, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(shape: str, device: str, batches: int, batch_size: int, layers: str, steps: int, out: Path | None) -> None:
    """Edit a random model of a real shape and show where the time goes."""
    from editcli.models.loading import choose_device

    place = choose_device(device)
    loaded = random_model(shape, device=str(place), dtype=torch.bfloat16)
    options = TargetOptions(steps=steps, lr=0.1, stop_loss=0.0)
    session = ModelSession(
        loaded, [int(layer) for layer in layers.split(",")], options=options, save_dtype=torch.bfloat16
    )
    identity = torch.eye(loaded.architecture.shape(0)[1], device=place)
    memory = {s: InverseGram(identity.clone(), s.module, Silent()) for s in session.sites}
    spent = dict.fromkeys(("targets", "keys", "solve", "write"), 0.0)
    for batch in range(batches + 1):
        edits = sample_edits(batch_size)
        # The first batch warms the device up and is not counted.
        spent = dict.fromkeys(spent, 0.0) if batch == 1 else spent
        started = _now(place)
        values = session.values(edits)
        spent["targets"] += _now(place) - started
        for site in session.sites:
            started = _now(place)
            problem = Problem(site, session.keys(edits, site), session.residual(edits, site, values))
            read = _now(place)
            update = memory[site].solve(problem.keys, problem.residual)
            memory[site] = memory[site].downdated(problem.keys)
            solved = _now(place)
            session.write(site, update)
            spent["keys"] += read - started
            spent["solve"] += solved - read
            spent["write"] += _now(place) - solved
    total, edits_done = sum(spent.values()), batches * batch_size
    rate = matrix_rate(place, 8192 if place.type != "cpu" else 512)
    work = steps * _floating_point_operations(session, sample_edits(batch_size)) * batches
    table = Table("figure", "value")
    for phase, seconds in spent.items():
        table.add_row(f"{phase}, seconds per batch", f"{seconds / batches:.3f}")
    table.add_row("edits per second", f"{edits_done / total:.2f}")
    table.add_row("targets, TFLOP/s", f"{work / spent['targets'] / 1e12:.2f}")
    table.add_row("share of the measured matrix rate", f"{work / spent['targets'] / rate:.3f}")
    Console().print(table)
    result = {"shape": shape, "device": str(place), "seconds": spent, "edits_per_second": edits_done / total}
    write_result("gpu", {**result, "matrix_flops": rate, "target_flops": work / spent["targets"]}, out)


def _floating_point_operations(session: ModelSession, edits: list) -> float:
    """Return the operations of one forward and backward pass over what is computed again: 4 per weight and token."""
    loaded, last = session.loaded, session.layers[-1]
    blocks = [loaded.architecture.block(layer) for layer in range(last + 1, loaded.architecture.layers)]
    weights = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    tokens = loaded.tokens
    encoded = tokens.encode([tokens.locate(edit, edit.target_new) for edit in edits])
    again = sum(len(text.ids) - 1 - text.lookup for text in encoded) * (1 + len(session.prefixes)) + len(edits)
    return 4.0 * weights * again


if __name__ == "__main__":
    main()
