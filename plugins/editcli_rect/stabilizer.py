"""RECT: keep the relatively largest changes of an update (Gu et al., 2024)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from editcli.plugin import Dense, Problem, Session, Site, Stabilizer, Update, option


class Rect(Stabilizer):
    """Zero all entries of an update but those that change their weight the most, relative to it.

    D_ij is kept where |D_ij / W_ij| is among the largest ``keep`` of all entries of the site. With ``feedback`` the
    entries that one batch lost are given to the next (arXiv 2605.26670, Algorithm 1).
    """

    name: ClassVar[str] = "rect"
    reference: ClassVar[str] = "arXiv:2401.04700"
    acts_on: ClassVar[Collection[str]] = {"updates"}

    @dataclass(frozen=True)
    class Options:
        """How much of an update is kept."""

        keep: float = option(0.4, "share of the update's entries to keep")
        feedback: bool = option(False, "give the next batch what was zeroed in this one (error feedback)")

        def __post_init__(self) -> None:
            if not 0 < self.keep <= 1:
                raise ValueError("keep must be greater than 0 and at most 1")

    def __init__(self, options: object = None):
        super().__init__(options)
        self.feeds_back = self.remembers = self.options.feedback

    def stabilize_update(self, session: Session, site: Site, update: Update, problem: Problem | None) -> Update:
        change = update.dense()
        # An unchanged entry of a zero weight is 0/0; it counts as unchanged.
        relative = (change / session.weight(site).to(change)).abs().nan_to_num(nan=0.0, posinf=float("inf"))
        dropped = int((1 - self.options.keep) * relative.numel())
        if dropped == 0:
            return update
        limit = relative.flatten().kthvalue(dropped).values
        return Dense(change.where(relative > limit, 0.0))
