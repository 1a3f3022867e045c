"""The outcome of each edit of a run, and the edits that were refused or given up."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from editcli.records.decoding import Count, UnreadableError, decode
from editcli.records.history import History
from editcli.reporting import Rejection
from editcli.requests.schema import EditRequest
from editcli.requests.superseding import Superseded
from editcli.storage.files import write_lines
from editcli.storage.opening import TABLE, read_bytes

if TYPE_CHECKING:
    from editcli.records.state import RunFolder

T = TypeVar("T")


class Rejections:
    """Keeps ``rejected.jsonl``: one line per edit, with the file and line it came from and the reason.

    ``file`` is the one that is read now; None when none is, so that all lines stay. Of edits that were ``written``
    before a later one superseded them, the stream itself tells.
    """

    def __init__(
        self,
        folder: RunFolder,
        rejected: Sequence[Rejection],
        *,
        file: str | None,
        written: Collection[str] = (),
        resumed: bool = False,
    ):
        self._folder, self._file = folder, file
        self._here = tuple(one for one in rejected if one.superseded_by is None or one.id not in written)
        self._earlier = self._of_other_files() if resumed else []

    @property
    def all(self) -> tuple[Rejection, ...]:
        """The unusable edits of this file and of those that the run read before."""
        earlier = (Rejection(line.id or "", line.reason, line.line, line.superseded_by) for line in self._earlier)
        return (*earlier, *self._here)

    def write(self, rejected: Sequence[Rejection] = ()) -> None:
        """Write the file; ``rejected`` are the run's, those that a stabilizer gave up among them."""
        known = set(self.all)
        dropped = [_line(one, None) for one in rejected if one not in known]
        lines = [*map(_to_json, self._earlier), *(_line(one, self._file) for one in self._here), *dropped]
        write_lines(self._folder.rejected, lines)

    def _of_other_files(self) -> list[RejectedLine]:
        """Read the lines of other files; one that is damaged costs its own line of a table."""
        # An edit that was read and given up has no file: the stream itself tells about it.
        return [line for line in read_lines(self._folder.rejected, RejectedLine) if line.file not in (None, self._file)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedLine:
    """A line of ``rejected.jsonl``."""

    id: str | None
    """None of a line that names none."""
    line: Count | None
    reason: str
    file: str | None = None
    """None of an edit that was read and then given up."""
    superseded_by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerLine:
    """The answer of the edited model to one prompt."""

    exact: bool
    success: bool | None = None
    """None without a true answer to compare with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeLine:
    """A line of ``outcomes.jsonl``: the answers of one edit."""

    id: str
    efficacy: tuple[AnswerLine, ...] = ()
    paraphrases: tuple[AnswerLine, ...] = ()
    neighbors: tuple[AnswerLine, ...] = ()


def superseded(one: Superseded) -> Rejection:
    """Return how a report lists an edit that a later one contradicts."""
    return Rejection(one.request.id, one.reason, one.request.line, one.by.id)


def _line(one: Rejection, file: str | None) -> dict[str, Any]:
    return {**one.to_json(), "file": file}


def _to_json(line: RejectedLine) -> dict[str, Any]:
    return {**_line(Rejection("", line.reason, line.line, line.superseded_by), line.file), "id": line.id}


ANSWERED, LIKELIER, MISSED, WRITTEN, REJECTED = "answered", "likelier", "missed", "written", "rejected"
MEANINGS: Mapping[str, str] = {
    ANSWERED: "the edited model answers the prompt with the target",
    LIKELIER: "the target is more probable than the true answer, but not the model's first answer",
    MISSED: "the model does not give the target",
    WRITTEN: "written, not measured",
    REJECTED: "not written, for the reason given",
}
"""Outcomes, the best first."""


@dataclass(frozen=True, slots=True)
class EditRow:
    """One edit with its outcome; ``norm`` is ||D||_F over all sites where the factors tell it."""

    id: str
    prompt: str
    target: str
    true: str
    step: int | None
    norm: float | None
    outcome: str
    note: str = ""


def edit_rows(history: History) -> Iterator[EditRow]:
    """Yield every edit in the order in which it was written, then those that were not."""
    rejected = read_lines(history.folder.rejected, RejectedLine)
    # A line without a file tells of an edit that was read and then given up; an unusable line of a file is no edit,
    # and its id may be the very id that made it unusable.
    refused = {line.id: line for line in rejected if line.file is None}
    answers = {line.id: line for line in read_lines(history.folder.outcomes, OutcomeLine)}
    norms = {edit.id: edit.norm for edit in history.top_edits(None)}
    requests = history.requests()
    for batch in history.batches:
        for name in batch.edits:
            refusal = refused.pop(name, None)
            reason = batch.dropped.get(name) if refusal is None else refusal.reason
            outcome = REJECTED if reason is not None else _outcome(answers.get(name))
            note = _note(answers.get(name)) if reason is None else reason
            yield _row(name, requests.get(name), batch.step, norms.get(name), outcome, note)
    for line in (*refused.values(), *(line for line in rejected if line.file is not None)):
        place = ":".join(str(part) for part in (line.file, line.line) if part is not None)
        yield _row(line.id or "", None, None, None, REJECTED, f"{place}: {line.reason}" if place else line.reason)


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """Return the lines of a JSONL file as ``kind``; a missing file has none, and one that does not fit is left out."""
    try:
        texts = read_bytes(path, TABLE, folder=path.parents[1]).splitlines()
    except OSError:
        return []
    lines: list[T] = []
    for text in texts:
        # A torn or damaged line costs one row of a table.
        with suppress(UnreadableError):
            lines.append(decode(text, kind))
    return lines


def _row(
    name: str, request: EditRequest | None, step: int | None, norm: float | None, outcome: str, note: str
) -> EditRow:
    return EditRow(
        id=name,
        prompt=request.prompt if request else "",
        target=request.target_new if request else "",
        true=(request.target_true or "") if request else "",
        step=step,
        norm=norm,
        outcome=outcome,
        note=note,
    )


def _outcome(line: OutcomeLine | None) -> str:
    answers = line.efficacy if line else ()
    if not answers:
        return WRITTEN
    if all(one.exact for one in answers):
        return ANSWERED
    return LIKELIER if all(one.success for one in answers) else MISSED


def _note(line: OutcomeLine | None) -> str:
    """Say how many paraphrases are answered and how many neighbours kept."""
    if line is None:
        return ""
    groups = ((line.paraphrases, "paraphrases answered"), (line.neighbors, "neighbours kept"))
    return ", ".join(f"{sum(one.exact for one in group)}/{len(group)} {word}" for group, word in groups if group)
