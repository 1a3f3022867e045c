"""Say before the work starts that it will take long, and which settings shorten it most."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from editcli.editing import targets
from editcli.editing.targets import target_costs
from editcli.formatting import duration, plural
from editcli.models.loading import LoadedModel
from editcli.reporting import Reporter, Silent
from editcli.requests.schema import EditRequest
from editcli.runs.planning import Planned
from editcli.settings.core import TargetOptions

LONG = 600.0
"""Seconds from which on a run is announced as a long one."""
SLOW = 5e9
"""Multiplications a second that any CPU does: what is short at this speed needs no measurement."""
SAMPLE, SAMPLE_STEPS = 8, 2
"""Edits and steps that are timed."""


@dataclass(frozen=True, slots=True)
class Foresight:
    """How long the targets of some edits will take at most, in seconds, and what would shorten them."""

    seconds: float
    remedies: tuple[tuple[str, float], ...]
    """Up to two settings, written as on the command line, and the seconds with each of them; the shortest first."""


def warn_of_long_work(
    loaded: LoadedModel, planned: Planned, requests: Sequence[EditRequest], reporter: Reporter, *, parts: int = 1
) -> None:
    """Warn of targets that will keep a CPU busy for long, with the settings that help most."""
    if loaded.input_device.type != "cpu" or not requests or not planned.editor.needs_values:
        return
    with reporter.phase("Measuring the speed of this machine", 1) as advance:
        ahead = foresee(loaded, requests, planned.layers[-1], planned.targets, parts=parts)
        advance(1)
    if ahead is not None:
        shorter = [f"up to {duration(seconds)} with -o {setting}" for setting, seconds in ahead.remedies]
        what = f"the targets of {plural(len(requests), 'edit')} take up to {duration(ahead.seconds)} on this CPU"
        reporter.warn("; ".join([what, *shorter]))


def foresee(
    loaded: LoadedModel, requests: Sequence[EditRequest], layer: int, options: TargetOptions, *, parts: int = 1
) -> Foresight | None:
    """Predict the time of optimising targets, shared by ``parts`` processes; None where it is short.

    The work is that of :func:`editcli.editing.targets.target_costs`, in which every edit takes all steps, and the speed
    is measured on a few edits and steps; so edits that stop early need less.
    """

    def work(chosen: TargetOptions, edits: Sequence[EditRequest], contexts: int) -> int:
        return sum(target_costs(loaded, edits, contexts, layer, chosen))

    whole = work(options, requests, options.prefixes + 1) / parts
    if whole / SLOW < LONG:
        return None
    brief, sample = replace(options, steps=SAMPLE_STEPS, stop_loss=0.0, stop="loss"), requests[:SAMPLE]
    started = time.perf_counter()
    targets.optimise(loaded, sample, (), layer, brief, Silent())
    speed = work(brief, sample, 1) / (time.perf_counter() - started)
    if whole / speed < LONG:
        return None
    changed = ((f"targets.{name}={value}", replace(options, **{name: value})) for name, value in _choices(options))
    remedies = [(text, work(other, requests, other.prefixes + 1) / parts / speed) for text, other in changed]
    shortest = sorted(remedies, key=lambda remedy: remedy[1])[:2]
    return Foresight(whole / speed, tuple(remedy for remedy in shortest if remedy[1] < 0.9 * whole / speed))


def _choices(options: TargetOptions) -> Iterator[tuple[str, int | bool]]:
    """Yield settings that make targets cheaper and still give usable ones."""
    if options.prefixes > 1:
        yield "prefixes", 1
    if options.steps > 10:
        yield "steps", max(10, options.steps // 2)
    if not options.cached:
        yield "cached", True
