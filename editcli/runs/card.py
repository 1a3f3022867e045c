"""The model card that goes beside the weights."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from editcli.ratios import shown
from editcli.recipe import Recipe
from editcli.report import RunReport
from editcli.runs.verdict import Thresholds, judge

_NOT_REPEATED = ("edits", "settings", "out", "overwrite")
"""Settings that say where a run is and not what it does. A resumed run shows --resume: it continued a stream."""
_FLAGS = {"stabilizers": "stabilizer", "evaluate": "no-eval"}


def model_card(
    report: RunReport, recipe: Recipe, provenance: Mapping[str, Any], *, diagnostics: Mapping[str, float | None]
) -> str:
    """Return the README.md of an edited model: what was done, with what, and what it measured."""
    return "\n".join(_lines(report, recipe, provenance, diagnostics)) + "\n"


def command_line(recipe: Recipe) -> str:
    """Return the command that repeats a run, with every setting that is not the default."""
    parts = ["editcli", "apply", recipe.edits]
    for setting in dataclasses.fields(Recipe):
        value = getattr(recipe, setting.name)
        if setting.name not in _NOT_REPEATED and value != setting.default:
            parts += _arguments(setting.name, value)
    for section, settings in recipe.settings.items():
        for key, value in settings.items():
            parts += ["-o", f"{section}.{key}={value}"]
    return shlex.join(parts)


def _arguments(name: str, value: Any) -> list[str]:
    """Return one setting as it is written on the command line."""
    flag = "--" + _FLAGS.get(name, name).replace("_", "-")
    if name == "layers":
        return [flag, ",".join(map(str, value))]
    if isinstance(value, tuple):
        return [text for one in value for text in (flag, str(one))]
    return [flag] if isinstance(value, bool) else [flag, str(value)]


def _lines(
    report: RunReport, recipe: Recipe, provenance: Mapping[str, Any], diagnostics: Mapping[str, float | None]
) -> Iterator[str]:
    yield from ("---", "library_name: transformers", "tags:", "- model-editing", "- editcli", "---", "")
    yield f"# {report.model}, with {report.applied} edited facts"
    yield ""
    yield from card_body(report, recipe, provenance, diagnostics)


def card_body(
    report: RunReport, recipe: Recipe, provenance: Mapping[str, Any], diagnostics: Mapping[str, float | None]
) -> Iterator[str]:
    """Yield the lines below a card's title."""
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
    yield from ("| module | R_n | drift | lost by the cast | verdict |", "|---|---|---|---|---|")
    for site in report.sites:
        word = judge(Thresholds(), ratio=site.ratio, drift=site.drift).word or "n/a"
        figures = " | ".join((shown(site.ratio, ".4f"), shown(site.drift, ".4f"), f"{site.cast_loss:.1e}"))
        yield f"| `{site.module}` | {figures} | {word} |"
    if diagnostics:
        yield from ("", "## Diagnostics of the last batch", "", "| figure | value |", "|---|---|")
        yield from (f"| {name} | {_figure(value)} |" for name, value in diagnostics.items())
    yield from ("", "## Options in force", "", "```json")
    yield json.dumps({"targets": provenance["targets"], **provenance["options"]}, indent=2)
    yield from ("```", "", "## Known limits", "")
    yield "The edits are associations at the subject's last token: paraphrases that name the subject otherwise, and"
    yield "facts that follow from the edited ones, may still be answered as before. Everything was measured on the"
    yield "prompts of the edits file only; general ability was not. `editcli/run.json` has the full record."


def _figure(value: float | None) -> str:
    """Write a figure; the journal keeps one that is not finite as null."""
    return "n/a" if value is None else f"{value:.4g}"


def _cell(figures: Mapping[str, Any] | None, name: str) -> str:
    value = None if figures is None else figures.get(name)
    return "n/a" if value is None else f"{value:.3f}"
