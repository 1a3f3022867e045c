"""The long-horizon proof: what every stack retains, in batches of 100, edit by edit, and far beyond what it can hold.

``python -m benchmarks.proof OUT`` runs all of it, some eighty minutes on one core; stopped, it goes on in OUT, and over
finished runs it writes the results again in a minute or two. ``benchmarks.document`` turns them into a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from editcli.commands.bench import BenchReport, bench, parse_stacks
from editcli.commands.evaluate import EvalRecipe, measure
from editcli.models.loading import bundled_folder
from editcli.plugin.manager import Plugins, load_plugins
from editcli.render.bench import bench_table, plot_bench
from editcli.render.console import RichReporter, stdout
from editcli.settings.recipe import Recipe
from editcli.storage.files import write_json
from tools.bundled_model.stream import build_stream, write_records
from tools.bundled_model.world import build_world

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs"
STREAM = "sample_edits/stream.jsonl"


@dataclass(frozen=True, slots=True)
class Part:
    """One bench of the proof; ``facts`` edits so many facts of every subject, in a stream of its own."""

    stacks: str
    batch: int
    edits: int
    every: int
    facts: int = 1
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    drift: bool = False
    """Whether general ability is measured as well, which takes some seconds for each stack."""

    def recipe(self, name: str, out: Path) -> Recipe:
        """Return what the bench is run by; writes its stream where it needs one."""
        edits, limit = STREAM, None if self.edits == 2000 else self.edits
        if self.facts > 1:
            edits = str(out / f"{name}.jsonl")
            write_records(Path(edits), build_stream(build_world(), edits=6000, seed=5, facts=self.facts))
        return Recipe(
            edits=edits,
            out=str(out / name),
            batch_size=self.batch,
            limit=limit,
            eval_every=self.every,
            settings=self.settings,
        )


FIVE = "memit,memit+nas,memit+revive,alphaedit,rlsedit"
PARTS: Mapping[str, Part] = {
    "batch100": Part(f"{FIVE},rlsedit+nas,rlsedit+nas+revive", batch=100, edits=2000, every=2, drift=True),
    "batch1": Part(FIVE, batch=1, edits=500, every=50),
    # One generated context instead of five for each target value, because the stream is twice as long.
    "long": Part(
        "memit,memit+nas,alphaedit,rlsedit",
        batch=100,
        edits=4000,
        every=4,
        facts=3,
        settings={"targets": {"prefixes": "1"}},
    ),
}


def record(report: BenchReport, part: Part, plugins: Plugins) -> dict[str, Any]:
    """Return what the page needs of a bench, without where it lay, and what it cost in general ability."""
    curves = []
    for curve, line in zip(report.curves, report.to_json()["curves"], strict=True):
        drift = general_ability(Path(curve.out), plugins) if part.drift else None
        law = None if curve.growth is None else curve.growth.law
        kept = {key: value for key, value in line.items() if key != "out"}
        curves.append({**kept, "law": law, "drift": drift})
    return {"batch_size": part.batch, "edits": part.edits, "every": part.every, "curves": curves}


def general_ability(run: Path, plugins: Plugins) -> dict[str, Any] | None:
    """Return perplexity and divergence from the base on the first quarter of the bundled held-out text."""
    lines = (bundled_folder() / "heldout.txt").read_text("utf-8").splitlines(keepends=True)
    text = run.parent / "heldout.txt"
    text.write_text("".join(lines[: len(lines) // 4]), "utf-8")
    drift = measure(EvalRecipe(model=str(run), base="bundled", text=str(text)), plugins).drift
    return None if drift is None else drift.to_json()


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--part", "chosen", multiple=True, type=click.Choice(list(PARTS)), help="Only these; repeat it.")
@click.option("--stacks", help="Only these, with commas.")
def main(out: Path, chosen: Sequence[str], stacks: str | None) -> None:
    """Run the proof, or go on with it, in the folder OUT."""
    plugins, reporter = load_plugins(), RichReporter()
    out.mkdir(parents=True, exist_ok=True)
    for name in chosen or PARTS:
        part = PARTS[name]
        names = parse_stacks(stacks or part.stacks, plugins)
        report = bench(part.recipe(name, out.absolute()), names, plugins, reporter)
        write_json(RESULTS / f"proof-{name}.json", record(report, part, plugins))
        plot_bench(report, PICTURES / f"proof-{name}.png", reporter)
        stdout().print(bench_table(report))


if __name__ == "__main__":
    main()
