"""Memory, time per batch and the cost of safety along a long stream on the bundled model.

``python -m benchmarks.stream_memory`` applies 2,000 edits and writes benchmarks/results/stream_memory.json: resident
memory after 500 and after all edits, seconds per batch in the last quarter against the first, the share of the time
that went into snapshots and into the journal, and bytes on disk per edit, here and computed for a Llama-3-8B.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.common import SHAPES, write_result
from editcli.plugins import load_plugins
from editcli.recipe import Recipe
from editcli.runs.apply import apply
from editcli.runs.stream import Stream

EDITS = Path(__file__).parents[1] / "sample_edits" / "stream.jsonl"
SITES_8B = 5


@click.command()
@click.option("--edits", default=2000, show_default=True)
@click.option("--batch-size", default=20, show_default=True)
@click.option("--editor", default="memit", show_default=True)
@click.option("--stabilizer", "stabilizers", multiple=True, default=("nas", "revive"), show_default=True)
@click.option("--steps", type=int, help="Steps of each target's optimisation. [default: the preset's]")
@click.option("--out", type=click.Path(path_type=Path))
def main(
    edits: int, batch_size: int, editor: str, stabilizers: tuple[str, ...], steps: int | None, out: Path | None
) -> None:
    """Apply a stream and watch it."""
    watch = _Watch()
    with tempfile.TemporaryDirectory() as name:
        recipe = Recipe(
            edits=str(EDITS),
            editor=editor,
            stabilizers=stabilizers,
            batch_size=batch_size,
            limit=edits,
            evaluate=False,
            settings={} if steps is None else {"targets": {"steps": steps}},
            out=str(Path(name) / "out"),
        )
        watch.install()
        apply(recipe, load_plugins())
        folder = Path(name) / "out" / "editcli"
        segments = sum(path.stat().st_size for path in (folder / "updates").iterdir())
        state, journal = ((folder / file).stat().st_size for file in ("state.safetensors", "journal.jsonl"))
    result = watch.result(batch_size)
    result |= {"bytes_per_edit": round((segments + journal) / edits), "state_bytes": state, "batch_size": batch_size}
    shape = SHAPES["llama-3-8b"]
    # Per edit and site: key and right factor of the inner width, residual and left factor of the outer, float32.
    result["llama_3_8b_bytes_per_edit"] = SITES_8B * 8 * (shape["intermediate_size"] + shape["hidden_size"])
    write_result("stream_memory", {"edits": edits, "editor": editor, "stabilizers": list(stabilizers), **result}, out)
    click.echo(result)


class _Watch:
    """Wraps the steps of a stream with clocks."""

    def __init__(self) -> None:
        self.batches: list[float] = []
        self.resident: list[int] = []
        self.spent = {"_snapshot": 0.0, "_record": 0.0}

    def install(self) -> None:
        for name in self.spent:
            setattr(Stream, name, self._timed(name, getattr(Stream, name)))
        batch = Stream.apply

        def apply(stream: Stream, requests: Any) -> Any:
            started = time.perf_counter()
            report = batch(stream, requests)
            self.batches.append(time.perf_counter() - started)
            self.resident.append(_resident())
            return report

        Stream.apply = apply

    def _timed(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return real(*arguments)
            finally:
                self.spent[name] += time.perf_counter() - started

        return timed

    def result(self, batch_size: int) -> dict[str, Any]:
        """Return the figures."""
        quarter, total = max(1, len(self.batches) // 4), sum(self.batches)
        first, last = (sum(part) / quarter for part in (self.batches[:quarter], self.batches[-quarter:]))
        at_500 = min(500 // batch_size, len(self.resident)) - 1
        return {
            "resident_bytes_at_500": self.resident[at_500],
            "resident_bytes_at_end": self.resident[-1],
            "seconds_per_batch": total / len(self.batches),
            "last_over_first_quarter": last / first,
            "snapshot_share": self.spent["_snapshot"] / total,
            "journal_share": (self.spent["_record"] - self.spent["_snapshot"]) / total,
        }


def _resident() -> int:
    """Return this process's resident memory in bytes; Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
