"""Cost against work: edits per second along a stream, and as prompts get longer.

``python -m benchmarks.stream`` applies the sample stream to the bundled model through the public entry point, prints
one table and writes benchmarks/results/stream.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.common import peak_memory, write_result
from editcli.plugins import load_plugins
from editcli.recipe import Recipe
from editcli.runs.apply import apply

STREAM = Path(__file__).parents[1] / "sample_edits" / "stream.jsonl"


@click.command()
@click.option("--edits", default=2000, show_default=True)
@click.option("--batch-size", default=100, show_default=True)
@click.option("--editor", default="memit", show_default=True)
@click.option("--stabilizer", "stabilizers", multiple=True, default=("nas",), show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(edits: int, batch_size: int, editor: str, stabilizers: tuple[str, ...], out: Path | None) -> None:
    """Apply a stream end to end and show where the time goes."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            edits=str(STREAM),
            editor=editor,
            stabilizers=stabilizers,
            batch_size=batch_size,
            limit=edits,
            evaluate=False,
            out=str(Path(folder) / "out"),
        )
        report = apply(recipe, load_plugins())
        lines = (Path(folder) / "out" / "editcli" / "journal.jsonl").read_text("utf-8").splitlines()
    batches = [json.loads(line)["seconds"] for line in lines]
    each = [batch["targets"] + batch["solve"] for batch in batches]
    quarter = max(1, len(each) // 4)
    flat = (sum(each[-quarter:]) / quarter) / (sum(each[:quarter]) / quarter)
    table = Table("figure", "value")
    for phase, seconds in report.seconds.items():
        table.add_row(f"seconds: {phase}", f"{seconds:.1f}")
    table.add_row("edits per second", f"{edits / (report.seconds['targets'] + report.seconds['solve']):.2f}")
    table.add_row("last / first quarter", f"{flat:.3f}")
    table.add_row("peak memory, GB", f"{peak_memory() / 1e9:.2f}")
    Console().print(table)
    result = {"edits": edits, "seconds": report.seconds, "last_over_first_quarter": flat, "peak_bytes": peak_memory()}
    write_result("stream", {**result, "batch_seconds": each}, out)


if __name__ == "__main__":
    main()
