"""What is retained by the age of the edits: were the early ones overwritten by those that came later?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from editcli.evaluation.generated import mean_of_means
from editcli.evaluation.metrics import Outcome

PARTS = 10
"""Parts of a run, of equal size, by the order in which its edits were written."""


@dataclass(frozen=True, slots=True)
class Cohort:
    """The edits of one part of a run, as far as they were measured; the first part is the oldest."""

    first: int
    """Place in the run of the part's first edit, counted from 1."""
    last: int
    edits: int
    """Edits of the part that were measured."""
    efficacy_accuracy: float | None
    efficacy_success: float | None
    contains_new: float | None
    """generated.efficacy_contains_new; None where the model did not write freely."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures by the names of the registry."""
        return {
            "first": self.first,
            "last": self.last,
            "edits": self.edits,
            "efficacy_accuracy": self.efficacy_accuracy,
            "efficacy_success": self.efficacy_success,
            "generated": {"efficacy_contains_new": self.contains_new},
        }


def cohorts(outcomes: Sequence[Outcome], places: Mapping[str, int], total: int) -> tuple[Cohort, ...]:
    """Return the cohorts of the edits whose place in a run of ``total`` edits is known, counted from 0.

    A run of fewer than ten edits has a part for each edit. A part without a measured edit is left out.
    """
    parts = min(PARTS, total)
    groups: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.id in places:
            groups.setdefault(places[outcome.id] * parts // total, []).append(outcome)
    return tuple(_cohort(group, part, parts, total) for part, group in sorted(groups.items()))


def _cohort(group: Sequence[Outcome], part: int, parts: int, total: int) -> Cohort:
    # Place p lies in part p * parts // total, so a part begins at the first p for which that is reached.
    first, last = (-(-number * total // parts) for number in (part, part + 1))
    answers = [answer for outcome in group for answer in outcome.efficacy]
    successes = [answer.success for answer in answers if answer.success is not None]
    free = [[answer for answer in outcome.generated if answer.group == "efficacy"] for outcome in group]
    return Cohort(
        first=first + 1,
        last=last,
        edits=len(group),
        efficacy_accuracy=fmean(answer.exact for answer in answers) if answers else None,
        efficacy_success=fmean(successes) if successes else None,
        contains_new=mean_of_means(free, lambda answer: answer.right),
    )
