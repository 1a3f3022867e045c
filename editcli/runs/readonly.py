"""A run's folder for those who write nothing: the ranks other than 0, and runs that stay in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from editcli.edits import EditRequest
from editcli.interfaces import Problem, Site, Update
from editcli.runs.state import RunFolder, Snapshot


class ReadOnlyFolder(RunFolder):
    """A run folder that can be read but keeps nothing, and needs no lock for it."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def create(self) -> None:
        return None

    def write_snapshot(self, snapshot: Snapshot) -> None:
        return None

    def write_segment(
        self,
        sequence: int,
        requests: Sequence[EditRequest],
        problems: Mapping[Site, Problem],
        updates: Mapping[Site, Update],
    ) -> tuple[str, str]:
        """Return no name and no hash: nobody reads the journal line that they would go into."""
        return "", ""

    def append(self, line: str) -> None:
        return None

    def cut_journal(self, keep: Sequence[str]) -> None:
        return None

    def drop_unnamed_segments(self, named: Iterable[str]) -> None:
        return None

    def write_record(self, record: Mapping[str, Any]) -> None:
        return None
