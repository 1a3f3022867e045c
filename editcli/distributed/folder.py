"""A run's folder as the ranks that write nothing see it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from editcli.distributed.team import Team
from editcli.edits import EditRequest
from editcli.interfaces import Problem, Site, Update
from editcli.runs.state import RunFolder, Snapshot


class ReadOnlyFolder(RunFolder):
    """A run folder that can be read; what would be written is left to rank 0, which also holds the lock."""

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
        """Return no name and no hash: this rank's journal lines are never read."""
        return "", ""

    def append(self, line: str) -> None:
        return None

    def cut_journal(self, keep: Sequence[str]) -> None:
        return None

    def drop_unnamed_segments(self, named: Iterable[str]) -> None:
        return None

    def write_record(self, record: Mapping[str, Any]) -> None:
        return None


def run_folder(out: Path, team: Team) -> RunFolder:
    """Return the folder of a run: rank 0's own, for the others one that writes nothing."""
    return RunFolder(out) if team.leads else ReadOnlyFolder(out)
