"""The one loop that every batch of edits goes through, whatever editor and stabilizers take part."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from editcli.editing import feedback
from editcli.editing.outdated import Outdated, release
from editcli.editing.session import ModelSession
from editcli.linalg.ratios import jump, ratio
from editcli.plugin.interfaces import Editor, LowRank, Problem, Site, Stabilizer, Update, Values, update_of
from editcli.requests.schema import EditRequest
from editcli.settings.guards import refuse_nonfinite


def jump_of(session: ModelSession, site: Site, update: Update) -> float | None:
    """Return |R_n+1 - R_n| of ``site``, to which ``update`` is not added yet; None where W_0 is zero."""
    weight, base = session.weight(site), float(session.baseline(site).norm())
    return jump(ratio(float(weight.norm()), base), ratio(float(update.added_to(weight).norm()), base))


SiteCheck = Callable[[Site, Update], None]


@dataclass(frozen=True, slots=True)
class Written:
    """The updates of one batch, site by site in the order of writing."""

    problems: Mapping[Site, Problem]
    """Empty for an editor without target values."""
    updates: Mapping[Site, Update]
    dropped: Mapping[str, str]
    """Ids of edits that a stabilizer gave up, with the reason."""
    seconds: Mapping[str, float]
    targets: Mapping[str, int]
    """How the optimisation of targets ended: how many were ``optimised``, ``reached`` the stop loss and ended
    ``clamped``; empty if not counted."""
    already_true: tuple[str, ...] = ()
    """Ids of edits whose target the model gave before anything was written."""
    released: tuple[str, ...] = ()
    """Ids of earlier edits whose keys the editor's memory let go of, at one site at least."""
    lost: Mapping[Site, feedback.Lost] = field(default_factory=dict)
    """What stabilizers with error feedback took from each update; a site without an entry keeps its earlier loss."""


@dataclass(slots=True)
class _Draft:
    """A batch while it is written."""

    problems: dict[Site, Problem] = field(default_factory=dict)
    updates: dict[Site, Update] = field(default_factory=dict)
    lost: dict[Site, feedback.Lost] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"targets": 0.0, "solve": 0.0})
    targets: Counter[str] = field(default_factory=Counter)
    known: Sequence[int] | None = None
    """Columns of the edits whose target the model gave before anything was written."""
    released: dict[str, None] = field(default_factory=dict)
    """Ids of edits whose keys left the memory of a site, in order."""
    dropped: Mapping[int, str] | None = None
    """Columns that were given up in every stage."""

    def count(self, values: Values | None) -> None:
        """Count how a stage's targets ended."""
        self.targets.update(count_targets(values))

    def give_up(self, values: Values | None) -> None:
        """Note what a stage gave up; an edit that another stage wrote is not given up."""
        dropped = {} if values is None else values.dropped
        earlier = dropped if self.dropped is None else self.dropped
        self.dropped = {column: why for column, why in earlier.items() if column in dropped}


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch and what writes it; ``check`` is called before each site is written."""

    session: ModelSession
    editor: Editor
    stabilizers: Sequence[Stabilizer]
    requests: Sequence[EditRequest]
    check: SiteCheck
    outdated: Sequence[Outdated]


def edit_batch(
    session: ModelSession,
    editor: Editor,
    stabilizers: Sequence[Stabilizer],
    requests: Sequence[EditRequest],
    check: SiteCheck,
    *,
    outdated: Sequence[Outdated] = (),
) -> Written:
    """Write ``requests`` into the model; on any error the weights are what they were before.

    The memory of an editor lets go of the ``outdated`` edits, which ``requests`` contradict.
    The components remember later, through :func:`commit`, once the batch is known to be kept.
    """
    before, draft = session.masters(), _Draft()
    batch = _Batch(session, editor, stabilizers, requests, check, outdated)
    try:
        # An editor without target values measures all sites at once.
        for stage in session.stages if editor.needs_values else (session,):
            _write_stage(stage, batch, draft)
        for site, problem in draft.problems.items():
            draft.problems[site] = editor.completed(session, requests, problem).mapped(_as_recorded)
    except BaseException:
        session.restore(before)
        raise
    dropped = {requests[column].id: why for column, why in (draft.dropped or {}).items()}
    already_true = tuple(requests[column].id for column in draft.known or ())
    counts = {name: draft.targets[name] for name in ("optimised", "reached", "clamped") if draft.targets}
    return Written(
        problems=draft.problems,
        updates=draft.updates,
        dropped=dropped,
        seconds=draft.seconds,
        targets=counts,
        already_true=already_true,
        released=tuple(draft.released),
        lost=draft.lost,
    )


def _write_stage(stage: ModelSession, batch: _Batch, draft: _Draft) -> None:
    """Optimise the targets of a stage on the model as written so far, and write its sites."""
    editor, requests = batch.editor, batch.requests
    started = time.perf_counter()
    values = _targets(stage, editor, requests)
    draft.count(values)
    # What the unedited model answers says nothing about what a written one does.
    elsewhere = editor.on_base and batch.session.written
    known = () if elsewhere else editor.already_true(requests) if values is None else _known(stage, values)
    # What a later stage finds answered, an earlier one has written.
    draft.known = known if draft.known is None else draft.known
    if values is not None:
        for stabilizer in batch.stabilizers:
            values = stabilizer.stabilize_values(stage, values)
    draft.give_up(values)
    optimised = time.perf_counter()
    # Then only the rounding between two ways to compute the same hidden state is left to write.
    nothing = len(known) == len(requests) and values is not None and torch.equal(values.target, values.initial)
    with stage.reporter.phase("Writing", len(stage.sites), "layers") as advance:
        for site in stage.sites:
            _write_site(stage, site, batch, draft, values=values, nothing=nothing)
            advance(1)
    draft.seconds["targets"] += optimised - started
    draft.seconds["solve"] += time.perf_counter() - optimised


def _write_site(
    stage: ModelSession, site: Site, batch: _Batch, draft: _Draft, *, values: Values | None, nothing: bool
) -> None:
    """Solve the problem of a site and write its update; with ``nothing``, the update that changes nothing."""
    problem = None
    if values is not None:
        problem = _problem(stage, batch.editor, batch.requests, site, values)
        given_up = {batch.requests[column].id for column in values.dropped}
        keys, ids = release(stage, batch.editor, site, batch.outdated, given_up=given_up)
        problem = draft.problems[site] = replace(problem, released=keys)
        draft.released |= dict.fromkeys(ids)
    if nothing and problem:
        update: Update = _zero(problem)
    else:
        update, draft.lost[site] = solved(stage, batch.editor, batch.stabilizers, site, problem)
    # Rounded and laid out once, so that the recorded parts reproduce the weight bit by bit.
    update = update_of({name: _as_recorded(part) for name, part in update.parts.items()})
    refuse_nonfinite("the update", update.parts.values(), where=f"at {site.module}")
    batch.check(site, update)
    batch.session.write(site, update)
    draft.updates[site] = update


def _targets(session: ModelSession, editor: Editor, requests: Sequence[EditRequest]) -> Values | None:
    """Return the batch's target values; None for an editor without any, which measures the batch instead."""
    if editor.needs_values:
        return editor.values(session, requests)
    editor.begin(session, requests)
    return None


