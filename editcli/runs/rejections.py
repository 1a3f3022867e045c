"""The edits of a run that were read and could not be used, over all the files that the run read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from editcli.report import Rejection
from editcli.runs.files import write_bytes

if TYPE_CHECKING:
    from editcli.runs.planning import Planned
    from editcli.runs.state import RunFolder


class Rejections:
    """Keeps ``rejected.jsonl``: one line per edit, with the file and line it came from and the reason.

    ``file`` is the one that is read now; None when none is, so that all lines stay.
    """

    def __init__(self, folder: RunFolder, planned: Planned, file: str | None):
        self._folder, self._file = folder, file
        self._here = planned.rejected
        self._earlier = self._of_other_files() if planned.recipe.resume else []

    @property
    def all(self) -> tuple[Rejection, ...]:
        """The unusable edits of this file and of those that the run read before."""
        earlier = (Rejection(line["id"], line["reason"], line["line"]) for line in self._earlier)
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


def _line(one: Rejection, file: str | None) -> dict[str, Any]:
    return {"id": one.id, "line": one.line, "reason": one.reason, "file": file}


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
        return {name: line[name] for name in ("id", "line", "reason", "file")}
    except (ValueError, KeyError, TypeError):
        return None
