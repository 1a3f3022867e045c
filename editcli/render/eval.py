"""Draw the results of ``eval`` and ``check``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.text import Text

from editcli.commands.check import CheckedEdit, CheckReport
from editcli.commands.evaluate import Measurement
from editcli.evaluation.harness import HarnessResult
from editcli.evaluation.metrics import Evaluation
from editcli.formatting import number, plural
from editcli.render.quantised import quantised_table
from editcli.render.tables import table

_FLAT = (
    "efficacy_accuracy",
    "efficacy_success",
    "generalization_accuracy",
    "generalization_success",
    "specificity_accuracy",
    "specificity_success",
    "score",
)


def evaluation_table(measurement: Measurement) -> RenderableType:
    """Draw one row for each metric, the base beside the model where it was measured."""
    figures = ("model", "over") if measurement.base_evaluation is None else ("base", "model", "over")
    rows = table("metric", *figures, right=figures, padding=(0, 1))
    rows.columns[-1].style = "dim"
    base = None if measurement.base_evaluation is None else _rows(measurement.base_evaluation, measurement.base_harness)
    for name, (value, over) in _rows(measurement.evaluation, measurement.harness).items():
        cells = [] if base is None else [_figure(base[name][0] if name in base else None)]
        rows.add_row(name, *cells, _figure(value), over)
    title = (
        f"{plural(measurement.edits, 'edit')} of {measurement.edits_file} on {measurement.model}"
        if measurement.edits_file
        else measurement.model
    )
    shown = [rows] if rows.row_count else []
    copies = quantised_table(measurement.evaluation, measurement.quantised, metric_rows)
    return Group(Text(title, style="bold"), *shown, *copies, *_drift_lines(measurement), *_legends(measurement))


def _rows(evaluation: Evaluation, harness: HarnessResult | None) -> dict[str, tuple[float | None, str]]:
    """Return every figure by its name, with how many prompts or documents it was measured on."""
    counts = evaluation.counts
    rows = {name: (value, _over(name, counts)) for name, value in metric_rows(evaluation)} if counts["edits"] else {}
    if harness is not None:
        for task, figures in harness.tasks.items():
            over = f"{harness.samples[task]:,}" if task in harness.samples else ""
            rows |= {f"{task} {name}": (value, over) for name, value in figures.items()}
    return rows


def _legends(measurement: Measurement) -> Iterator[Text]:
    if measurement.edits:
        yield Text(_LEGEND, style="dim")
    if measurement.harness is not None:
        yield Text(f"tasks and their metrics: lm-evaluation-harness {measurement.harness.version}", style="dim")


def metric_rows(evaluation: Evaluation) -> Iterator[tuple[str, float | None]]:
    """Yield every metric that was asked for, named by its protocol."""
    for name in _FLAT:
        yield name, getattr(evaluation, name)
    for protocol in ("zsre", "knowedit"):
        for part, value in (getattr(evaluation, protocol) or {}).items():
            yield f"{protocol} {part}", value
    for name in ("fluency", "consistency"):
        if getattr(evaluation, name) is not None:
            yield name, getattr(evaluation, name)


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
    "accuracy: the greedy answer is right; success: the right answer is more probable than its rival; "
    "-: the records lack its fields."
)


def _prompt(edit: CheckedEdit) -> Text:
    text = Text(edit.prompt)
    if edit.subject:
        text.highlight_words([edit.subject], style="cyan")
    return text


def _over(name: str, counts: Mapping[str, int]) -> str:
    """Return how many prompts a metric was measured on."""
    groups = {"efficacy": "edits", "generalization": "paraphrases", "specificity": "neighbors"}
    key = name.replace("edit_success", "efficacy").split()[-1].partition("_")[0]
    count = counts.get(groups.get(key, key))
    return "" if not count else f"{count:,}"


def _drift_lines(measurement: Measurement) -> Iterator[Text]:
    if measurement.drift is not None:
        drift = measurement.drift
        yield Text(
            f"general ability on {drift.tokens:,} tokens of text: perplexity {drift.perplexity_base:.4g} -> "
            f"{drift.perplexity:.4g}, KL to the base {drift.kl:.4g} nats a token"
        )


def _figure(value: float | None) -> str:
    return number(value, ".4f", missing="-")
