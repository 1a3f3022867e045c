"""The folder of a run as one process sees it: rank 0 writes, the other ranks and runs in memory only read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from editcli.distributed.team import Team
from editcli.plugin.interfaces import Problem, Site, Update
from editcli.records.state import RunFolder, Snapshot
from editcli.requests.schema import EditRequest


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


def run_folder(out: Path, team: Team) -> RunFolder:
    """Return the folder of a run: rank 0, which also holds the lock, writes; for the others it can only be read."""
    return RunFolder(out) if team.leads else ReadOnlyFolder(out)
