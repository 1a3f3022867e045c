"""The parts of a run's record that cannot be read, each as one sentence: a view does without them, and says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from safetensors import SafetensorError

from editcli.errors import EditError
from editcli.formatting import plural
from editcli.records.decoding import UnreadableError
from editcli.records.edits import OutcomeLine, RejectedLine, Table, read_table
from editcli.records.history import History
from editcli.records.journal import BatchRecord
from editcli.records.state import requests_of
from editcli.storage.files import read_metadata

NAMED = 3
"""Files of batches that are named at most; a run may have thousands."""


def faults(history: History) -> Iterator[str]:
    """Yield a sentence for the journal, the files of batches, the outcomes and the refused edits, where unreadable."""
    yield from journal_faults(history)
    yield from _segments(history)
    folder = history.folder
    for path, kind in ((folder.outcomes, OutcomeLine), (folder.rejected, RejectedLine)):
        yield from table_faults(read_table(path, kind))


def journal_faults(history: History) -> Iterator[str]:
    """Yield a sentence where the record or the journal cannot be read."""
    if history.problem is not None:
        yield f"the history of this run cannot be shown: {history.problem}"


def table_faults(table: Table[Any]) -> Iterator[str]:
    """Yield a sentence where a table of edits, or some of its lines, cannot be read."""
    if table.problem is not None:
        yield f"{table.problem}; its lines are left out"
    elif table.damaged:
        lines = ", ".join(map(str, table.damaged[:NAMED])) + (" and more" if len(table.damaged) > NAMED else "")
        yield (
            f"{table.path} has {plural(len(table.damaged), 'line')} that cannot be read (line {lines}), left out here; "
            "restore it from a backup"
        )


def _segments(history: History) -> Iterator[str]:
    """Yield one sentence for all batches whose edits cannot be read."""
    unread = [(batch, reason) for batch in history.batches if (reason := _reason(history, batch)) is not None]
    if not unread:
        return
    named = "; ".join(reason for _, reason in unread[:NAMED])
    more = f"; and {len(unread) - NAMED:,} more" if len(unread) > NAMED else ""
    edits = plural(_edits([batch for batch, _ in unread]), "edit")
    yield (
        f"{plural(len(unread), 'batch')} cannot be read, so {edits} are shown without prompt, target and "
        f"norm ({named}{more}); restore the files from a backup"
    )


def _edits(batches: Sequence[BatchRecord]) -> int:
    return sum(len(batch.edits) for batch in batches)


def _reason(history: History, batch: BatchRecord) -> str | None:
    """Return why the edits of a batch cannot be read; None where they can."""
    path = history.folder.updates / batch.segment
    try:
        requests_of(read_metadata(path, folder=history.folder.out))
    except EditError as error:
        return str(error)
    except (SafetensorError, OSError, UnreadableError) as error:
        return f"{path}: {error}"
    return None
