"""Error feedback: give the next batch what a stabilizer took from the update of this one.

A stabilizer f that changes updates writes f(D_t) in place of D_t, and T_t = f(D_t) - D_t is lost. Algorithm 1 of "The
Labyrinth and the Thread" (arXiv 2605.26670) carries the error along: with M_t, the matrix that batch t is solved with,
K_t its keys and R_t its residual ::

    D_t = (R_t K_t^T - E_t-1) M_t^-1        write f(D_t)        E_t = (f(D_t) - D_t) M_t

An editor with a memory of keys has C = M_t-1^-1, and M_t = M_t-1 + K_t K_t^T. With G = (I + K^T C K)^-1 K^T C, the
operator of its solve D = R G, E_t-1 M_t^-1 = T_t-1 (I - K_t G_t) by Woodbury's identity, and no M is formed ::

    D_t = (R_t + T_t-1 K_t) G_t - T_t-1

That is the update which leads from the weight as it is to where the batch leads from the weight without the loss,
W - T, whose residual is R + T K. So it holds for every linear solve, and for an editor without target values as
D_t - T_t-1. T is replaced batch by batch, never added up: D_t contains the loss before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from editcli.plugin.interfaces import Dense, LowRank, Problem, Session, Site, Stabilizer, Update

Lost: TypeAlias = Mapping[str, Tensor]
"""What each stabilizer that feeds back took from the update of one site, (d_out, d_in) float32, by its name."""


def owed(stabilizers: Sequence[Stabilizer], site: Site) -> Tensor | None:
    """Return T, (d_out, d_in) float32, what the last batch lost at ``site``; None where it lost nothing."""
    parts = [one.lost[site.module] for one in stabilizers if one.feeds_back and site.module in one.lost]
    return sum(parts[1:], start=parts[0]) if parts else None


def asking(problem: Problem, lost: Tensor | None) -> Problem:
    """Return the problem with the residual R + T K: that of the weight as it would be without the loss."""
    if lost is None:
        return problem
    return replace(problem, residual=problem.residual + lost.to(problem.keys) @ problem.keys)


def returning(update: Update, lost: Tensor | None) -> Update:
    """Return D - T."""
    return update if lost is None else Dense(update.dense() - lost.to(update.dense()))


def stabilised(
    session: Session, stabilizers: Sequence[Stabilizer], site: Site, update: Update, problem: Problem | None
) -> tuple[Update, dict[str, Tensor]]:
    """Let every stabilizer change ``update``; return the result and what those that feed back took."""
    lost: dict[str, Tensor] = {}
    for stabilizer in stabilizers:
        stable = stabilizer.stabilize_update(session, site, update, problem)
        if stabilizer.feeds_back:
            lost[stabilizer.name] = (stable.dense() - update.dense()).float().contiguous()
        update = stable
    return update, lost


def keep(stabilizers: Sequence[Stabilizer], lost: Mapping[Site, Lost]) -> None:
    """Have every stabilizer that feeds back remember what it took from a batch that stays."""
    for stabilizer in stabilizers:
        if stabilizer.feeds_back:
            taken = {site.module: parts[stabilizer.name] for site, parts in lost.items() if stabilizer.name in parts}
            stabilizer.lost = {**stabilizer.lost, **taken}


def writes_nothing(problem: Problem, update: Update) -> bool:
    """Tell whether a recorded update is that of a batch which asked for nothing, so that the loss stays as it is."""
    if not isinstance(update, LowRank) or update.right.shape != problem.keys.shape:
        return False
    return not bool(update.left.any()) and torch.equal(update.right, problem.keys)
