"""Norm clipping: the obvious way to keep a weight from growing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from editcli.plugin.interfaces import Problem, Session, Stabilizer, Update
from editcli.plugin.options import option

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

    @dataclass(frozen=True)
    class Options:
        """The bound, and what gives way."""

        rho: float = option(1.5, "bound on ||W|| as a multiple of ||W_0||")
        what: Literal["weight", "update"] = option("weight", "what is scaled back when the bound is exceeded")

        def __post_init__(self) -> None:
            if self.rho < 1:
                raise ValueError("rho must be at least 1: the unedited weight has ratio 1")

    def __init__(self, options: object = None):
        super().__init__(options)
        self._clipped: dict[str, int] = {}

    def stabilize_update(self, update: Update, problem: Problem, session: Session) -> Update:
        site = problem.site
        weight = session.weight(site).to(update.left)
        bound = self.options.rho * float(session.baseline(site).double().norm()) * (1 - MARGIN)
        square, cross = float(weight.double().square().sum()), float((weight.T @ update.left * update.right).sum())
        norm = max(square + 2 * cross + update.norm() ** 2, 0.0) ** 0.5
        if norm <= bound:
            return update
        self._clipped[site.module] = self._clipped.get(site.module, 0) + 1
        if self.options.what == "weight":
            return Update.from_dense((weight + update.dense()) * (bound / norm) - weight)
        return Update(update.left * _largest(update.norm() ** 2, cross, square - bound**2), update.right)

    def record(self) -> dict[str, Any]:
        """Return how often each site was clipped."""
        return {"clipped": self._clipped}


def _largest(square: float, cross: float, excess: float) -> float:
    """Return the largest s in [0, 1] with s^2 ``square`` + 2 s ``cross`` + ``excess`` <= 0, or 0 if there is none."""
    root = cross**2 - square * excess
    if root < 0 or square == 0:
        return 0.0
    return min(max((-cross + root**0.5) / square, 0.0), 1.0)
