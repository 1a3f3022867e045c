"""What ``apply`` would do, found out without writing anything."""

from __future__ import annotations

import math
import time

from editcli.editing.session import ModelSession
from editcli.plugin.manager import Plugins
from editcli.reporting import Reporter, Silent
from editcli.runs import planning
from editcli.runs.planning import Plan, Planned
from editcli.runs.remarks import tell_conflicts
from editcli.settings.recipe import Recipe

TRIAL_EDITS = 16
"""Edits whose targets a dry run optimises to estimate the time."""


def plan(recipe: Recipe, plugins: Plugins, reporter: Reporter | None = None) -> Plan:
    """Return what :func:`editcli.runs.apply.apply` would do, writing nothing; one small batch is timed."""
    reporter = reporter or Silent()
    planned = planning.check(recipe, plugins, reporter)
    tell_conflicts(planned, reporter)
    seconds = _measured_seconds(planned, reporter) if planned.editor.needs_values else None
    return Plan(
        model=planned.source.name,
        preset=planned.preset.name,
        label=planned.preset.label,
        editor=planned.editor.name,
        stabilizers=tuple(part.name for part in planned.stabilizers),
        edits=len(planned.requests),
        rejected=planned.rejected,
        batches=math.ceil(len(planned.requests) / planned.batch_size),
        batch_size=planned.batch_size,
        sites=tuple(
            {"module": site.module, "layer": site.layer, "shape": list(shape)}
            for site, shape in zip(planned.sites, planned.shapes, strict=True)
        ),
        tokens=planned.target_tokens,
        bytes={
            "model": planned.model_bytes,
            "disk": planned.model_bytes + planned.state_bytes,
            **(planned.footprint.to_json() if planned.footprint else {}),
        },
        seconds=seconds,
        out=str(recipe.folder),
        memory=planned.footprint.sentence() if planned.footprint else "not known",
        warnings=(*planned.file.notes, *planned.conflicts),
    )


def _measured_seconds(planned: Planned, reporter: Reporter) -> float:
    loaded = planning.open_planned(planned)
    session = ModelSession(loaded, planned.layers, options=planned.targets, reporter=reporter, seed=planned.recipe.seed)
    sample = planned.requests[:TRIAL_EDITS]
    started = time.perf_counter()
    session.values(sample)
    return (time.perf_counter() - started) * len(planned.requests) / len(sample)
