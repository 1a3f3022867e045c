"""Why edits are forgotten, and what a filter could do about it: read from the factors that the runs of a bench kept.

``python -m benchmarks.interference BENCH --stats FILE --stats FILE`` takes the run folders of an ``editcli bench``, or
of a horizon, as far as they kept keys and residuals: editors without targets have none. Everything is computed with
NumPy in float64 from the files alone, by the equations of the papers and not by the library's own code, so that it
checks the library as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from benchmarks.common import run_folders
from benchmarks.predictors import read_base
from editcli.models.loading import first_model
from editcli.presets.loader import all_presets
from editcli.records.history import History, read_history
from editcli.storage.files import write_json

RESULTS = Path(__file__).parent / "results" / "interference.json"
TAU = 0.1
Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one batch wrote at one site: D = left right^T for keys and residual, one column per edit."""

    keys: Matrix
    residual: Matrix
    left: Matrix
    right: Matrix

    def answer(self, keys: Matrix) -> Matrix:
        """Return what this batch adds to the outputs for ``keys``."""
        return self.left @ (self.right.T @ keys)


class Protected:
    """The leading singular directions that REVIVE protects, by its definition."""

    def __init__(self, weight: Matrix, tau: float = TAU):
        left, self.values, right = np.linalg.svd(weight, full_matrices=False)
        self.k = int((self.values.cumsum() < tau * self.values.sum()).sum()) + 1
        self.left, self.right = left[:, : self.k], right[: self.k].T

    @cached_property
    def spectrum(self) -> dict[str, float]:
        """How flat the spectrum is."""
        share = self.values / self.values.sum()
        return {
            "k": self.k,
            "of": len(self.values),
            "effective_rank": float(np.exp(-(share * np.log(share)).sum())),
            "largest_over_median": float(self.values[0] / np.median(self.values)),
            "energy": energy(self.values[: self.k]) / energy(self.values),
        }

    def filtered(self, update: Matrix) -> Matrix:
        """Return (I - U U^T) D (I - V V^T)."""
        rows = update - self.left @ (self.left.T @ update)
        return rows - (rows @ self.right) @ self.right.T


@dataclass(frozen=True, slots=True)
class Interference:
    """What the batches of one stack did to the first of them, at one site."""

    stack: str
    site: str
    unwritten: float
    """||D K - R|| / ||R|| of the first batch: how much of what was to be written was not."""
    later_over_own: float
    """What all later batches add at the first batch's keys, over what it wrote there itself."""
    removable: float
    """Share of the energy of that addition which acts on the protected directions, left or right."""
    residual_protected: float
    """Share of the residuals' energy that lies in the protected output directions, mean over batches."""
    touched: float
    """The largest share of any update's norm on the protected directions; 0 for REVIVE but for rounding."""


def measure(stack: str, site: str, batches: Sequence[Batch], kept: Protected) -> Interference:
    """Measure one stack at one site."""
    first, rest = batches[0], batches[1:]
    own, later = first.answer(first.keys), total(batch.answer(first.keys) for batch in rest)
    through = first.keys - kept.right @ (kept.right.T @ first.keys)
    outside = total(batch.answer(through) for batch in rest)
    outside = outside - kept.left @ (kept.left.T @ outside)
    shares = [energy(kept.left.T @ batch.residual) / energy(batch.residual) for batch in batches]
    sides = [(kept.left, batch.left) for batch in batches] + [(kept.right, batch.right) for batch in batches]
    return Interference(
        stack=stack,
        site=site,
        unwritten=ratio(own - first.residual, first.residual),
        later_over_own=ratio(later, own),
        removable=energy(later - outside) / energy(later),
        residual_protected=float(np.mean(shares)),
        touched=max(ratio(basis.T @ factor, factor) for basis, factor in sides),
    )


