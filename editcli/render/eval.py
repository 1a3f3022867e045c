"""Draw the results of ``eval`` and ``check``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from editcli.commands.check import CheckedEdit, CheckReport
from editcli.commands.evaluate import Measurement
from editcli.evaluation.distribution import Divergences
from editcli.evaluation.harness import HarnessResult
from editcli.evaluation.registry import PROTOCOLS, TEACHER_FORCED, metric_of, paths, value_at
from editcli.formatting import number, plural
from editcli.render.quantised import quantised_table
from editcli.render.tables import table

Figures = Mapping[str, Any]
"""Figures of a model as its JSON holds them."""


def evaluation_table(measurement: Measurement) -> RenderableType:
    """Draw one row for each metric under the name of its protocol, and one column for each model."""
    shown = measurement.to_json()
    models: dict[str, Figures] = {"model": shown}
    if measurement.in_context is not None:
        models = {"in-context": shown["in_context"], **models}
    if measurement.base_evaluation is not None:
        models = {"base": shown["base"], **models}
    if measurement.earlier is not None:
        models = {**models, "earlier": measurement.earlier.figures}
    rows = table("metric", *models, "over", right=(*models, "over"), padding=(0, 1))
    rows.columns[-1].style = "dim"
    for protocol, names in _sections(shown, models).items() if measurement.edits else ():
        rows.add_row(Text(protocol, style="bold"))
        for name in names:
            figures = (_figure(value_at(model, name), metric_of(name).unit) for model in models.values())
            rows.add_row(_title(name, protocol), *figures, _over(name, shown))
    for name, figures, over in _harness_rows(measurement):
        rows.add_row(name, *(_figure(figures.get(model)) for model in models), over)
    title = (
        f"{plural(measurement.edits, 'edit')} of {measurement.edits_file} on {measurement.model}"
        if measurement.edits_file
        else measurement.model
    )
    parts = [rows] if rows.row_count else []
    own = {
        protocol: [(name, _title(name, protocol)) for name in names]
        for protocol, names in _sections(measurement.evaluation.to_json(), {"model": shown}).items()
    }
    copies = quantised_table(own, shown, measurement.quantised)
    costs = (*_drift_lines(measurement), *_worst(measurement.divergences))
    return Group(Text(title, style="bold"), *parts, *copies, *_cohorts(measurement), *costs, *_legends(measurement))


_ELSEWHERE = ("drift.",)
"""Metrics that have a line of their own below the table."""


def _sections(shown: Figures, models: Mapping[str, Figures]) -> dict[str, list[str]]:
    """Return the metrics to show by protocol; a new one that no model has a figure for is left out."""
    sections: dict[str, list[str]] = {protocol: [] for protocol in PROTOCOLS}
    for name in paths(shown):
        known = any(value_at(model, name) is not None for model in models.values())
        # Older metrics are named even where the records lack their fields.
        if not name.startswith(_ELSEWHERE) and (known or metric_of(name) in TEACHER_FORCED):
            sections[metric_of(name).protocol].append(name)
    return {protocol: names for protocol, names in sections.items() if names}


def _title(name: str, protocol: str) -> str:
    """Return a metric's name as a row shows it: without its protocol, and with spaces for dots."""
    bare = name.removeprefix(f"{protocol}.").removeprefix("kinds.").replace(f".{protocol}_", ".")
    return "  " + bare.replace(".", " ")


def _harness_rows(measurement: Measurement) -> Iterator[tuple[str, dict[str, float | None], str]]:
    """Yield every figure of lm-evaluation-harness, by its name, of the model and its base, with the documents asked."""
    if measurement.harness is None:
        return
    base = measurement.base_harness.tasks if measurement.base_harness is not None else {}
    for task, figures in measurement.harness.tasks.items():
        count = measurement.harness.samples.get(task)
        for name, value in figures.items():
            yield (
                f"{task} {name}",
                {"model": value, "base": base.get(task, {}).get(name)},
                f"{count:,}" if count else "",
            )


def _cohorts(measurement: Measurement) -> Iterator[RenderableType]:
    """Draw what is retained by the age of the edits, the oldest first."""
    # Shares of a few edits jump by chance alone; --json has them all the same.
    if any(one.edits < LEAST for one in measurement.cohorts) or not measurement.cohorts:
        return
    figures = ("measured", "efficacy_accuracy", "efficacy_success", "contains_new")
    rows = table("edits by age", *figures, right=figures, title="Retained by age", title_justify="left", padding=(0, 1))
    for one in measurement.cohorts:
        shares = (one.efficacy_accuracy, one.efficacy_success, one.contains_new)
        rows.add_row(f"{one.first:,} to {one.last:,}", f"{one.edits:,}", *map(_figure, shares))
    yield rows
    yield Text("the first two are teacher_forced, contains_new is generated", style="dim")


