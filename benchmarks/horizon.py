"""Long streams on one model, any number of stacks side by side: ``python -m benchmarks.horizon MODEL EDITS STACK ...``.

A STACK is an editor with its stabilizers, and settings that differ from the preset, for instance ``rlsedit``,
``memit+nas`` or ``"alphaedit targets.stop=greedy"``. Each runs through ``editcli bench`` in a process of its own, up to
``--jobs`` at once on one device, and continues where it stopped when the command is given again. Figures are retained
ones: of all edits so far, measured every ``--eval-every`` batches. The result is benchmarks/results/horizon.json.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.common import write_result
from editcli.records.history import read_history
from editcli.records.journal import RETAINED

FIGURES = {
    "efficacy_accuracy": "accuracy",
    "efficacy_success": "success",
    "generalization_success": "paraphrases",
    "specificity_success": "neighbours",
}
"""Retained figures of a curve and their headings."""
DIVERGENCE = "distribution.unrelated.median"
"""Nats by which the next token's distribution moved behind unrelated text, the median over texts."""


@dataclass(frozen=True, slots=True)
class Job:
    """One stack in a folder of its own."""

    stack: str
    options: tuple[str, ...]
    folder: Path

    @property
    def bench(self) -> Path:
        """The record of the stack's bench."""
        return self.folder / "bench.json"

    def command(self, shared: Sequence[str]) -> list[str]:
        """Return the command that runs or continues the stack."""
        options = [part for option in self.options for part in ("-o", option)]
        stack = ["--stacks", self.stack, "--out", str(self.folder)]
        return [sys.executable, "-m", "editcli", "bench", *stack, *options, *shared]


def job_of(text: str, out: Path) -> Job:
    """Read ``EDITOR+STABILIZER NAME.KEY=VALUE ...``; the folder's name is the text's."""
    stack, *options = text.split()
    return Job(stack, tuple(options), out / re.sub(r"[^\w.+=-]", "_", text))


def run(jobs: Sequence[Job], shared: Sequence[str], *, at_once: int, console: Console) -> None:
    """Run the jobs, ``at_once`` of them at a time; each writes its log beside its records."""
    # Without this SIGTERM would end the script at once and leave its stacks running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    waiting, running = list(jobs), dict[Job, subprocess.Popen[bytes]]()
    began = time.perf_counter()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                job.folder.mkdir(parents=True, exist_ok=True)
                with (job.folder / "log.txt").open("ab") as log:
                    running[job] = subprocess.Popen(job.command(shared), stdout=log, stderr=subprocess.STDOUT)
            for job, process in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    ended = "ended" if process.returncode == 0 else f"exit code {process.returncode}"
                    console.print(f"{time.perf_counter() - began:6.0f} s  {job.folder.name}: {ended}", markup=False)
            time.sleep(0.2)
    finally:
        # Nothing runs on unseen when this script is interrupted; a stack continues where it stopped.
        for process in running.values():
            process.terminate()


def curve_of(job: Job) -> dict[str, Any] | None:
    """Return a stack's curve, or None where the bench wrote none."""
    if not job.bench.is_file():
        return None
    curves = json.loads(job.bench.read_text("utf-8"))["curves"]
    if not curves:
        return None
    return {**curves[0], "options": list(job.options), "out": job.folder.name, **recorded(job.folder / job.stack)}


def recorded(run: Path) -> dict[str, Any]:
    """Return what a run's journal holds beside its curve: divergence on unrelated text, targets, norms of updates."""
    history = read_history(run)
    batches = () if history is None else history.batches
    targets: Counter[str] = Counter()
    for batch in batches:
        targets.update(batch.targets)
    measured = [batch.measured(RETAINED) for batch in batches]
    return {
        "divergence": [figures.get(DIVERGENCE) for figures in measured if figures],
        "targets": dict(targets),
        "update_norms": [
            max((site.update_norm for site in batch.sites if site.update_norm is not None), default=None)
            for batch in batches
        ],
    }


def table_of(curves: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the figures of every stack at each of its measurements."""
    table = Table("stack", "edits", *FIGURES.values(), "R_n", title="Retained figures")
    for text, curve in curves.items():
        for number, point in enumerate(curve["points"]):
            figures = [point["figures"].get(name) for name in FIGURES]
            cells = ["n/a" if value is None else f"{value:.3f}" for value in figures]
            ratio = point["ratio"]
            table.add_row(
                "" if number else text, str(point["edits"]), *cells, "n/a" if ratio is None else f"{ratio:.2f}"
            )
        table.add_section()
    return table


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("edits", type=click.Path(exists=True, path_type=Path))
@click.argument("stacks", nargs=-1, required=True)
@click.option("--batch-size", default=100, show_default=True)
@click.option("--limit", type=int, help="The first N edits only.")
@click.option("--eval-every", default=5, show_default=True, help="Measure retention every N batches.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Stacks that run at once.")
@click.option("--device", default="auto", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("horizon"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(
    model: Path,
    edits: Path,
    stacks: Sequence[str],
    batch_size: int,
    limit: int | None,
    eval_every: int,
    jobs: int,
    device: str,
    folder: Path,
    out: Path | None,
) -> None:
    """Run stacks on a long stream and compare what they retain."""
    console, began = Console(), time.perf_counter()
    shared = ["--model", str(model), "--edits", str(edits), "--device", device]
    shared += ["--batch-size", str(batch_size), "--eval-every", str(eval_every)]
    shared += [] if limit is None else ["--limit", str(limit)]
    # Two processes may not share a folder.
    stacks = list(dict.fromkeys(stacks))
    made = [job_of(text, folder) for text in stacks]
    run(made, shared, at_once=jobs, console=console)
    curves = {text: curve for text, job in zip(stacks, made, strict=True) if (curve := curve_of(job)) is not None}
    console.print(table_of(curves))
    result = {
        "model": model.name,
        "edits": edits.name,
        "limit": limit,
        "batch_size": batch_size,
        "jobs": jobs,
        "device": device,
        "seconds": time.perf_counter() - began,
        "stacks": curves,
    }
    write_result("horizon", result, out)


if __name__ == "__main__":
    main()