def published(batch: Batch, moment: Matrix, weight: float) -> Matrix:
    """Return MEMIT's update as it is published, R K^T (w C + K K^T)^-1."""
    gram = weight * moment + batch.keys @ batch.keys.T
    return np.linalg.solve(gram, batch.keys @ batch.residual.T).T


def total(parts: Iterable[Matrix]) -> Matrix:
    """Return the sum of matrices."""
    return np.sum(list(parts), axis=0)


def energy(matrix: Matrix) -> float:
    """Return ||A||_F^2."""
    return float(np.square(matrix).sum())


def ratio(part: Matrix, whole: Matrix) -> float:
    """Return ||A||_F / ||B||_F."""
    return float(np.linalg.norm(part) / np.linalg.norm(whole))


def read_run(run: Path) -> History:
    """Return the history of a run."""
    history = read_history(run)
    if history is None or history.record is None:
        raise click.UsageError(f"{run} is no run folder")
    return history


def read_batches(history: History) -> dict[str, list[Batch]]:
    """Return the batches of a run by site; nothing for a run that kept no keys and residuals."""
    batches: dict[str, list[Batch]] = {site: [] for site in history.sites}
    names = ("keys", "residual", "left", "right")
    for batch in history.batches:
        tensors = load_file(history.folder.updates / batch.segment)
        for site, known in batches.items():
            if any(f"{site}.{name}" not in tensors for name in names):
                return {}
            known.append(Batch(*(tensors[f"{site}.{name}"].double().numpy() for name in names)))
    return batches


def read_spectra(histories: Iterable[History]) -> dict[str, Protected]:
    """Return the protected directions of every edited site of the runs' base."""
    spectra: dict[str, Protected] = {}
    for history in histories:
        source = first_model(history.bases)
        if source is None:
            raise click.UsageError(f"the base of {history.folder.out} is not where it was")
        spectra |= {site: Protected(read_base(source, site)) for site in history.sites if site not in spectra}
    return spectra


def checks(
    runs: Mapping[str, Mapping[str, Sequence[Batch]]], kept: Mapping[str, Protected], moments: Mapping[str, Matrix]
) -> Iterator[dict[str, Any]]:
    """Yield how far the bundled model's recorded updates are from the published equations, computed anew."""
    preset = next(preset for preset in all_presets() if preset.name == "bundled")
    weight = float(preset.settings["memit"]["mom2_update_weight"])
    for stack in ("memit", "memit+revive"):
        for site, batches in runs.get(stack, {}).items():
            wanted = published(batches[0], moments[site], weight)
            wanted = kept[site].filtered(wanted) if stack.endswith("revive") else wanted
            off = ratio(batches[0].left @ batches[0].right.T - wanted, wanted)
            yield {"stack": stack, "site": site, "relative_error": off}


def read_moments(files: Sequence[Path]) -> dict[str, Matrix]:
    """Return second moments by site."""
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    ending = ".second_moment"
    return {name.removesuffix(ending): t.double().numpy() for name, t in tensors.items() if name.endswith(ending)}


@click.command()
@click.argument("bench", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--stats",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Second moments of the bundled model, to check.",
)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS)
def main(bench: Path, stats: tuple[Path, ...], out: Path) -> None:
    """Measure the interference between the batches of every stack in BENCH."""
    histories = {name: read_run(path) for name, path in run_folders(bench).items()}
    runs = {name: batches for name, history in histories.items() if (batches := read_batches(history))}
    kept = read_spectra(histories[name] for name in runs)
    # A stream of one batch has none that comes later.
    rows = [
        measure(name, site, batches, kept[site])
        for name, run in runs.items()
        for site, batches in run.items()
        if len(batches) > 1
    ]
    moments = read_moments(stats)
    found = {
        "spectra": {site: protected.spectrum for site, protected in kept.items()},
        "stacks": [asdict(row) for row in rows],
        "checks": list(checks(runs, kept, moments)) if moments else [],
    }
    write_json(out, found)
    click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