LEAST = 5
"""Measured edits of every part of a run, so that the parts are shown."""
SHOWN_WORST = 3
"""Prompts with the largest divergences that are shown; ``--json`` has ten."""


def _worst(divergences: Divergences | None) -> Iterator[RenderableType]:
    """Name the neighbours whose distributions moved most."""
    spread = divergences.neighbors if divergences is not None else None
    moved = [one for one in spread.worst[:SHOWN_WORST] if one.kl > 0] if spread is not None else []
    if not moved:
        return
    rows = table("neighbours that moved most", "of edit", "KL, nats", right=("KL, nats",), padding=(0, 1))
    for one in moved:
        rows.add_row(Text(one.prompt), Text(one.edit or ""), number(one.kl))
    yield rows


def _legends(measurement: Measurement) -> Iterator[Text]:
    if measurement.edits:
        yield Text(_LEGEND, style="dim")
    judged = measurement.judgement
    if judged is not None:
        count = f"{judged.judged:,} of {plural(judged.answers, 'answer')}"
        yield Text(f"judge: {judged.endpoint.model} at {judged.endpoint.url}, {count}", style="dim")
    if measurement.harness is not None:
        yield Text(_harness_legend(measurement.harness), style="dim")


def _harness_legend(harness: HarnessResult) -> str:
    suite = "" if harness.suite is None else f"suite {harness.suite['name']}, version {harness.suite['version']}; "
    asked = "" if harness.limit is None else f", the first {harness.limit:,} documents of each task"
    return f"{suite}tasks and their metrics: lm-evaluation-harness {harness.version}{asked}"


def check_table(report: CheckReport) -> RenderableType:
    """Draw one row for each usable edit, then refusals and warnings, then the verdict."""
    rows = table("line", "prompt", "lookup token", "joint", "target tokens", "tokens", padding=(0, 1))
    for edit in report.edits:
        target = Text(" ").join(Text(repr(token), style="green") for token in edit.target)
        position = Text(f" @{edit.position}", style="dim")
        lookup = Text(repr(edit.lookup)) + position if edit.subject else Text("none", style="dim")
        rows.add_row(str(edit.line), _prompt(edit), lookup, repr(edit.joint), target, str(edit.length))
    doubts = [f"line {edit.line}: {text}" for edit in report.edits for text in edit.warnings]
    lines = [Text.assemble(("warning: ", "yellow"), text) for text in (*report.warnings, *doubts)]
    lines += [Text.assemble(("refused: ", "red"), str(error)) for error in report.rejected]
    warnings = len(lines) - len(report.rejected)
    counts = f"{len(report.edits):,} usable, {len(report.rejected):,} refused, {plural(warnings, 'warning')}"
    verdict = Text(f"{report.source} with the tokenizer of {report.model}: {counts}", style="bold")
    return Group(*([rows] if report.edits else []), *lines, verdict)


_LEGEND = (
    "Figures of different protocols have no common scale. teacher_forced: the answer is fed in; accuracy means that "
    "the greedy answer is right, success that the right answer is more probable than its rival. generated: the model "
    "writes freely. choice: it picks a listed answer. distribution: KL of the next token to the base, in nats. "
    "-: not measured, or the records lack its fields. docs/metrics.md explains each."
)


def _prompt(edit: CheckedEdit) -> Text:
    text = Text(edit.prompt)
    if edit.subject:
        text.highlight_words([edit.subject], style="cyan")
    return text


_GROUPS = {"efficacy": "edits", "generalization": "paraphrases", "specificity": "neighbors", "edit_success": "edits"}
"""The prompts behind a figure, by the first word of its name."""


def _over(name: str, shown: Figures) -> str:
    """Return how many prompts a metric was measured on."""
    place, _, figure = name.rpartition(".")
    if place == "judge":
        return f"{shown['judge']['counts'][figure.removesuffix('_correct')]:,}"
    within: Any = shown
    for key in place.split(".") if place.startswith(("kinds", "distribution")) else ():
        within = within[key]
    group = next((_GROUPS[known] for known in _GROUPS if figure.startswith(known)), figure)
    count = shown["counts"].get("choices" if place == "choice" else group) if within is shown else within["prompts"]
    return f"{count:,}" if count else ""


def _drift_lines(measurement: Measurement) -> Iterator[Text]:
    if measurement.drift is not None:
        drift = measurement.drift
        yield Text(
            f"general ability on {drift.tokens:,} tokens of text: perplexity {drift.perplexity_base:.4g} -> "
            f"{drift.perplexity:.4g}, KL to the base {drift.kl:.4g} nats a token"
        )


def _figure(value: float | None, unit: str = "share") -> str:
    # Divergences differ by powers of ten; shares do not.
    return number(value, ".2e" if unit == "nats" and value else ".4f", missing="-")
