"""Which plugins a recorded run was made with, and what to do about one that is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcli.errors import PluginError
from editcli.storage.opening import RECORD as RECORD_KIND
from editcli.storage.opening import read_text

if TYPE_CHECKING:
    from editcli.plugin.manager import Plugins

RECORD = Path("editcli", "run.json")
"""Where a run folder keeps its record."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """A component that a run was made with, and the distribution that brought it."""

    name: str
    distribution: str
    version: str

    @property
    def installation(self) -> str:
        """The command that installs it; empty for one that came from no distribution."""
        return f"pip install {self.distribution}=={self.version}" if self.version else ""


def requirements(record: Mapping[str, Any]) -> Iterator[Requirement]:
    """Yield what the ``run.json`` object ``record`` says the run was made with."""
    provenance = record.get("provenance")
    found = provenance.get("plugins") if isinstance(provenance, Mapping) else None
    # A record may have been damaged or written by hand; what it does not say cannot be missing.
    for entry in found if isinstance(found, list) else ():
        if isinstance(entry, Mapping) and entry.get("name"):
            yield Requirement(*(str(entry.get(key, "")) for key in ("name", "distribution", "version")))


def refuse_missing(record: Mapping[str, Any], plugins: Plugins, *, run: str | Path) -> None:
    """Raise :class:`PluginError` when a component that the run ``record`` was made with is not loaded."""
    loaded = {name for kind in plugins.kinds for name in plugins.all(kind)}
    missing = [needed for needed in requirements(record) if needed.name not in loaded]
    if not missing:
        return
    names = " and ".join(f"{needed.name!r} of {needed.distribution} {needed.version}".strip() for needed in missing)
    remedy = "; ".join(dict.fromkeys(needed.installation for needed in missing if needed.installation))
    broken = "".join(f"; {name!r} could not be loaded: {reason}" for name, reason in plugins.broken.items())
    raise PluginError(
        f"{run} was made with {names}, which this editcli does not find; "
        f"{remedy or 'run it in the program that brought it'}{broken}"
    )


def check_resumable(folder: Path, plugins: Plugins) -> None:
    """Raise :class:`PluginError` when the run in ``folder`` needs a plugin that is not loaded; needs no torch."""
    try:
        record = json.loads(read_text(folder / RECORD, RECORD_KIND, folder=folder))
    # The command that opens the run says what is wrong with its record, or that there is none.
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(record, dict):
        refuse_missing(record, plugins, run=folder)
