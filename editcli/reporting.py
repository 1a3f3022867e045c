"""Results of a run as frozen data, and how the library reports progress.

The library never prints: it calls a :class:`Reporter`. The command line passes one that draws with rich; library
users pass their own or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


class Reporter(Protocol):
    """Receives the progress, notes and warnings of a run."""

    def phase(self, name: str, total: int, unit: str = "") -> Any:
        """Return a context manager that yields ``advance(count)`` for a phase of ``total`` units."""
        ...

    def note(self, text: str) -> None:
        """Tell something worth knowing."""
        ...

    def warn(self, text: str) -> None:
        """Tell something that may be wrong."""
        ...


class Silent:
    """A reporter that discards everything."""

    @contextmanager
    def phase(self, name: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        yield lambda count: None

    def note(self, text: str) -> None:
        return None

    def warn(self, text: str) -> None:
        return None


@dataclass(frozen=True, slots=True)
class SiteReport:
    """How one edited matrix changed: ``ratio`` is R_n = ||W_n|| / ||W_0||, ``drift`` is ||W_n - W_0|| / ||W_0||.

    Both are None for a base of zeros, against which there is neither.
    """

    module: str
    layer: int
    ratio: float | None
    drift: float | None
    cast_loss: float = 0.0
    """||cast(W_n) - W_n|| / ||W_n||: what the file's dtype cannot hold."""
    relative_change: float | None = None
    """Mean of |u_i^T (W_n - W_0) v_i| / sigma_i over the base's leading singular directions."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """An edit that was not applied, and why."""

    id: str
    reason: str
    line: int | None = None
    superseded_by: str | None = None
    """The later edit that gives the same prompt another target, where that is why."""

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON object."""
        later = {} if self.superseded_by is None else {"superseded_by": self.superseded_by}
        return {"id": self.id, "line": self.line, "reason": self.reason, **later}


@dataclass(frozen=True, slots=True)
class RunReport:
    """The outcome of one ``apply``; :meth:`to_json` is the contract of ``--json`` and of ``run.json``."""

    status: str
    model: str
    editor: str
    stabilizers: tuple[str, ...]
    read: int
    applied: int
    rejected: tuple[Rejection, ...]
    efficacy: dict[str, Any]
    generalization: dict[str, Any] | None
    specificity: dict[str, Any] | None
    sites: tuple[SiteReport, ...]
    seconds: dict[str, float]
    out: str
    stopped_by: str | None = None
    """Which guard stopped the run, at which value and edits; None when none did."""
    targets: dict[str, int] | None = None
    """How many target values were ``optimised``, ``reached`` the stop loss, and ended ``clamped``; None without any."""
    already_true: tuple[str, ...] = ()
    """Edits whose target the model gave before anything was written."""
    components: Mapping[str, Any] = field(default_factory=dict)
    """The record of each editor and stabilizer, by component."""
    preset: Mapping[str, Any] | None = None
    """Name, label and layers of the preset; of a preset file also its path and sha256."""
    protocols: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Protocol and scorer of each metric that was measured."""
    routing: Mapping[str, Any] | None = None
    """How the routers of a mixture of experts changed their choices on neighbours: ``prompts``, the share ``changed``
    and the same of each of the ``layers``; None where nothing was measured."""

    @property
    def unchanged(self) -> bool:
        """Whether every edit was true already, so that the weights are the base's."""
        return bool(self.already_true) and not any(site.drift for site in self.sites)

    @property
    def verdict(self) -> str | None:
        """The older name of ``stopped_by``; whether a matrix is fine or drifting is what ``inspect`` calls verdict."""
        return self.stopped_by

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON object."""
        return {
            "status": self.status,
            "model": self.model,
            "editor": self.editor,
            "stabilizers": list(self.stabilizers),
            "edits": {"read": self.read, "applied": self.applied, "rejected": len(self.rejected)},
            "rejected": [rejection.to_json() for rejection in self.rejected],
            "already_true": list(self.already_true),
            "efficacy": self.efficacy,
            "generalization": self.generalization,
            "specificity": self.specificity,
            "protocols": self.protocols,
            "sites": [asdict(site) for site in self.sites],
            "seconds": self.seconds,
            "out": self.out,
            "stopped_by": self.stopped_by,
            "verdict": self.verdict,
            "targets": self.targets,
            "components": self.components,
            "preset": self.preset,
            "routing": self.routing,
        }
