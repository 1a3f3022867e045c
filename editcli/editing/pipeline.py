"""The one loop that every batch of edits goes through, whatever editor and stabilizers take part."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editcli.editing.session import ModelSession
from editcli.linalg.ratios import jump, ratio
from editcli.plugin.interfaces import Editor, Problem, Site, Stabilizer, Update, Values
from editcli.requests.schema import EditRequest
from editcli.settings.guards import refuse_nonfinite


def jump_of(session: ModelSession, site: Site, update: Update) -> float | None:
    """Return |R_n+1 - R_n| of ``site``, to which ``update`` is not added yet; None where W_0 is zero."""
    weight, base = session.weight(site), float(session.baseline(site).norm())
    after = weight.addmm(update.left.to(weight), update.right.to(weight).T)
    return jump(ratio(float(weight.norm()), base), ratio(float(after.norm()), base))


SiteCheck = Callable[[Site, Update], None]


@dataclass(frozen=True, slots=True)
class Written:
    """What one batch wrote: the problem and the update of each site, in the order they were written."""

    problems: Mapping[Site, Problem]
    updates: Mapping[Site, Update]
    dropped: Mapping[str, str]
    """Ids of edits that a stabilizer gave up, with the reason."""
    seconds: Mapping[str, float]
    targets: Mapping[str, int]
    """How the optimisation of targets ended: how many were ``optimised``, ``reached`` the stop loss and ended
    ``clamped``; empty where nobody counted."""
    already_true: tuple[str, ...] = ()
    """Ids of edits whose target the model gave before anything was written."""


def edit_batch(
    session: ModelSession,
    editor: Editor,
    stabilizers: Sequence[Stabilizer],
    requests: Sequence[EditRequest],
    check: SiteCheck,
) -> Written:
    """Write ``requests`` into the model; on any error the weights are what they were before.

    The components remember later, through :func:`commit`, once the batch is known to be kept.
    """
    before = session.masters()
    try:
        started = time.perf_counter()
        values = editor.values(session, requests)
        counts = count_targets(values)
        known = editor.already_true(requests) if values is None else _known(session, values)
        if values is not None:
            for stabilizer in stabilizers:
                values = stabilizer.stabilize_values(values, session)
        optimised = time.perf_counter()
        # What is left to write then is the rounding between two ways to compute the same hidden state.
        nothing = len(known) == len(requests) and values is not None and torch.equal(values.target, values.initial)
        problems: dict[Site, Problem] = {}
        updates: dict[Site, Update] = {}
        with session.reporter.phase("Writing", len(session.sites), "layers") as advance:
            for site in session.sites:
                problem = _recordable(editor.problem(session, site, requests, values))
                refuse_nonfinite("what is to be written", [problem.keys, problem.residual], where=f"at {site.module}")
                update = _zero(problem) if nothing else editor.solve(problem)
                # At once, because a stabilizer that picks entries would hide those that are not numbers.
                refuse_nonfinite("the update", [update.left, update.right], where=f"at {site.module}")
                for stabilizer in () if nothing else stabilizers:
                    update = stabilizer.stabilize_update(update, problem, session)
                # Rounded and laid out once, so that the recorded factors reproduce the weight bit by bit.
                update = Update(left=_as_recorded(update.left), right=_as_recorded(update.right))
                refuse_nonfinite("the update", [update.left, update.right], where=f"at {site.module}")
                check(site, update)
                session.write(site, update)
                problems[site], updates[site] = problem, update
                advance(1)
    except BaseException:
        session.restore(before)
        raise
    dropped = {} if values is None else {requests[column].id: why for column, why in values.dropped.items()}
    seconds = {"targets": optimised - started, "solve": time.perf_counter() - optimised}
    already_true = tuple(requests[column].id for column in known)
    return Written(problems, updates, dropped, seconds, counts, already_true)


def _known(session: ModelSession, values: Values) -> list[int]:
    """Return the columns whose optimisation ended before its first step: the model answered so as it stands."""
    still = (values.target == values.initial).all(dim=0).cpu()
    reached = values.loss < session.options.stop_loss if values.reached is None else values.reached
    still &= reached.cpu()
    return still.nonzero().flatten().tolist()


def _zero(problem: Problem) -> Update:
    """Return the update that changes nothing."""
    return Update(left=torch.zeros_like(problem.residual), right=problem.keys)


def count_targets(values: Values | None) -> dict[str, int]:
    """Return how a batch's targets ended; nothing for values that nobody counted."""
    if values is None or values.reached is None or values.clamped is None:
        return {}
    reached, clamped = int(values.reached.sum()), int(values.clamped.sum())
    return {"optimised": len(values.reached), "reached": reached, "clamped": clamped}


def _recordable(problem: Problem) -> Problem:
    """Return a problem as a segment holds it."""
    return Problem(problem.site, _as_recorded(problem.keys), _as_recorded(problem.residual))


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
