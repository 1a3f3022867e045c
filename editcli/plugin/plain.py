"""Check that values of a component are plain enough for a file: finite JSON values, no tensors, no numpy scalars."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editcli.plugin.interfaces import Component
    from editcli.reporting import Reporter


def plain(value: Any, faults: list[str], where: str = "") -> Any:
    """Return ``value`` as JSON holds it, None for whatever it cannot hold; ``faults`` gains a clause for each."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                faults.append(f"{where or 'it'} has the key {key!r}, which is no text")
        pairs = ((key, item) for key, item in value.items() if isinstance(key, str))
        return {key: plain(item, faults, f"{where}.{key}" if where else key) for key, item in pairs}
    if isinstance(value, (list, tuple)):
        return [plain(item, faults, f"{where}[{place}]") for place, item in enumerate(value)]
    if type(value) is float and not math.isfinite(value):
        faults.append(f"{where or 'it'} is {value}")
        return None
    if value is None or isinstance(value, str) or type(value) in (bool, int, float):
        return value
    faults.append(f"{where or 'it'} is a {type(value).__module__}.{type(value).__name__}")
    return None


def recorded(component: Component, reporter: Reporter) -> dict[str, Any]:
    """Return what ``component`` records in ``run.json``; what cannot stand there costs a warning, never the run."""
    faults: list[str] = []
    try:
        record = component.record()
        if not isinstance(record, Mapping):
            raise TypeError(f"it returned a {type(record).__name__}")
    # The run is over and its model saved: a third party's mistake in its own figures must not end it in an error.
    except Exception as error:
        reporter.warn(f"{component.name} could not record its figures: {type(error).__name__}: {error}")
        return {}
    figures = plain(record, faults)
    if faults:
        reporter.warn(f"{component.name} records what JSON cannot hold, which is left out: {'; '.join(faults)}")
    return figures
