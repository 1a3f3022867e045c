"""A Llama-3-8B shape with random bfloat16 weights on an accelerator: edits per second, time split, matrix-unit use.

``python -m benchmarks.gpu`` runs unattended, stops starting batches after ``--limit`` seconds, prints one table and
writes benchmarks/results/gpu.json. ``--shape tiny --device cpu`` runs the same script small where there is no
accelerator. Every edit takes all its steps, which is the worst case: random weights reach no threshold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.common import random_model, sample_edits, write_result
from editcli.editing.session import ModelSession
from editcli.models.loading import choose_device
from editcli.plugin.interfaces import Problem, Site, Update, Values
from editcli.plugin.leastsquares import InverseGram, working_dtype
from editcli.reporting import Silent
from editcli.requests.schema import EditRequest
from editcli.settings.core import TargetOptions

COUNTERFACT = 20_877
"""Edits of the whole CounterFact stream."""
PHASES = ("targets", "keys", "solve", "write")


def now(device: torch.device) -> float:
    """Return the time once everything that was asked of ``device`` is done."""
    if device.type != torch.device("cpu").type:
        torch.accelerator.synchronize()
    return time.perf_counter()


def matrix_rate(device: torch.device, size: int, *, products: int = 10, repeats: int = 5) -> float:
    """Measure a device's bfloat16 matrix rate in FLOP/s: the best of several rows of products of random matrices."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out, times = torch.empty_like(left), []
    for _ in range(repeats + 1):
        started = now(device)
        for _ in range(products):
            torch.mm(left, right, out=out)
        times.append(now(device) - started)
    return 2 * size**3 * products / min(times[1:])


def memory(device: torch.device, figure: str) -> int | None:
    """Return a figure of the device's allocator, such as ``max_memory_allocated``; None where it keeps none."""
    ask = getattr(torch.get_device_module(device), figure, None)
    return None if ask is None or device.type == torch.device("cpu").type else int(ask(device))


def reset_peak(device: torch.device) -> None:
    """Start the allocator's peak anew at what is allocated now, where it keeps one."""
    reset = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
    if reset is not None:
        reset(device)


@dataclass(slots=True)
class Bench:
    """One model under edit and the clocks of its phases."""

    session: ModelSession
    device: torch.device
    grams: dict[Site, InverseGram] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def prepare(self) -> None:
        """Give every site an identity for its C: no reference text is read, the sizes are the real ones."""
        size, kind = self.session.loaded.architecture.shape(0)[1], working_dtype(self.device)
        for site in self.session.sites:
            self.grams[site] = InverseGram(torch.eye(size, device=self.device, dtype=kind), site.module, Silent())

    def batch(self, edits: Sequence[EditRequest]) -> None:
        """Write one batch as the program does, one phase after the other."""
        values = self._timed("targets", lambda: self.session.values(edits))
        for site in self.session.sites:
            problem = self._timed("keys", lambda site=site: self._read(edits, site, values))
            update = self._timed("solve", lambda site=site, problem=problem: self._solve(site, problem))
            self._timed("write", lambda site=site, update=update: self.session.write(site, update))

    def _read(self, edits: Sequence[EditRequest], site: Site, values: Values) -> Problem:
        return Problem(site, self.session.keys(edits, site), self.session.residual(edits, site, values))

    def _solve(self, site: Site, problem: Problem) -> Update:
        update = self.grams[site].solve(problem.keys, problem.residual)
        self.grams[site] = self.grams[site].downdated(problem.keys)
        return update

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        started = now(self.device)
        found = work()
        self.spent[phase] += now(self.device) - started
        return found

    def target_operations(self, edits: Sequence[EditRequest]) -> float:
        """Return the least operations of one step of target optimisation, in FLOP.

        Two per weight and token forward, two backward (no weight has a gradient): the blocks above the last edited one
        at the tokens from the lookup token on, and the head at the targets' tokens and the essence prompts.
        """
        loaded, contexts = self.session.loaded, 1 + len(self.session.prefixes)
        architecture = loaded.architecture
        above = range(self.session.layers[-1] + 1, architecture.layers)
        blocks = sum(_matrices(architecture.block(layer)) for layer in above)
        encoded = loaded.tokens.encode([loaded.tokens.locate(edit, edit.target_new) for edit in edits])
        steered = sum(len(text.ids) - 1 - text.lookup for text in encoded) * contexts + len(edits)
        told = sum(len(text.target) for text in encoded) * contexts + len(edits)
        return 4.0 * (blocks * steered + _matrices(architecture.head) * told)


