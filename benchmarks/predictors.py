"""Which figure of the weights says best how many edits a stream retains: ``python -m benchmarks.predictors BENCH ...``.

Each BENCH is the folder of an ``editcli bench --eval-every N``, or of a horizon. After every measurement of retention
the edited weights are put together from the factors that the runs kept, and compared with the base's: R_n, drift, LS,
SS and the relative change along singular directions. The table holds Spearman's rank correlation of each figure with
each retained figure, over all measurements of all stacks, within each stack, and among the stacks at an equal number of
edits. The number of edits is a row as well: a figure that says no more than that needs no weights.

Everything is computed with NumPy in float64 from the files alone, and not by the library's own code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from benchmarks.common import run_folders, write_result
from benchmarks.markdown import table
from editcli.models.loading import ModelSource, first_model
from editcli.records.history import History, read_history

TAU = 0.1
LEADING = 16
"""Directions over which the relative change is a mean."""
LEAST = 4
"""Measurements below which ranks say nothing."""
Matrix = NDArray[np.float64]
RETAINED = ("efficacy_accuracy", "efficacy_success", "generalization_accuracy", "specificity_accuracy")
NAMES: Mapping[str, str] = {
    "edits": "number of edits, n",
    "ratio": "R_n",
    "drift": "drift",
    "ls": "LS",
    "ss": "SS",
    "change": f"relative change, mean of the {LEADING} leading directions",
    "change_largest": f"relative change, largest of the {LEADING} leading directions",
    "change_all": "relative change, mean of all directions",
    "change_median": "relative change, median of all directions",
    "change_per_edit": "relative change / sqrt(n)",
}
FALLING = ("ls", "ss")
"""Figures of which less is worse, so that the worst site has the least."""


@dataclass(frozen=True, slots=True)
class Decomposed:
    """A base's weight and its singular value decomposition."""

    weight: Matrix
    left: Matrix
    values: Matrix
    right: Matrix
    k: int

    @classmethod
    def of(cls, weight: Matrix) -> Decomposed:
        """Decompose a weight; k is the fewest leading values that sum to :data:`TAU` of the whole."""
        left, values, right = np.linalg.svd(weight, full_matrices=False)
        k = int((values.cumsum() < TAU * values.sum()).sum()) + 1
        return cls(weight, left, values, right.T, k)

    def figures(self, edited: Matrix, edits: int) -> dict[str, float]:
        """Return every figure of one edited weight."""
        norm, k = np.linalg.norm(self.weight), self.k
        left, values, right = np.linalg.svd(edited, full_matrices=False)
        over_left, over_right = self.left[:, :k].T @ left[:, :k], self.right[:, :k].T @ right[:k].T
        product = (np.outer(self.values[:k], values[:k]) * over_left * over_right).sum()
        changes = np.abs(np.einsum("ik,ij,jk->k", self.left, edited - self.weight, self.right, optimize=True))
        changes = changes / self.values
        return {
            "edits": float(edits),
            "ratio": float(np.linalg.norm(edited) / norm),
            "drift": float(np.linalg.norm(edited - self.weight) / norm),
            "ls": float(product / (np.linalg.norm(self.values[:k]) * np.linalg.norm(values[:k]))),
            "ss": float((np.abs(np.diag(over_left)).mean() + np.abs(np.diag(over_right)).mean()) / 2),
            "change": float(changes[:LEADING].mean()),
            "change_largest": float(changes[:LEADING].max()),
            "change_all": float(changes.mean()),
            "change_median": float(np.median(changes)),
            "change_per_edit": float(changes[:LEADING].mean() / math.sqrt(edits)),
        }


def measurements(run: Path) -> Iterator[dict[str, float]]:
    """Yield, after each measurement of a run, the figures of its worst site and what it retained."""
    history = read_history(run)
    source = None if history is None else first_model(history.bases)
    if history is None or source is None:
        raise click.UsageError(f"{run} is no run whose base is where it was")
    bases = {site: Decomposed.of(read_base(source, site)) for site in history.sites}
    weights = {site: base.weight.copy() for site, base in bases.items()}
    edits = 0
    for batch in history.batches:
        edits += len(batch.edits)
        for site, update in updates(history, str(batch.segment)):
            weights[site] += update
        retained = batch.measured("retained")
        if retained:
            figures = [base.figures(weights[site], edits) for site, base in bases.items()]
            known = {name: value for name in RETAINED if (value := retained.get(name)) is not None}
            yield {**worst(figures), **known}


