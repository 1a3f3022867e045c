"""What a run says about edits that ask for nothing, or that its file does not name any more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from editcli.editing.sinks import begins, first_is_sink
from editcli.models.loading import LoadedModel
from editcli.records.recovery import Recovered, missing
from editcli.reporting import Reporter, RunReport
from editcli.requests.reader import EditFile
from editcli.requests.schema import EditRequest
from editcli.runs.planning import Planned

SHOWN = 5
"""Edits that a remark names at the most."""


def tell_known(report: RunReport, reporter: Reporter) -> None:
    """Say which edits were true already."""
    if report.already_true:
        base = "; the weights are those of the base" if report.unchanged else ""
        reporter.note(f"Already true before the run: {_listed(report.already_true)}{base}")


def tell_conflicts(planned: Planned, reporter: Reporter) -> None:
    """Warn about edits that a later one contradicts."""
    for warning in planned.conflicts:
        reporter.warn(warning)


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


def _listed(ids: Sequence[str]) -> str:
    """Return the first of some ids, and how many there are besides."""
    more = f" and {len(ids) - SHOWN:,} more" if len(ids) > SHOWN else ""
    return ", ".join(ids[:SHOWN]) + more