def _matrices(module: nn.Module) -> int:
    """Return the number of weights that take part in matrix products."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)


@click.command()
@click.option("--shape", default="llama-3-8b", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--batches", default=3, show_default=True, help="Batches that count; one more warms up.")
@click.option("--batch-size", default=100, show_default=True)
@click.option("--layers", default="4,5,6,7,8", show_default=True)
@click.option("--steps", default=25, show_default=True)
@click.option("--limit", default=300.0, show_default=True, help="Seconds after which no further batch is started.")
@click.option("--out", type=click.Path(path_type=Path))
def main(
    shape: str, device: str, batches: int, batch_size: int, layers: str, steps: int, limit: float, out: Path | None
) -> None:
    """Edit a random model of a real shape and show where the time goes."""
    began, place = time.perf_counter(), choose_device(device)
    loaded = random_model(shape, device=str(place), dtype=torch.bfloat16)
    options = TargetOptions(steps=steps, lr=0.1, stop_loss=0.0)
    chosen = [int(layer) for layer in layers.split(",")]
    bench = Bench(ModelSession(loaded, chosen, options=options, save_dtype=torch.bfloat16), place)
    bench.prepare()
    model_bytes = memory(place, "memory_allocated")
    reset_peak(place)
    edits = sample_edits(batch_size * (batches + 1))
    bench.batch(edits[:batch_size])
    bench.spent = dict.fromkeys(PHASES, 0.0)
    done = 0
    while done < batches and (done == 0 or time.perf_counter() - began < limit):
        done += 1
        bench.batch(edits[done * batch_size : (done + 1) * batch_size])
    rate = matrix_rate(place, 8192 if model_bytes is not None else 512)
    work = steps * bench.target_operations(edits[batch_size : 2 * batch_size])
    result = {
        "shape": shape,
        "device": torch.get_device_module(place).get_device_name(place) if model_bytes is not None else "cpu",
        "batches": done,
        "batch_size": batch_size,
        "steps": steps,
        "seconds_per_batch": {phase: seconds / done for phase, seconds in bench.spent.items()},
        "edits_per_second": done * batch_size / sum(bench.spent.values()),
        "target_flops": work * done / bench.spent["targets"],
        "matrix_flops": rate,
        "model_bytes": model_bytes,
        "peak_bytes": memory(place, "max_memory_allocated"),
    }
    Console().print(_table(result))
    write_result("gpu", result, out)


def _table(result: dict[str, Any]) -> Table:
    table = Table("figure", "value")
    table.add_row("device", result["device"])
    table.add_row("edits per second", f"{result['edits_per_second']:.2f}")
    table.add_row("whole CounterFact stream, minutes", f"{COUNTERFACT / result['edits_per_second'] / 60:.1f}")
    for phase, seconds in result["seconds_per_batch"].items():
        table.add_row(f"{phase}, seconds per batch", f"{seconds:.3f}")
    table.add_row("targets, TFLOP/s", f"{result['target_flops'] / 1e12:.2f}")
    table.add_row("measured matrix rate, TFLOP/s", f"{result['matrix_flops'] / 1e12:.2f}")
    table.add_row("share of it", f"{result['target_flops'] / result['matrix_flops']:.1%}")
    for name in ("model_bytes", "peak_bytes"):
        shown = "n/a" if result[name] is None else f"{result[name] / 1e9:.1f}"
        table.add_row(name.replace("_bytes", " memory, GB"), shown)
    return table


if __name__ == "__main__":
    main()
