"""What ``eval --record`` keeps in a run folder: ``evaluation.json``, its figures, and ``answers.jsonl``, every text.

Both name the state of the run that they were measured on, so that figures of a run that has changed since are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from editcli.errors import FileError, OptionError, StateError
from editcli.formatting import finite
from editcli.records.decoding import UnreadableError, read_json, refuse_nul
from editcli.records.edits import read_table
from editcli.records.state import RunFolder
from editcli.storage.conversion import convert
from editcli.storage.files import write_json, write_lines
from editcli.storage.opening import is_there


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeLine:
    """A text that the model wrote after one prompt, and its scores."""

    group: str
    """efficacy, paraphrases, neighbors, locality or portability."""
    prompt: str
    text: str
    exact: bool | None = None
    right: bool | None = None
    """Whether it contains the right answer."""
    rival: bool | None = None
    """Whether it contains the rival answer."""
    degenerate: bool | None = None
    axis: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideLine:
    """The texts of another model about the same edit."""

    generated: tuple[FreeLine, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceLine:
    """A line of ``answers.jsonl``: everything that the model wrote about one edit, and the base beside it."""

    id: str
    generated: tuple[FreeLine, ...] = ()
    base: BesideLine | None = None
    in_context: BesideLine | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The figures of a run as ``eval --record`` kept them."""

    figures: Mapping[str, Any]
    """The JSON object of ``eval --json``."""
    measured: str
    """When they were taken, in ISO 8601."""
    state: str | None = None
    """The run that was measured: the hash over its edits; None where its record does not tell."""
    answers: tuple[EvidenceLine, ...] = field(default=())


def evidence_folder(folder: Path) -> RunFolder:
    """Return the run folder that keeps the evidence; raise :class:`OptionError` where ``folder`` is no run."""
    run = RunFolder(folder)
    if not run.is_run:
        raise OptionError(f"--record keeps figures in the folder of a run, and {folder} is none; leave it out")
    return run


def write_evidence(run: RunFolder, figures: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> None:
    """Write figures and texts into a run folder, each whole or not at all; raise :class:`StateError` where it cannot.

    The texts come first: figures without their texts would be evidence that nobody can check.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with run.locked():
        try:
            write_lines(run.answers, lines)
            write_json(run.evaluation, {"figures": finite(figures), "measured": now, "state": state_of(run)})
        except OSError as error:
            raise StateError(f"cannot write into {run.folder}: {error.strerror or error}") from error


def read_evidence(run: RunFolder) -> Evidence | None:
    """Return the evidence in a run folder; None where there is none that can be read."""
    if not is_there(run.evaluation):
        return None
    with suppress(FileError, UnreadableError):
        value = read_json(run.evaluation, folder=run.out)
        refuse_nul(value)
        kept = convert(value, Evidence)
        return Evidence(
            figures=kept.figures,
            measured=kept.measured,
            state=kept.state,
            answers=read_table(run.answers, EvidenceLine).lines,
        )
    return None


def state_of(run: RunFolder) -> str | None:
    """Return the hash over all edits that a run read, as its record has it; None where there is no such record."""
    with suppress(StateError):
        record = run.read_record()
        return None if record is None else record.provenance.consumed
    return None
