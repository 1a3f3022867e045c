"""Who writes into the folder of a run with several processes."""

from __future__ import annotations

from pathlib import Path

from editcli.distributed.team import Team
from editcli.runs.readonly import ReadOnlyFolder
from editcli.runs.state import RunFolder


def run_folder(out: Path, team: Team) -> RunFolder:
    """Return the folder of a run: rank 0, which also holds the lock, writes; for the others it can only be read."""
    return RunFolder(out) if team.leads else ReadOnlyFolder(out)
