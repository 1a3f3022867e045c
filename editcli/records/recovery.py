"""The state of a stream, read from its run folder: its step, the batches in force and those still to be written.

Reading changes nothing on disk. What the journal holds beyond the snapshot is left out: it is done again, with the same
result, and what the snapshot holds beyond the journal is the line of its own step, which it carries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from editcli.errors import StateError
from editcli.records.journal import START, BatchRecord, Entry, UndoRecord, consume, live_batches, removed_edits
from editcli.records.state import RunFolder, Snapshot
from editcli.requests.reader import EditFile
from editcli.requests.schema import EditRequest


@dataclass(frozen=True, slots=True)
class Recovered:
    """A stream as its folder holds it."""

    snapshot: Snapshot
    entries: tuple[Entry, ...]
    """All journal entries up to the snapshot, in order."""
    lines: tuple[str, ...]
    """The journal lines of ``entries``."""
    lost: int
    """Journal lines after the snapshot: batches that have to be done again."""
    requests: tuple[EditRequest, ...]
    """The edits in force, in order."""
    waiting: tuple[BatchRecord, ...]
    """Batches that an undo took out of the way and that were not written again yet."""
    redo: tuple[tuple[EditRequest, ...], ...]
    """The edits of each that are not written yet."""

    @property
    def live(self) -> list[BatchRecord]:
        """The batches in force."""
        return live_batches(self.entries)

    @property
    def removed(self) -> dict[str, str]:
        """The edits that were taken back one by one, id to digest."""
        return removed_edits(self.entries)


def recover(folder: RunFolder) -> Recovered:
    """Read a stream; raise :class:`StateError` when snapshot, journal and segments do not fit together."""
    snapshot = folder.read_snapshot()
    lines = folder.journal_bytes()
    counted = lines[: snapshot.sequence]
    if snapshot.sequence and len(counted) >= snapshot.sequence - 1:
        # The crash came between the snapshot and its line, or the line was damaged: the snapshot carries it.
        counted = [*counted[: snapshot.sequence - 1], snapshot.line.encode()]
    if len(counted) != snapshot.sequence:
        raise StateError(
            f"{folder.journal} has {len(counted)} of the {snapshot.sequence} lines that {folder.state.name} counts; "
            "restore it from a backup"
        )
    checked = folder.check_lines(counted)
    entries = tuple(entry for entry, _ in checked)
    requests = tuple(request for entry in live_batches(entries) for request in folder.read_requests(entry))
    if len(live_batches(entries)) != snapshot.step:
        raise StateError(f"{folder.journal} and {folder.state} count other batches; restore both from a backup")
    if consume(START, requests) != snapshot.consumed:
        raise StateError(f"{folder.updates} does not hold the edits that the snapshot counts; restore it from a backup")
    waiting = tuple(_pending(entries))
    return Recovered(
        snapshot=snapshot,
        entries=entries,
        lines=tuple(text for _, text in checked),
        lost=max(len(lines) - len(counted), 0),
        requests=requests,
        waiting=waiting,
        redo=tuple(_rest(folder, entry, removed_edits(entries)) for entry in waiting),
    )


def remaining(recovered: Recovered, requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Return the edits of a file that a recovered stream has not read yet.

    A file that starts with edits of the stream continues after them; any other file is appended whole. Ids that the
    program made from line numbers are made different where another file's edits have them already.
    """
    known = [*recovered.requests, *(request for batch in recovered.redo for request in batch)]
    stored = {request.id: request.digest for request in known}
    removed = recovered.removed
    renamed = _renamed(requests, {**removed, **stored}, known)
    requests = [r for r in renamed if removed.get(r.id) != r.digest]
    read = next((i for i, request in enumerate(requests) if stored.get(request.id) != request.digest), len(requests))
    for request in requests[read:]:
        if request.id in stored:
            raise StateError(
                f"{request.place}: the edit {request.id!r} is in the stream already, but this file does not start "
                "with what was applied; resume with the original file, or give new edits ids of their own"
            )
    return requests[read:]


def missing(recovered: Recovered, file: EditFile) -> list[EditRequest]:
    """Return the edits in force that were read from ``file`` and are not in it any more."""
    named = {request.id for request in file.requests if not _is_automatic(request)}
    contents = {_content(request) for request in file.requests}
    refused = {error.line for error in file.rejected}
    return [
        request
        for request in recovered.requests
        if request.file == file.source
        and not (request.id in named or _content(request) in contents or request.line in refused)
    ]


def _renamed(
    requests: Sequence[EditRequest], known: Mapping[str, str], stored: Sequence[EditRequest]
) -> list[EditRequest]:
    """Rename edits that are called by their line where a line means another edit in the stream.

    Where lines of the file were removed or moved, an edit of the stream is known by what it says; any other is called
    by its file and line.
    """
    if not any(_is_automatic(r) and known.get(r.id, r.digest) != r.digest for r in requests):
        return list(requests)
    before = {(one.file, _content(one)): one.id for one in stored}
    return [
        replace(r, id=before.get((r.file, _content(r)), _with_file(r))) if _is_automatic(r) else r for r in requests
    ]


def _content(request: EditRequest) -> tuple[str | None, ...]:
    """Return what an edit says, whatever it is called."""
    return request.before, request.subject, request.after, request.target_new, request.join


def _is_automatic(request: EditRequest) -> bool:
    return request.id == f"line-{request.line}"


def _with_file(request: EditRequest) -> str:
    return f"{Path(request.file).stem.strip('<>')}:{request.id}"


def _pending(entries: Sequence[Entry]) -> list[BatchRecord]:
    """Return the batches that the last undo line says are to be written again, less those that were."""
    for count, entry in enumerate(reversed(entries)):
        if isinstance(entry, UndoRecord):
            batches = {batch.sequence: batch for batch in entries if isinstance(batch, BatchRecord)}
            return [batches[line] for line in entry.redo[count:]]
    return []


def _rest(folder: RunFolder, entry: BatchRecord, removed: Mapping[str, str]) -> tuple[EditRequest, ...]:
    return tuple(r for r in folder.read_requests(entry) if removed.get(r.id) != r.digest)
