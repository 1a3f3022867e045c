"""The edits of a run that were read and are not in force, over all the files that the run read."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from editcli.report import Rejection
from editcli.runs.files import write_bytes
from editcli.superseding import Superseded

if TYPE_CHECKING:
    from editcli.runs.planning import Planned
    from editcli.runs.state import RunFolder


class Rejections:
    """Keeps ``rejected.jsonl``: one line per edit, with the file and line it came from and the reason.

    ``file`` is the one that is read now; None when none is, so that all lines stay. Of edits that were ``written``
    before a later one superseded them, the stream itself tells.
    """

    def __init__(self, folder: RunFolder, planned: Planned, file: str | None, written: Collection[str] = ()):
        self._folder, self._file = folder, file
        self._here = tuple(one for one in planned.rejected if one.superseded_by is None or one.id not in written)
        self._earlier = self._of_other_files() if planned.recipe.resume else []

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
            texts = self._folder.rejected.read_text("utf-8", errors="replace").splitlines()
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
