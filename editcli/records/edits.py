"""What became of each edit of a run: those that were refused or given up, and the outcome of every other."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcli.records.history import History
from editcli.reporting import Rejection
from editcli.requests.superseding import Superseded
from editcli.storage.files import write_bytes
from editcli.storage.opening import TABLE, read_text

if TYPE_CHECKING:
    from editcli.records.state import RunFolder


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
        earlier = (
            Rejection(line["id"], line["reason"], line["line"], line.get("superseded_by")) for line in self._earlier
        )
        return (*earlier, *self._here)

    def write(self, rejected: Sequence[Rejection] = ()) -> None:
        """Write the file; ``rejected`` are the run's, those that a stabilizer gave up among them."""
        known = set(self.all)
        dropped = [_line(one, None) for one in rejected if one not in known]
        lines = [*self._earlier, *(_line(one, self._file) for one in self._here), *dropped]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_bytes(self._folder.rejected, text.encode())

    def _of_other_files(self) -> list[dict[str, Any]]:
        """Read the lines of other files; one that is damaged costs its own line of a table."""
        try:
            texts = read_text(self._folder.rejected, TABLE, folder=self._folder.out, errors="replace").splitlines()
        except OSError:
            return []
        found = [line for text in texts if (line := _parsed(text)) is not None]
        # An edit that was read and given up has no file: the stream itself tells about it.
        return [line for line in found if line["file"] not in (None, self._file)]


def superseded(one: Superseded) -> Rejection:
    """Return how a report lists an edit that a later one contradicts."""
    return Rejection(one.request.id, one.reason, one.request.line, one.by.id)


def _line(one: Rejection, file: str | None) -> dict[str, Any]:
    return {**one.to_json(), "file": file}


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
        later = {name: line[name] for name in ("superseded_by",) if line.get(name) is not None}
        return {name: line[name] for name in ("id", "line", "reason", "file")} | later
    except (ValueError, KeyError, TypeError):
        return None


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
    rejected = read_lines(history.folder.rejected)
    # A line without a file tells of an edit that was read and then given up; an unusable line of a file is no edit,
    # and its id may be the very id that made it unusable.
    refused = {str(line.get("id")): line for line in rejected if line.get("file") is None}
    answers = {str(line.get("id")): line for line in read_lines(history.folder.outcomes)}
    norms = {edit.id: edit.norm for edit in history.top_edits(None)}
    records = history.requests()
    for batch in history.batches:
        for name in batch.edits:
            refusal = refused.pop(name, {"reason": batch.dropped[name]} if name in batch.dropped else None)
            outcome = REJECTED if refusal else _outcome(answers.get(name))
            note = str(refusal["reason"]) if refusal else _note(answers.get(name))
            yield _row(name, records.get(name, {}), batch.step, norms.get(name), outcome, note)
    for line in (*refused.values(), *(line for line in rejected if line.get("file") is not None)):
        place = ":".join(str(line[key]) for key in ("file", "line") if line.get(key) is not None)
        note = f"{place}: {line.get('reason', '')}" if place else str(line.get("reason", ""))
        yield _row(str(line.get("id") or ""), {}, None, None, REJECTED, note)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSONL file; a missing file has none, and a line that is no object is left out."""
    try:
        texts = read_text(path, TABLE, folder=path.parents[1]).splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:  # A torn line costs one row of a table.
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def _row(
    name: str, record: Mapping[str, Any], step: int | None, norm: float | None, outcome: str, note: str
) -> EditRow:
    return EditRow(
        id=name,
        prompt=str(record.get("prompt", "")).replace("{}", str(record.get("subject", "")), 1),
        target=str(record.get("target_new", "")),
        true=str(record.get("target_true") or ""),
        step=step,
        norm=norm,
        outcome=outcome,
        note=note,
    )


def _outcome(answer: Mapping[str, Any] | None) -> str:
    answers = list((answer or {}).get("efficacy") or ())
    if not answers:
        return WRITTEN
    if all(one.get("exact") for one in answers):
        return ANSWERED
    return LIKELIER if all(one.get("success") for one in answers) else MISSED


def _note(answer: Mapping[str, Any] | None) -> str:
    """Say how many paraphrases are answered and how many neighbours kept."""
    parts = []
    for group, word in (("paraphrases", "paraphrases answered"), ("neighbors", "neighbours kept")):
        answers = list((answer or {}).get(group) or ())
        if answers:
            parts.append(f"{sum(bool(one.get('exact')) for one in answers)}/{len(answers)} {word}")
    return ", ".join(parts)
