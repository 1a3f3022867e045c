"""Target optimisation: the published one-at-a-time procedure against ours, at several batch sizes.

``python -m benchmarks.targets`` prints one table and writes benchmarks/results/targets.json. Edits per second are
compared within one run, interleaved; the stop threshold is switched off so that every edit costs all its steps.
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
from editcli.editing.reference import plain_target
from editcli.editing.session import generate_prefixes
from editcli.editing.targets import TargetOptions, optimise
from editcli.edits import EditRequest
from editcli.models.loading import LoadedModel
from editcli.report import Silent


def seconds(loaded: LoadedModel, edits: Sequence[EditRequest], layer: int, options: TargetOptions, how: str) -> float:
    """Return the seconds that ``how`` takes for ``edits``."""
    prefixes = generate_prefixes(loaded, options, seed=0)
    started = time.perf_counter()
    if how == "plain":
        for edit in edits:
            plain_target(loaded, edit, prefixes, layer, options)
    else:
        optimise(loaded, edits, prefixes, layer, options, Silent())
    return time.perf_counter() - started


@click.command()
@click.option("--model", "names", multiple=True, default=("bundled", "gpt2-124m"), show_default=True)
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 10, 100), show_default=True)
@click.option("--plain-edits", default=3, show_default=True, help="Edits of the plain path in each round.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--steps", default=10, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(
    names: tuple[str, ...],
    batches: tuple[int, ...],
    plain_edits: int,
    repeats: int,
    steps: int,
    device: str,
    out: Path | None,
) -> None:
    """Time target optimisation, plain and ours, and print edits per second and their ratio."""
    options = TargetOptions(steps=steps, stop_loss=0.0, lr=0.1)
    table = Table("model", "batch", "plain edits/s", "cached=false edits/s", "ours edits/s", "ours / plain")
    rows = []
    for name in names:
        loaded = bundled(device) if name == "bundled" else random_model(name, device=device)
        layer = max(1, round(0.28 * loaded.architecture.layers) - 1)
        for batch in batches:
            rates: dict[str, list[float]] = {"plain": [], "uncached": [], "ours": []}
            for _ in range(repeats):
                edits = sample_edits(batch)
                few = edits[:plain_edits]
                rates["plain"].append(len(few) / seconds(loaded, few, layer, options, "plain"))
                uncached = TargetOptions(steps=steps, stop_loss=0.0, lr=0.1, cached=False)
                rates["uncached"].append(batch / seconds(loaded, edits, layer, uncached, "ours"))
                rates["ours"].append(batch / seconds(loaded, edits, layer, options, "ours"))
            ratio = median([ours / plain for ours, plain in zip(rates["ours"], rates["plain"], strict=True)])
            middle = {how: median(found) for how, found in rates.items()}
            rows.append({"model": name, "batch": batch, "layer": layer, "edits_per_second": middle, "ratio": ratio})
            table.add_row(name, str(batch), *(f"{middle[how]:.2f}" for how in rates), f"{ratio:.1f}")
    Console().print(table)
    write_result("targets", {"steps": steps, "repeats": repeats, "threads": torch.get_num_threads(), "rows": rows}, out)


if __name__ == "__main__":
    main()
