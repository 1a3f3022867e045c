"""One batch's solve and down-date: the inverse-Gram form against torch.linalg.solve on the published form.

``python -m benchmarks.solve`` prints one table and writes benchmarks/results/solve.json.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import median, timed, write_result
from editcli.editing.leastsquares import InverseGram, working_dtype
from editcli.report import Silent


@click.command()
@click.option("--width", "widths", multiple=True, type=int, default=(1024, 4096), show_default=True, help="d_in.")
@click.option("--edits", default=100, show_default=True)
@click.option("--rows", default=1024, show_default=True, help="d_out.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(widths: tuple[int, ...], edits: int, rows: int, repeats: int, device: str, out: Path | None) -> None:
    """Time one batch's solve at several key widths."""
    table = Table("d_in", "published solve, s", "inverse Gram, s", "with down-date, s", "solve ratio")
    place = torch.device(device)
    kind = working_dtype(place)
    results = []
    for width in widths:
        draw = torch.Generator(device=place).manual_seed(width)
        factor = torch.randn(width, width, generator=draw, device=place, dtype=kind)
        gram = factor @ factor.T / width + torch.eye(width, device=place, dtype=kind)
        keys = torch.randn(width, edits, generator=draw, device=place, dtype=kind)
        residual = torch.randn(rows, edits, generator=draw, device=place, dtype=kind)
        memory = InverseGram.inverting(gram.double(), site="benchmark", device=place, reporter=Silent())

        def published(gram: torch.Tensor = gram, keys: torch.Tensor = keys, residual: torch.Tensor = residual) -> None:
            torch.linalg.solve(gram + keys @ keys.T, keys) @ residual.T

        def ours(memory: InverseGram = memory, keys: torch.Tensor = keys, residual: torch.Tensor = residual) -> None:
            memory.solve(keys, residual)

        def remembered(memory: InverseGram = memory, keys: torch.Tensor = keys) -> None:
            memory.downdated(keys)

        def wait() -> None:
            if place.type != "cpu":
                torch.accelerator.synchronize()

        first, second, third = (
            median(timed(work, repeats=repeats, synchronize=wait)) for work in (published, ours, remembered)
        )
        results.append({"d_in": width, "published": first, "inverse_gram": second, "downdate": third})
        table.add_row(str(width), f"{first:.4f}", f"{second:.4f}", f"{second + third:.4f}", f"{first / second:.1f}")
    Console().print(table)
    write_result("solve", {"edits": edits, "rows": rows, "dtype": str(kind), "device": device, "rows_": results}, out)


if __name__ == "__main__":
    main()
