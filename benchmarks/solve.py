"""One batch's solve and down-date: the inverse-Gram form against torch.linalg.solve on the published form.

``python -m benchmarks.solve`` prints one table and writes benchmarks/results/solve.json. The published form builds
w C + K K^T and solves it anew for every batch, which costs d_in^3; ours is timed after ``prepare``. Rounds are
interleaved and each ratio is taken within one round. ``--large`` adds d_in 14336, for an accelerator.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import median, write_result
from editcli.heap import keep_freed
from editcli.plugin.leastsquares import InverseGram, working_dtype
from editcli.reporting import Silent

LARGE = 14336


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call; on a CPU those of the processor, so that a neighbour does not count."""
    if device.type == torch.device("cpu").type:
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.accelerator.synchronize()
    started = time.perf_counter()
    work()
    torch.accelerator.synchronize()
    return time.perf_counter() - started


def measure(width: int, edits: int, rows: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Time both forms at one width of keys, and say how far their updates are apart."""
    draw, kind = torch.Generator(device=device).manual_seed(width), working_dtype(device)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, device=device, dtype=kind)

    factor = random(width, width)
    gram = factor @ factor.T / width
    gram.diagonal().add_(1.0)
    del factor
    keys, residual = random(width, edits), random(rows, edits)
    memory = InverseGram.inverting(gram, site="benchmark", device=device, reporter=Silent())

    def published() -> Tensor:
        return torch.linalg.solve(gram + keys @ keys.T, keys) @ residual.T

    def ours() -> object:
        return memory.solve(keys, residual)

    def remembered() -> object:
        return memory.downdated(keys)

    rounds = [[seconds(work, device) for work in (published, ours, remembered)] for _ in range(repeats + 1)][1:]
    expected, found = published().T, memory.solve(keys, residual).dense()
    names = ("published", "inverse_gram", "downdate")
    middle = {name: median([times[place] for times in rounds]) for place, name in enumerate(names)}
    ratio = median([times[0] / times[1] for times in rounds])
    apart = float((found - expected).norm() / expected.norm())
    return {
        "d_in": width,
        **middle,
        "ratio": ratio,
        "with_downdate": middle["published"] / _both(middle),
        "apart": apart,
    }


def _both(middle: dict[str, float]) -> float:
    return middle["inverse_gram"] + middle["downdate"]


@click.command()
@click.option("--width", "widths", multiple=True, type=int, default=(1024, 4096), show_default=True, help="d_in.")
@click.option("--large", is_flag=True, help=f"Also d_in {LARGE}.")
@click.option("--edits", default=100, show_default=True)
@click.option("--rows", default=1024, show_default=True, help="d_out.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(
    widths: tuple[int, ...], large: bool, edits: int, rows: int, repeats: int, device: str, out: Path | None
) -> None:
    """Time one batch's solve at several key widths."""
    keep_freed()
    table = Table("d_in", "published solve, s", "inverse Gram, s", "down-date, s", "solve ratio", "with down-date")
    place, results = torch.device(device), []
    for width in (*widths, *([LARGE] if large else [])):
        row = measure(width, edits, rows, repeats, place)
        results.append(row)
        times = [f"{row[name]:.4f}" for name in ("published", "inverse_gram", "downdate")]
        table.add_row(str(width), *times, f"{row['ratio']:.1f}", f"{row['with_downdate']:.1f}")
    Console().print(table)
    kind = str(working_dtype(place)).removeprefix("torch.")
    write_result("solve", {"edits": edits, "d_out": rows, "dtype": kind, "device": device, "rows": results}, out)


if __name__ == "__main__":
    main()
