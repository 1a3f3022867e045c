"""What happened to one batch, and how the journal tells it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from editcli.report import SiteReport
from editcli.runs.state import Entry


@dataclass(frozen=True, slots=True)
class BatchReport:
    """One batch that was kept."""

    step: int
    edits: tuple[str, ...]
    dropped: Mapping[str, str]
    sites: tuple[SiteReport, ...]
    metrics: Mapping[str, Any]
    seconds: Mapping[str, float]
    targets: Mapping[str, int] = field(default_factory=dict)
    """How many targets were ``optimised``, ``reached`` the stop loss, and ended ``clamped``; empty if not counted."""
    superseded: Mapping[str, str] = field(default_factory=dict)
    """Edits of the batch that were not written, each with the later edit that contradicts it."""
    already_true: tuple[str, ...] = ()
    """Edits whose target the model gave before the batch was written."""

    @property
    def idle(self) -> bool:
        """Whether the batch asked for nothing that the model did not do already."""
        return set(self.edits) <= set(self.already_true)


def body_of(report: BatchReport) -> dict[str, Any]:
    """Return a batch's figures as its journal line holds them."""
    sites = [
        {"module": s.module, "layer": s.layer, "ratio": s.ratio, "drift": s.drift, "update_norm": s.update_norm}
        for s in report.sites
    ]
    body: dict[str, Any] = {
        "sites": sites,
        "metrics": report.metrics,
        "dropped": report.dropped,
        "targets": dict(report.targets),
    }
    if report.superseded:
        body["superseded"] = dict(report.superseded)
    if report.already_true:
        body["already_true"] = list(report.already_true)
    return {**body, "seconds": {name: round(value, 6) for name, value in report.seconds.items()}}


def report_of(entry: Entry) -> BatchReport:
    """Return the report that a journal line holds."""
    body = entry.body
    sites = tuple(SiteReport(**site) for site in body.get("sites", ()))
    return BatchReport(
        step=entry.step,
        edits=entry.edits,
        dropped=body.get("dropped", {}),
        sites=sites,
        metrics=body.get("metrics", {}),
        seconds=body.get("seconds", {}),
        targets=body.get("targets", {}),
        superseded=body.get("superseded", {}),
        already_true=tuple(body.get("already_true", ())),
    )


def finite(value: Any) -> Any:
    """Return figures as JSON can hold them: one that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
