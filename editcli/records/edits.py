"""The outcome of each edit of a run, and the edits that were refused or given up."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from editcli.records.decoding import Count, UnreadableError, decode
from editcli.records.history import History
from editcli.reporting import Rejection
from editcli.requests.schema import EditRequest
from editcli.requests.superseding import Superseded
from editcli.storage.files import write_lines
from editcli.storage.opening import TABLE, is_there, read_bytes

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
        self.earlier = read_table(folder.rejected, RejectedLine) if resumed else Table(folder.rejected)
        """The table that the run wrote before; its lines about other files stay."""
        # An edit that was read and given up has no file: the stream itself tells about it.
        self._earlier = [line for line in self.earlier.lines if line.file not in (None, file)]

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
    rejected = read_table(history.folder.rejected, RejectedLine).lines
    # A line without a file tells of an edit that was read and then given up; an unusable line of a file is no edit,
    # and its id may be the very id that made it unusable.
    refused = {line.id: line for line in rejected if line.file is None}
    answers = {line.id: line for line in read_table(history.folder.outcomes, OutcomeLine).lines}
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


@dataclass(frozen=True, slots=True)
class Table(Generic[T]):
    """The lines of a JSONL file beside a run's record, as far as they can be read."""

    path: Path
    lines: tuple[T, ...] = ()
    damaged: tuple[int, ...] = ()
    """Numbers of the lines that cannot be read, counted from 1: a torn or damaged line costs one row."""
    problem: str | None = None
    """Why the whole file cannot be read."""


def read_table(path: Path, kind: type[T]) -> Table[T]:
    """Return the lines of a JSONL file as ``kind``; a missing file has none."""
    try:
        texts = read_bytes(path, TABLE, folder=path.parents[1]).splitlines() if is_there(path) else []
    except OSError as error:
        return Table(path, problem=str(error))
    lines: list[T] = []
    damaged: list[int] = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(decode(text, kind))
        except UnreadableError:
            damaged.append(number)
    return Table(path, tuple(lines), tuple(damaged))


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
