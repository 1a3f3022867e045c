"""Models that differ in how they were trained, edited alike: ``python -m benchmarks.patients EDITS NAME=FOLDER ...``.

For each model: how flat the spectra of its edited weights are, by the figures of :mod:`benchmarks.interference` and
beside those of a random matrix of the same shape, and what stacks retain of a stream, by :mod:`benchmarks.horizon`. The
question is whether REVIVE helps where a model has dominant singular directions to protect. An interrupted run continues
when the command is given again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from benchmarks.common import write_result
from benchmarks.horizon import curve_of, job_of, run
from benchmarks.horizon_page import cohorts, layer_of, number
from benchmarks.interference import Protected
from benchmarks.markdown import table
from editcli.models.loading import open_model, resolve_model
from editcli.presets.loader import load_preset

STACKS = ("memit", "memit+revive", "memit+nas", "rlsedit")
FIGURES = {"efficacy success": "efficacy_success", "specificity accuracy": "specificity_accuracy"}
SPECTRUM = {"effective_rank": 1, "largest_over_median": 1, "k": 0, "energy": 2}
"""Figures of a spectrum and their digits."""


def spectra(folder: Path) -> dict[str, dict[str, float]]:
    """Return how flat each edited weight is, by its module's name, and a random one of the shape as ``random``."""
    loaded = open_model(resolve_model(folder))
    layers = load_preset(loaded.model.config, loaded.architecture).layers
    sites = [loaded.architecture.site(layer) for layer in layers]
    weights = {site.module: site.oriented(loaded.model.get_submodule(site.module).weight.detach()) for site in sites}
    matrices = {module: weight.double().numpy() for module, weight in weights.items()}
    shape = next(iter(matrices.values())).shape
    matrices["random"] = np.random.default_rng(0).standard_normal(shape)
    return {module: Protected(matrix).spectrum for module, matrix in matrices.items()}


def section(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe the models and what stacks retain on each."""
    yield from ("## A patient trained another way", "")
    found = result["result"]
    yield INTRODUCTION.format(limit=found["limit"], batch_size=found["batch_size"])
    rows = [
        (
            name,
            "random" if module == "random" else layer_of(module),
            *(f"{flat[one]:.{SPECTRUM[one]}f}" for one in SPECTRUM),
        )
        for name, model in found["models"].items()
        for module, flat in model["spectra"].items()
    ]
    yield from table(("model", "layer", "effective rank", "largest / median", "protected", "energy"), rows)
    yield "What is retained at the end: efficacy accuracy of all edits, of the first and of the last quarter, and"
    yield "further figures of a fixed sample of 200."
    yield ""
    lines = [
        (
            name,
            stack,
            *cohorts(curve),
            *(number(curve["points"][-1]["figures"].get(figure)) for figure in FIGURES.values()),
            number(curve["points"][-1]["ratio"]),
        )
        for name, model in found["models"].items()
        for stack, curve in model["stacks"].items()
    ]
    yield from table(("model", "stack", "retained", "first / last quarter", *FIGURES, "R_n"), lines)
    yield from (MEANING, "")


INTRODUCTION = """`python -m benchmarks.patients`, {limit} edits of the sample stream in batches of {batch_size}. *muon*
is the bundled model. *adamw* has the same facts, text and shape, and was trained with AdamW and a weight decay of 0.1:
`python -m tools.train_bundled_model --optimizer adamw --weight-decay 0.1 --decay-latest 1100 --decay-steps 500`. It
knows 0.994 of its real facts and all of the invented ones, over all phrasings
(`python -m tools.bundled_model.measure`). Both have the settings that were tuned
on the first. The spectra of the edited weights, with the directions that REVIVE protects at tau = 0.1 and their share
of the weight's energy:
"""

MEANING = """\
- *Is there a dominant subspace?* No. AdamW with a weight decay leaves spectra a little less flat, with a largest
  singular value of 1.8 medians in place of 1.4 (random: 1.3), but the protected directions have 0.15 of the energy
  (random: 0.13). Perhaps the facts need all directions of so small a model.
- *Do the papers' remedies help more there?* The patient is weaker: MEMIT retains 0.83 of its edits in place of 0.97,
  R_n is 3.55 in place of 2.26, and 0.65 of the neighbours are answered in place of 0.93. NAS then helps: 0.89 retained,
  0.75 of the neighbours, R_n 3.19. REVIVE answers 0.74 of the neighbours too, and retains fewer edits, 0.79. The
  memory of keys does most: RLSEdit retains 0.98, with 0.67 of the neighbours.
- *Which one ships?* The one trained with Muon. The papers' picture of a subspace to protect appears on neither, and
  edits disturb the shipped model less."""


@click.command()
@click.argument("edits", type=click.Path(exists=True, path_type=Path))
@click.argument("models", nargs=-1, required=True)
@click.option("--stack", "stacks", multiple=True, default=STACKS, show_default=True)
@click.option("--limit", default=500, show_default=True, help="The first N edits only.")
@click.option("--batch-size", default=100, show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Stacks that run at once.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("patients"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(
    edits: Path,
    models: Sequence[str],
    *,
    stacks: Sequence[str],
    limit: int,
    batch_size: int,
    jobs: int,
    folder: Path,
    out: Path | None,
) -> None:
    """Edit every model, given as NAME=FOLDER, with every stack."""
    measured: dict[str, Any] = {}
    for name, _, where in (model.partition("=") for model in models):
        if not where:
            raise click.BadParameter(f"{name!r} is not NAME=FOLDER", param_hint="MODELS")
        made = [job_of(stack, folder / name) for stack in stacks]
        shared = ["--model", where, "--edits", str(edits), "--limit", str(limit), "--batch-size", str(batch_size)]
        run(made, [*shared, "--eval-every", str(max(1, limit // batch_size))], at_once=jobs, console=Console())
        curves = {job.stack: curve for job in made if (curve := curve_of(job)) is not None}
        measured[name] = {"spectra": spectra(Path(where)), "stacks": curves}
    write_result("patients", {"limit": limit, "batch_size": batch_size, "models": measured}, out)


if __name__ == "__main__":
    main()
