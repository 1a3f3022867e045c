"""The sample stream end to end: time of each phase, edits per second along the way, memory, and what safety costs.

``python -m benchmarks.stream`` applies 2,000 edits to the bundled model through the public entry point, prints one
table and writes benchmarks/results/stream.json. Resident memory is read after batches, on Linux only.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.common import SHAPES, peak_memory, write_result
from editcli.plugin.manager import load_plugins
from editcli.runs.apply import apply
from editcli.runs.stream import Stream
from editcli.settings.recipe import Recipe

EDITS = Path(__file__).parents[1] / "sample_edits" / "stream.jsonl"
SITES_8B = 5
WATCHED = (500, 1000, 2000)
"""Numbers of edits after which resident memory is kept."""


class Watch:
    """Wraps the steps of a stream with clocks for as long as the process lives."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.seconds: list[float] = []
        self.resident: list[int] = []
        self.spent = {"_snapshot": 0.0, "_record": 0.0}

    def install(self) -> None:
        """Start watching every stream of this process."""
        for name in self.spent:
            setattr(Stream, name, self._timed(name, getattr(Stream, name)))
        batch = Stream.apply

        def apply(stream: Stream, requests: Sequence[Any]) -> Any:
            started = time.perf_counter()
            report = batch(stream, requests)
            self.seconds.append(time.perf_counter() - started)
            self.sizes.append(len(requests))
            self.resident.append(resident())
            return report

        setattr(Stream, batch.__name__, apply)

    def _timed(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return real(*arguments)
            finally:
                self.spent[name] += time.perf_counter() - started

        return timed

    def result(self) -> dict[str, Any]:
        """Return the figures."""
        done = [sum(self.sizes[: place + 1]) for place in range(len(self.sizes))]
        steps = list(zip(done, self.resident, strict=True))
        after = {count: next((found for edits, found in steps if edits >= count), 0) for count in WATCHED}
        rates = quarters(self.sizes, self.seconds)
        total = sum(self.seconds)
        return {
            "edits_per_second_by_quarter": rates,
            "last_over_first_quarter": rates[0] / rates[-1],
            "resident_bytes": {str(count): found for count, found in after.items() if found},
            "snapshot_share": self.spent["_snapshot"] / total,
            # A snapshot is taken inside of what records a batch.
            "journal_share": (self.spent["_record"] - self.spent["_snapshot"]) / total,
            "batch_seconds": [round(seconds, 4) for seconds in self.seconds],
        }


def quarters(sizes: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """Return the edits per second of each quarter of the batches; fewer parts for fewer than four batches."""
    parts = min(4, len(sizes))
    bounds = [round(part * len(sizes) / parts) for part in range(parts + 1)]
    return [sum(sizes[a:b]) / sum(seconds[a:b]) for a, b in itertools.pairwise(bounds)]


def resident() -> int:
    """Return this process's resident memory in bytes; 0 where the system does not say it in a file."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.is_file() else 0


def on_disk(folder: Path, edits: int) -> dict[str, Any]:
    """Return what a stream left on disk, and what one edit of a Llama-3-8B with five sites would."""
    segments = sum(path.stat().st_size for path in (folder / "updates").iterdir())
    state, journal = ((folder / file).stat().st_size for file in ("state.safetensors", "journal.jsonl"))
    shape = SHAPES["llama-3-8b"]
    # Per edit and site: key and right factor of the inner width, residual and left factor of the outer, float32.
    computed = SITES_8B * 8 * (shape["intermediate_size"] + shape["hidden_size"])
    return {
        "bytes_per_edit": round((segments + journal) / edits),
        "state_bytes": state,
        "llama_3_8b_bytes_per_edit": computed,
    }


@click.command()
@click.option("--edits", default=2000, show_default=True)
@click.option("--batch-size", default=100, show_default=True)
@click.option("--editor", default="memit", show_default=True)
@click.option("--stabilizer", "stabilizers", multiple=True, default=("nas", "revive"), show_default=True)
@click.option("--model", help="Folder or hub id. [default: the bundled model]")
@click.option("--steps", type=int, help="Steps of each target's optimisation. [default: the preset's]")
@click.option("--out", type=click.Path(path_type=Path))
def main(
    edits: int,
    batch_size: int,
    editor: str,
    stabilizers: tuple[str, ...],
    model: str | None,
    steps: int | None,
    out: Path | None,
) -> None:
    """Apply a stream end to end and show where time and memory go."""
    watch = Watch()
    watch.install()
    with tempfile.TemporaryDirectory() as name:
        recipe = Recipe(
            edits=str(EDITS),
            model=model,
            editor=editor,
            stabilizers=stabilizers,
            batch_size=batch_size,
            limit=edits,
            evaluate=False,
            settings={} if steps is None else {"targets": {"steps": steps}},
            out=str(Path(name) / "out"),
        )
        report = apply(recipe, load_plugins())
        result = {"phases": report.seconds, **watch.result(), **on_disk(Path(name) / "out" / "editcli", edits)}
    result |= {"edits": edits, "batch_size": batch_size, "editor": editor, "stabilizers": list(stabilizers)}
    result["peak_bytes"] = peak_memory()
    Console().print(_table(result))
    write_result("stream", result, out)


def _table(result: dict[str, Any]) -> Table:
    table = Table("figure", "value")
    for phase, seconds in result["phases"].items():
        table.add_row(f"seconds: {phase}", f"{seconds:.1f}")
    rates = result["edits_per_second_by_quarter"]
    table.add_row("edits per second, by quarter", ", ".join(f"{rate:.2f}" for rate in rates))
    for count, found in result["resident_bytes"].items():
        table.add_row(f"resident after {count} edits, GB", f"{found / 1e9:.3f}")
    table.add_row("peak memory, GB", f"{result['peak_bytes'] / 1e9:.2f}")
    for name in ("snapshot_share", "journal_share"):
        table.add_row(name.replace("_", " "), f"{result[name]:.2%}")
    return table


if __name__ == "__main__":
    main()
