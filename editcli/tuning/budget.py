"""The time that a search may take: how much is left, and how many edits a trial can afford."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

TRIALS = 10
"""Trials that the time should be enough for."""
SHARE = 0.6
"""What a trial costs on average, as a share of a whole one: many are ended early."""
FEWEST, MOST = 8, 64
"""Edits of a trial: with fewer, one edit more or less decides; with more, few trials can be made."""
DEFAULT_EDITS = 32
"""Edits of a trial where only the number of trials is limited."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Counts from when it is made; ``minutes`` None is no limit."""

    minutes: float | None
    started: float = field(default_factory=time.monotonic)
    """When the time began to run, on the system's monotonic clock."""

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds that are left; infinite without a limit."""
        return float("inf") if self.minutes is None else 60 * self.minutes - self.spent

    def affords(self, seconds: float) -> bool:
        """Tell whether something that takes so long would still end in time."""
        return self.left > seconds


def edits_per_trial(left: float, *, each: float, available: int) -> int:
    """Return how many of ``available`` edits a trial should write, where one edit costs ``each`` seconds.

    As many are held out, and the preset and the best trial are measured on them at the end. A third of a small file is
    held out all the same.
    """
    whole = TRIALS * SHARE + 2
    affordable = MOST if left == float("inf") else int(left / (whole * max(each, 1e-6)))
    chosen = DEFAULT_EDITS if left == float("inf") else min(max(affordable, FEWEST), MOST)
    return max(1, min(chosen, available - available // 3))