def _problem(
    session: ModelSession, editor: Editor, requests: Sequence[EditRequest], site: Site, values: Values
) -> Problem:
    """Return the problem of a site as a segment holds it."""
    problem = editor.problem(session, requests, site, values)
    problem = problem.mapped(_as_recorded)
    refuse_nonfinite("the problem to solve", [problem.keys, problem.residual], where=f"at {site.module}")
    return problem


def solved(
    session: ModelSession, editor: Editor, stabilizers: Sequence[Stabilizer], site: Site, problem: Problem | None
) -> tuple[Update, feedback.Lost]:
    """Return the update of a site after every stabilizer, and what those with error feedback took from it."""
    lost = feedback.owed(stabilizers, site)
    if problem is None:
        update = editor.update(session, site)
    else:
        update = editor.solve(session, feedback.asking(problem, lost))
    update = feedback.returning(update, lost)
    # At once, because a stabilizer that picks entries would hide those that are not numbers.
    refuse_nonfinite("the update", update.parts.values(), where=f"at {site.module}")
    return feedback.stabilised(session, stabilizers, site, update, problem)


def lost_again(
    session: ModelSession,
    editor: Editor,
    stabilizers: Sequence[Stabilizer],
    site: Site,
    problem: Problem | None,
    update: Update,
) -> Mapping[Site, feedback.Lost]:
    """Return what a recorded batch lost at a site, by the operations of the first time; call it before writing.

    Empty where no stabilizer feeds back, and where the batch asked for nothing.
    """
    if not any(stabilizer.feeds_back for stabilizer in stabilizers):
        return {}
    if problem is not None and feedback.writes_nothing(problem, update):
        return {}
    return {site: solved(session, editor, stabilizers, site, problem)[1]}


def _known(session: ModelSession, values: Values) -> list[int]:
    """Return the columns whose optimisation ended before its first step: the model answered so as it stands."""
    still = (values.target == values.initial).all(dim=0).cpu()
    reached = values.loss < session.options.stop_loss if values.reached is None else values.reached
    still &= reached.cpu()
    return still.nonzero().flatten().tolist()


def _zero(problem: Problem) -> Update:
    """Return the update that changes nothing."""
    return LowRank(left=torch.zeros_like(problem.residual), right=problem.keys)


def count_targets(values: Values | None) -> dict[str, int]:
    """Return how a batch's targets ended; empty for values without counts."""
    if values is None or values.reached is None or values.clamped is None:
        return {}
    reached, clamped = int(values.reached.sum()), int(values.clamped.sum())
    return {"optimised": len(values.reached), "reached": reached, "clamped": clamped}


def _as_recorded(tensor: Tensor) -> Tensor:
    """Return a tensor as reading it from a segment gives it: single precision, aligned, one row after the other.

    A column that is a view counts as contiguous whatever its strides say, and kernels round by strides and alignment.
    """
    return tensor.float().clone(memory_format=torch.contiguous_format)


def commit(
    session: ModelSession,
    editor: Editor,
    stabilizers: Sequence[Stabilizer],
    requests: Sequence[EditRequest],
    written: Written,
) -> None:
    """Let editor and stabilizers advance their state by a batch that is kept."""
    problems = list(written.problems.values())
    editor.remember(session, requests, problems)
    for stabilizer in stabilizers:
        stabilizer.remember(session, problems, written.updates)
    feedback.keep(stabilizers, written.lost)