def worst(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return each figure at the site where it is worst."""
    return {name: (min if name in FALLING else max)(one[name] for one in figures) for name in NAMES}


def read_base(source: ModelSource, site: str) -> Matrix:
    """Read one matrix as it is stored."""
    return source.checkpoint.read(source.checkpoint.tensor_for(f"{site}.weight")).double().numpy()


def updates(history: History, segment: str) -> Iterator[tuple[str, Matrix]]:
    """Yield what a batch added to each site."""
    tensors = load_file(history.folder.updates / segment)
    for site in history.sites:
        if f"{site}.dense" in tensors:
            yield site, tensors[f"{site}.dense"].double().numpy()
        else:
            left, right = (tensors[f"{site}.{side}"].double().numpy() for side in ("left", "right"))
            yield site, left @ right.T


def correlations(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return, for each retained figure and each figure of the weights, three rank correlations: over all measurements
    of all stacks, the mean of those within each stack, and the mean of those among stacks at each number of edits."""
    everything = [row for stack in rows.values() for row in stack]
    return {
        retained: {
            name: {
                "together": correlation(everything, name, retained),
                "within": mean([correlation(stack, name, retained) for stack in rows.values()]),
                "among": mean([correlation(group, name, retained) for group in at_equal_edits(everything)]),
            }
            for name in NAMES
        }
        for retained in RETAINED
        if all(retained in row for row in everything)
    }


def at_equal_edits(rows: Sequence[Mapping[str, float]]) -> Iterator[list[Mapping[str, float]]]:
    """Yield the measurements of several stacks that were taken after the same number of edits."""
    for count in sorted({row["edits"] for row in rows}):
        yield [row for row in rows if row["edits"] == count]


def correlation(rows: Sequence[Mapping[str, float]], name: str, retained: str) -> float | None:
    """Return Spearman's rank correlation of two figures; None where one of them does not vary."""
    # Nothing else needs it, and the page is written without it.
    from scipy.stats import spearmanr

    pairs = np.array([(row[name], row[retained]) for row in rows])
    if len(pairs) < LEAST or (pairs == pairs[0]).all(axis=0).any():
        return None
    return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def section(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe the correlations in Markdown."""
    yield from ("## Which figure of the weights says what is retained", "")
    yield "`editcli bench --eval-every N` on streams, then `python -m benchmarks.predictors BENCH ...`: Spearman's rank"
    yield "correlation of figures of the edited weights, at the worst site, with what was retained. Three numbers each:"
    yield "over all measurements of all stacks; the mean of those within a stack, where everything that grows with the"
    yield "number of edits looks alike; the mean of those among the stacks at an equal number of edits, which an alarm"
    yield "has to tell. The relative change along the i-th singular direction of the base is"
    yield "|u_i^T (W_n - W_0) v_i| / sigma_i; [metrics](metrics.md) has the definitions."
    yield ""
    yield from (result["result"]["about"], "") if result["result"]["about"] else ()
    for part in result["result"]["benches"]:
        yield f"### {part['model']}: {', '.join(part['stacks'])}"
        yield ""
        yield f"{part['measurements']} measurements, the last after {part['edits']:,} edits."
        yield ""
        retained = list(part["correlations"])
        rows = [
            (NAMES[name], *(_cell(part["correlations"][figure][name]) for figure in retained))
            for name in part["correlations"][retained[0]]
        ]
        yield from table(("figure", *(name.replace("_", " ") for name in retained)), rows)


def _cell(pair: Mapping[str, float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:.2f}" for value in pair.values())


def examine(bench: Path) -> dict[str, Any]:
    """Return the correlations of one bench, with what they were taken over."""
    runs = run_folders(bench)
    rows = {name: list(measurements(path)) for name, path in runs.items()}
    rows = {name: stack for name, stack in rows.items() if stack}
    history = read_history(next(iter(runs.values())))
    assert history is not None
    assert history.record is not None
    everything = [row for stack in rows.values() for row in stack]
    return {
        "model": Path(history.record.provenance.base.name).name,
        "stacks": list(rows),
        "measurements": len(everything),
        "edits": int(max(row["edits"] for row in everything)),
        "correlations": correlations(rows),
        "rows": rows,
    }


@click.command()
@click.argument("benches", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--about", default="", help="One paragraph on the streams and on the figures, for the page.")
@click.option("--out", type=click.Path(path_type=Path), default=None)
def main(benches: tuple[Path, ...], about: str, out: Path | None) -> None:
    """Correlate the figures of the weights with what the runs of every BENCH retained."""
    result = {"about": about, "benches": [examine(bench) for bench in benches]}
    write_result("predictors", result, out)
    click.echo("\n".join(section({"result": result})))


if __name__ == "__main__":
    main()
