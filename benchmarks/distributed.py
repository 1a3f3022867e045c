"""Targets of a batch on two processes of one thread each against one, and what their talking costs.

``python -m benchmarks.distributed`` starts the two processes itself, prints one table and writes
benchmarks/results/distributed.json. Rounds are interleaved: rank 0 does the whole batch alone while rank 1 waits, then
both share it; each ratio is taken within one round. The ratio needs two idle cores; ``cpu_ratio``, that of CPU seconds
to the busiest rank's, says what two idle cores would give where they are not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import bundled, median, sample_edits, write_result
from editcli.distributed.group import joined
from editcli.distributed.launch import Launch
from editcli.distributed.team import Team
from editcli.editing.session import generate_prefixes
from editcli.editing.shared_session import TeamSession
from editcli.heap import keep_freed
from editcli.settings.core import TargetOptions

TALKS = 50
"""Exchanges and gathers that are timed."""
FLOATS = 1 << 22
"""Numbers in the large message: 16 MiB in single precision."""


def seconds(team: Team, work: Callable[[], Any]) -> tuple[float, float]:
    """Return the wall seconds until all ranks are done with ``work``, and the CPU seconds of the busiest."""
    team.exchange("ready")
    started, busy = time.perf_counter(), time.process_time()
    work()
    spent = team.exchange("done", time.process_time() - busy)
    return time.perf_counter() - started, max(spent)


def talking(team: Team) -> dict[str, float]:
    """Return the seconds of one exchange, and the bytes a second at which a large tensor is gathered."""
    short = seconds(team, lambda: [team.exchange("hello") for _ in range(TALKS)])[0] / TALKS
    large = torch.zeros(FLOATS)
    times = [seconds(team, lambda: team.gather("large", [large]))[0] for _ in range(4)]
    return {"exchange_seconds": short, "gather_bytes_per_second": 4 * FLOATS * team.size / median(times)}


def measured(team: Team, batch: int, repeats: int, options: TargetOptions) -> dict[str, Any]:
    """Return seconds of a batch's targets, keys and residuals alone and shared, and the ratios of each round."""
    loaded = bundled()
    prefixes = generate_prefixes(loaded, options, seed=0)
    shared, alone = (
        TeamSession(loaded, [0, 1], team=who, options=options, prefixes=prefixes) for who in (team, Team())
    )
    edits = sample_edits(batch)
    rounds = []
    for _ in range(repeats + 1):
        one = seconds(team, lambda: alone.values(edits) if team.leads else None)
        rounds.append((one, seconds(team, lambda: shared.values(edits))))
    wall, busy = ([(one[kind], both[kind]) for one, both in rounds[1:]] for kind in (0, 1))
    return {
        "alone_seconds": median([one for one, _ in wall]),
        "shared_seconds": median([both for _, both in wall]),
        "ratio": median([one / both for one, both in wall]),
        "ratios": [one / both for one, both in wall],
        "cpu_ratio": median([one / both for one, both in busy]),
    }


@click.command()
@click.option("--processes", default=2, show_default=True)
@click.option("--batch", default=100, show_default=True, help="Edits.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--steps", default=10, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(processes: int, batch: int, repeats: int, steps: int, out: Path | None) -> None:
    """Time a batch's targets on one process and on several."""
    launch = Launch.read(os.environ)
    if launch.size == 1:
        sys.exit(_launch(processes, sys.argv[1:]))
    torch.set_num_threads(1)
    keep_freed()
    options = TargetOptions(steps=steps, stop_loss=0.0, lr=0.1)
    with joined(launch, device="cpu") as team:
        found = measured(team, batch, repeats, options)
        talk = talking(team)
    if not launch.leads:
        return
    table = Table(
        "batch", "1 process, s", f"{launch.size} processes, s", "ratio", "CPU ratio", "exchange, ms", "gather, MB/s"
    )
    figures = (found["alone_seconds"], found["shared_seconds"], found["ratio"], found["cpu_ratio"])
    talked = (talk["exchange_seconds"] * 1e3, talk["gather_bytes_per_second"] / 1e6)
    table.add_row(str(batch), *(f"{figure:.2f}" for figure in (*figures, *talked)))
    Console().print(table)
    shape = {"model": "bundled", "processes": launch.size, "batch": batch, "steps": steps, "repeats": repeats}
    write_result("distributed", {**shape, **found, **talk}, out)


def _launch(processes: int, arguments: Sequence[str]) -> int:
    """Start this benchmark in so many processes of one thread each; return the launcher's exit code."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, "-m", "benchmarks.distributed", *arguments], env=environment).returncode


if __name__ == "__main__":
    main()
