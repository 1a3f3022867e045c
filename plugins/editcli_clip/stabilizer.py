"""Norm clipping: the obvious way to keep a weight from growing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from editcli.plugin import Dense, LowRank, Problem, Session, Site, Stabilizer, Update, option

if TYPE_CHECKING:
    from torch import Tensor

MARGIN = 1e-6
"""Share by which a clipped norm stays below its bound, so that rounding to float32 does not lift it above."""


class Clip(Stabilizer):
    """Keep ||W|| <= rho ||W_0|| in the Frobenius norm.

    ``what=weight`` scales the whole weight back, W <- W rho ||W_0|| / ||W||, after a batch that exceeds the bound;
    ``what=update`` scales only the update, to the largest s in [0, 1] with ||W + s D|| <= rho ||W_0||. This is the
    baseline that norm-anchor scaling is compared with.
    """

    name: ClassVar[str] = "clip"
    reference: ClassVar[str] = "arXiv:2602.02543"
    acts_on: ClassVar[Collection[str]] = {"updates"}

    @dataclass(frozen=True)
    class Options:
        """The bound, and what gives way."""

        rho: float = option(1.5, "bound on ||W|| as a multiple of ||W_0||")
        what: Literal["weight", "update"] = option("weight", "what is scaled back when the bound is exceeded")
        feedback: bool = option(False, "give the next batch what was scaled away from this one (error feedback)")

        def __post_init__(self) -> None:
            if self.rho < 1:
                raise ValueError("rho must be at least 1: the unedited weight has ratio 1")

    def __init__(self, options: object = None):
        super().__init__(options)
        self.feeds_back = self.remembers = self.options.feedback
        self._clipped: dict[str, int] = {}

    def stabilize_update(self, session: Session, site: Site, update: Update, problem: Problem | None) -> Update:
        weight = session.weight(site)
        bound = self.options.rho * float(session.baseline(site).double().norm()) * (1 - MARGIN)
        square, cross = float(weight.double().square().sum()), _inner(weight, update)
        norm = max(square + 2 * cross + update.norm() ** 2, 0.0) ** 0.5
        if norm <= bound:
            return update
        self._clipped[site.module] = self._clipped.get(site.module, 0) + 1
        if self.options.what == "weight":
            weight = weight.to(update.dense())
            return Dense((weight + update.dense()) * (bound / norm) - weight)
        return update.scaled(_largest(update.norm() ** 2, cross, square - bound**2))

    def record(self) -> dict[str, Any]:
        """Return how often each site was clipped."""
        return {"clipped": self._clipped}


def _inner(weight: Tensor, update: Update) -> float:
    """Return <W, D>, the sum of W_ij D_ij, from the factors of D where it has some."""
    if isinstance(update, LowRank):
        return float((weight.to(update.left).T @ update.left * update.right).sum())
    return float((weight.double() * update.dense().double()).sum())


def _largest(square: float, cross: float, excess: float) -> float:
    """Return the largest s in [0, 1] with s^2 ``square`` + 2 s ``cross`` + ``excess`` <= 0, or 0 if there is none."""
    root = cross**2 - square * excess
    if root < 0 or square == 0:
        return 0.0
    return min(max((-cross + root**0.5) / square, 0.0), 1.0)
