"""The model card that goes beside the weights."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from editcli.recipe import Recipe
from editcli.report import RunReport


def model_card(report: RunReport, recipe: Recipe, provenance: Mapping[str, Any]) -> str:
    """Return the README.md of an edited model: what was done, with what, and what it measured."""
    return "\n".join(_lines(report, recipe, provenance)) + "\n"


def command_line(recipe: Recipe) -> str:
    """Return the command that repeats a run."""
    parts = ["editcli", "apply", recipe.edits]
    if recipe.model is not None:
        parts += ["--model", recipe.model]
    if recipe.editor is not None:
        parts += ["--editor", recipe.editor]
    for name in recipe.stabilizers:
        parts += ["--stabilizer", name]
    for name, value in (("--batch-size", recipe.batch_size), ("--limit", recipe.limit)):
        parts += [name, str(value)] if value is not None else []
    if recipe.layers is not None:
        parts += ["--layers", ",".join(map(str, recipe.layers))]
    if recipe.seed:
        parts += ["--seed", str(recipe.seed)]
    for section, settings in recipe.settings.items():
        for key, value in settings.items():
            parts += ["-o", f"{section}.{key}={value}"]
    return shlex.join(parts)


def _lines(report: RunReport, recipe: Recipe, provenance: Mapping[str, Any]) -> Iterator[str]:
    yield from ("---", "library_name: transformers", "tags:", "- model-editing", "- editcli", "---", "")
    yield f"# {report.model}, with {report.applied} edited facts"
    yield ""
    method = " + ".join((report.editor, *report.stabilizers))
    yield f"Facts were rewritten inside the weights with [editcli](https://pypi.org/project/editcli/) ({method})."
    yield from ("", "```", command_line(recipe), "```", "", "## Measured", "")
    yield from ("| figure | before | after |", "|---|---|---|")
    efficacy = report.efficacy
    for name in ("efficacy_accuracy", "efficacy_success"):
        yield f"| {name} | {_cell(efficacy.get('before'), name)} | {_cell(efficacy.get('retained'), name)} |"
    for name, figures in (("generalization", report.generalization), ("specificity", report.specificity)):
        if figures is not None:
            yield f"| {name}_success | {_cell(figures, 'before')} | {_cell(figures, 'after')} |"
            accuracy = figures["accuracy"]
            yield f"| {name}_accuracy | {_cell(accuracy, 'before')} | {_cell(accuracy, 'after')} |"
    yield from ("", "## Edited matrices", "", "R_n is the norm against the base's, drift the norm of the change.", "")
    yield from ("| module | R_n | drift | lost by the cast |", "|---|---|---|---|")
    for site in report.sites:
        yield f"| `{site.module}` | {site.ratio:.4f} | {site.drift:.4f} | {site.cast_loss:.1e} |"
    yield from ("", "## Options in force", "", "```json")
    yield json.dumps({"targets": provenance["targets"], **provenance["options"]}, indent=2)
    yield from ("```", "", "## Known limits", "")
    yield "The edits are associations at the subject's last token: paraphrases that name the subject otherwise, and"
    yield "facts that follow from the edited ones, may still be answered as before. Everything was measured on the"
    yield "prompts of the edits file only; general ability was not. `editcli/run.json` has the full record."


def _cell(figures: Mapping[str, Any] | None, name: str) -> str:
    value = None if figures is None else figures.get(name)
    return "n/a" if value is None else f"{value:.3f}"
