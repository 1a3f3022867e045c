"""Notes and warnings of a run: before it starts, where it continues an earlier one, and at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from editcli.editing.sinks import begins, first_is_sink
from editcli.models.loading import LoadedModel
from editcli.records.record import Provenance
from editcli.records.recovery import Recovered, missing
from editcli.reporting import Reporter, RunReport
from editcli.requests.reader import EditFile
from editcli.requests.schema import EditRequest
from editcli.runs.context import Context
from editcli.runs.forecast import warn_of_long_work
from editcli.runs.outcome import missed_targets, rounded_differently
from editcli.runs.output import Verified
from editcli.runs.planning import Planned, save_dtype

SHOWN = 5
"""Edits that a remark names at the most."""


def announce(planned: Planned, *, new: bool, reporter: Reporter) -> None:
    """Say what a run is about to do, as far as the user did not choose it."""
    if planned.recipe.model is None and new:
        reporter.note("No --model given: editing the small model that ships with editcli")
    if planned.footprint is not None and planned.footprint.fits:
        # The plan that --dry-run prints says what the memory is for.
        reporter.note(f"Memory: {planned.footprint.summary()}")
    for text in _recoded(planned):
        reporter.note(text)
    if planned.preset.label == "guessed" and planned.preset.file is None:
        layers = ", ".join(map(str, planned.layers))
        preset = "no preset for this model" if planned.preset.match is None else "untuned preset"
        remedy = "'editcli tune' searches for better settings"
        reporter.warn(f"{preset} ({planned.preset.name}): layers {layers} are a guess; {remedy}")
    for part in planned.stabilizers:
        if not planned.editor.needs_values and not {"updates", "weights"} & set(part.acts_on):
            reporter.warn(
                f"{part.name} acts on target values, and {planned.editor.name} has none: it changes nothing here"
            )


def _recoded(planned: Planned) -> Iterator[str]:
    """Yield a sentence for every type of the edited matrices that is read but cannot be written."""
    checkpoint, sites = planned.source.checkpoint, dict[tuple[str, str], list[str]]()
    for site in planned.sites:
        kinds = checkpoint.recoded(checkpoint.tensor_for(f"{site.module}.weight"), save_dtype(planned.recipe))
        if kinds is not None:
            sites.setdefault(kinds, []).append(site.module)
    for (now, then), modules in sites.items():
        yield f"{_listed(modules)}: stored as {now}, which can be read but not written; saved as {then}"


def look_ahead(loaded: LoadedModel, planned: Planned, requests: Sequence[EditRequest], context: Context) -> None:
    """Warn of what the loaded model shows about the edits that are to be written: sinks, and much work."""
    tell_sinks(loaded, planned, requests, context.reporter)
    team = context.team
    if team.leads and team.divided:
        warn_of_long_work(loaded, planned, requests, context.reporter, parts=team.parts)


def tell_differences(old: Provenance, new: Provenance, reporter: Reporter) -> None:
    """Say what changed since the stream was begun: versions that may round differently, and the size of batches."""
    for text in rounded_differently(old, new):
        reporter.warn(text)
    if old.batch_size not in (None, new.batch_size):
        reporter.note(f"Batches of {new.batch_size} from here on; they were of {old.batch_size}")


def tell_missing(recovered: Recovered, file: EditFile, out: Path, reporter: Reporter) -> None:
    """Warn about edits in force that the file does not name any more: they stay until they are taken back.

    A program and a pipe pass what is to be written next; they keep no list that could have lost an edit.
    """
    gone = missing(recovered, file) if Path(file.source).is_file() else []
    if gone:
        reporter.warn(
            f"{file.source} no longer has {_listed([request.id for request in gone])}, which the run in {out} keeps; "
            "'editcli undo' with --edit takes an edit back"
        )


def tell_sinks(loaded: LoadedModel, planned: Planned, requests: Sequence[EditRequest], reporter: Reporter) -> None:
    """Warn about edits whose subject is the first token of its text where that token is an attention sink."""
    if not planned.editor.needs_values:
        return
    tokens = loaded.tokens
    texts = tokens.encode([tokens.locate(request) for request in requests if request.has_subject])
    named = [request.id for request in requests if request.has_subject]
    first = [name for name, text in zip(named, texts, strict=True) if begins(text)]
    if first and first_is_sink(loaded, planned.layers, batch_tokens=planned.targets.batch_tokens):
        reporter.warn(
            f"{_listed(first)}: the subject is the first token of its text, and the model's keys there are the same "
            "for every subject, so the fact is written for text in which something stands before it; put a word "
            "before the subject, as in 'The company Microsoft'"
        )


def tell_result(report: RunReport, planned: Planned, verified: Verified | None, reporter: Reporter) -> None:
    """Say which edits changed nothing, which targets were missed and which tensors are those of the base."""
    if report.already_true:
        base = "; the weights are those of the base" if report.unchanged else ""
        reporter.note(f"Already true before the run: {_listed(report.already_true)}{base}")
    missed = missed_targets(report.targets, planned.targets)
    if missed:
        reporter.warn(missed)
    for name in verified.unchanged if verified and verified.changed else ():
        reporter.warn(f"{name} did not change: its update is smaller than the saved dtype can hold")


def _listed(ids: Sequence[str]) -> str:
    """Return the first of some ids, and how many there are besides."""
    more = f" and {len(ids) - SHOWN:,} more" if len(ids) > SHOWN else ""
    return ", ".join(ids[:SHOWN]) + more
