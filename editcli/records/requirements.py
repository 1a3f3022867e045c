"""Which plugins a recorded run was made with, and what to do about one that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from editcli.errors import PluginError
from editcli.records.record import Provenance, record_to_resume

if TYPE_CHECKING:
    from editcli.plugin.manager import Plugins


def refuse_missing(made: Provenance, plugins: Plugins, *, run: str | Path) -> None:
    """Raise :class:`PluginError` when a component that a run was ``made`` with is not loaded."""
    loaded = {name for kind in plugins.kinds for name in plugins.all(kind)}
    missing = [needed for needed in made.plugins if needed.name not in loaded]
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
    """Raise :class:`PluginError` when the run in ``folder`` needs a plugin that is not loaded; needs no torch.

    Raises :class:`StateError` where its record cannot be read.
    """
    record = record_to_resume(folder)
    if record is not None:
        refuse_missing(record.provenance, plugins, run=folder)
