"""Reading and writing all sites of a batch: going on from the last written site against starting at token zero.

``python -m benchmarks.sites`` prints one table and writes benchmarks/results/sites.json. Both ways read the same bytes
(tests/editing/test_session.py); rounds are interleaved and each ratio is taken within one round.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import bundled, median, random_model, sample_edits, write_result
from editcli.editing.session import ModelSession
from editcli.heap import keep_freed
from editcli.plugin.interfaces import LowRank, Values
from editcli.requests.schema import EditRequest


def seconds(session: ModelSession, edits: Sequence[EditRequest], values: Values, *, anew: bool) -> float:
    """Read and write every site of one batch; put the weights back; return the CPU seconds without the putting back."""
    before = session.masters()
    session.forget_reads()
    started = time.process_time()
    for site in session.sites:
        if anew:
            session.forget_reads()
        keys = session.keys(edits, site)
        if anew:
            session.forget_reads()
        residual = session.residual(edits, site, values)
        session.write(site, LowRank(residual / keys.norm() ** 2, keys))
    spent = time.process_time() - started
    session.restore(before)
    return spent


@click.command()
@click.option("--model", "names", multiple=True, default=("bundled", "gpt2-124m"), show_default=True)
@click.option("--batch-size", default=100, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(names: tuple[str, ...], batch_size: int, repeats: int, device: str, out: Path | None) -> None:
    """Time the sites of one batch, both ways."""
    keep_freed()
    table = Table("model", "sites", "from token zero, s", "going on, s", "ratio")
    rows = []
    for name in names:
        loaded = bundled(device) if name == "bundled" else random_model(name, device=device)
        layers = range(2, 7) if loaded.architecture.layers > 7 else range(1, loaded.architecture.layers - 1)
        session, edits = ModelSession(loaded, list(layers), seed=0), sample_edits(batch_size)
        size = loaded.architecture.shape(0)[0]
        target, initial, written = (torch.randn(size, batch_size, device=session.device) for _ in range(3))
        values = Values(target=target, initial=initial, written=written, dropped={}, loss=torch.zeros(batch_size))
        rounds = [[seconds(session, edits, values, anew=anew) for anew in (True, False)] for _ in range(repeats + 1)]
        zero, going = (median([times[way] for times in rounds[1:]]) for way in (0, 1))
        ratio = median([times[0] / times[1] for times in rounds[1:]])
        rows.append({"model": name, "sites": len(layers), "zero": zero, "going_on": going, "ratio": ratio})
        table.add_row(name, str(len(layers)), f"{zero:.3f}", f"{going:.3f}", f"{ratio:.2f}")
    Console().print(table)
    write_result("sites", {"batch_size": batch_size, "repeats": repeats, "rows": rows}, out)


if __name__ == "__main__":
    main()
