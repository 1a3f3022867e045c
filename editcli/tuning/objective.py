"""The objective of ``tune``: the harmonic mean of efficacy, generalization and specificity, minus a price on drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from editcli.evaluation.metrics import harmonic
from editcli.settings.recipes import KL_PRICE

if TYPE_CHECKING:
    from editcli.evaluation.metrics import Evaluation

SCORE = ".3f"
"""Format of a score."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of a candidate on a set of edits; None where the edits have no prompts to measure it on.

    Efficacy is the greedy answer's accuracy: a target that is merely likelier than the old answer is not yet said, and
    a setting that never reaches its targets can have a success of 0.76 at an accuracy of 0.22. Generalization and
    specificity are successes, as in the papers, because paraphrases and neighbours end in open sentences whose greedy
    continuation is often another word than the answer, edited or not.
    """

    efficacy: float
    generalization: float | None = None
    specificity: float | None = None
    kl: float | None = None
    """Mean KL(base || edited) per token of ordinary text, in nats; None while it was not measured."""
    ratio: float | None = None
    """The largest R_n = ||W_n|| / ||W_0|| of any site; None where it was not measured or every W_0 is zero."""

    def score(self, *, kl_price: float = KL_PRICE) -> float:
        """Return harmonic mean minus price; what could not be measured is left out of the mean."""
        known = [value for value in (self.efficacy, self.generalization, self.specificity) if value is not None]
        mean = harmonic(known)
        assert mean is not None, "efficacy is always known"
        return mean - kl_price * (self.kl or 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object."""
        return asdict(self)


def figures_from(record: Mapping[str, Any] | None) -> Figures | None:
    """Return the figures of :meth:`Figures.to_json`."""
    return None if record is None else Figures(**record)


def figures_of(evaluation: Evaluation, *, kl: float | None = None, ratio: float | None = None) -> Figures:
    """Return the figures of an evaluation under the CounterFact protocol.

    Without a true answer there is no success on paraphrases; accuracy stands in for it.
    """
    generalization = evaluation.generalization_success
    return Figures(
        efficacy=evaluation.efficacy_accuracy or 0.0,
        generalization=evaluation.generalization_accuracy if generalization is None else generalization,
        specificity=evaluation.specificity_success,
        kl=kl,
        ratio=ratio,
    )
