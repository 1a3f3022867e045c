"""Measure the edits of a run: all before and after, each batch, and a fixed sample along the stream."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from editcli.evaluation.ability import general_text
from editcli.evaluation.distribution import (
    BaseDistributions,
    Divergences,
    neighbor_prompts,
    spread,
    unrelated_prompts,
)
from editcli.evaluation.metrics import Evaluation, evaluate
from editcli.evaluation.registry import ANSWERS
from editcli.models.loading import LoadedModel
from editcli.requests.schema import EditRequest
from editcli.requests.superseding import supersede
from editcli.runs.context import Context
from editcli.runs.outcome import efficacy
from editcli.runs.planning import Planned
from editcli.settings.guards import needs_retained

SAMPLED_EDITS = 200
"""Edits in the sample: enough for a share to be known to a few percent, few enough to ask often."""

METRICS = ANSWERS
"""The figures of the sample along the stream."""


@dataclass(frozen=True, slots=True)
class Measuring:
    """The measurements of one run, on its model as it stands."""

    planned: Planned
    loaded: LoadedModel
    context: Context
    distributions: BaseDistributions | None = None
    """The unedited model's, for comparing along the stream; None where the run does not measure on the way."""

    @classmethod
    def of(cls, planned: Planned, loaded: LoadedModel, context: Context) -> Measuring:
        """Return the measurements of a run whose model is not edited yet; what edits change is stored here."""
        plain = cls(planned, loaded, context)
        if plain.retained_every is None or planned.recipe.eval_every is None:
            return plain
        sample = plain.sample()
        with context.clock.spent("eval"):
            near = neighbor_prompts(loaded, [request for request in planned.requests if request.id in sample])
            far = unrelated_prompts(loaded, general_text(None))
            return replace(plain, distributions=BaseDistributions(loaded, [*far, *near]))

    def evaluate(self, requests: Sequence[EditRequest]) -> Evaluation | None:
        """Measure edits with all their prompts; None where the run does not evaluate."""
        if not self.planned.recipe.evaluate:
            return None
        context = self.context
        with context.clock.spent("eval"):
            metrics = ("counterfact",)
            return evaluate(self.loaded, requests, metrics=metrics, reporter=context.reporter, team=context.team)

    def before(self, requests: Sequence[EditRequest]) -> Evaluation | None:
        """Measure edits that are about to be in force: of those that contradict each other only the last one."""
        return self.evaluate(supersede(requests)[0])

    def efficacy(self, requests: Sequence[EditRequest]) -> Mapping[str, float | None]:
        """Measure efficacy alone: a measurement after every batch must be cheap."""
        bare = [replace(r, paraphrase_prompts=(), neighborhood_prompts=(), generation_prompts=()) for r in requests]
        evaluation = self.evaluate(bare)
        return {} if evaluation is None else efficacy(evaluation)

    @property
    def retained_every(self) -> int | None:
        """After how many batches the sample is measured; None where it never is."""
        recipe, guarded = self.planned.recipe, needs_retained(self.planned.guards)
        if not recipe.evaluate or (recipe.eval_every is None and not guarded):
            return None
        return 1 if guarded else recipe.eval_every

    def retained(self, requests: Sequence[EditRequest]) -> Mapping[str, float | int | None]:
        """Measure those of the edits written so far that are in the sample.

        A resumed stream may have been given another file since: edits that it does not name are always in.
        """
        sample, known = self.sample(), {request.id for request in self.planned.requests}
        asked = [request for request in requests if request.id in sample or request.id not in known]
        evaluation = self.evaluate(asked) if asked else None
        if evaluation is None:
            return {}
        return {**{m: getattr(evaluation, m) for m in METRICS}, "edits": len(asked), **self._divergences(asked)}

    def _divergences(self, requests: Sequence[EditRequest]) -> dict[str, float]:
        """Return how far the next token's distribution moved on the neighbours of ``requests`` and on other texts."""
        if self.distributions is None:
            return {}
        ids = {request.id for request in requests}
        with self.context.clock.spent("eval"):
            values = self.distributions.divergences(self.loaded)
        near = spread(one for one in values if one.edit in ids)
        return Divergences(near, spread(one for one in values if one.edit is None)).figures

    def sample(self) -> frozenset[str]:
        """Return the ids of a sample of the planned edits: the same ones every time."""
        ids = [request.id for request in self.planned.requests]
        return frozenset(random.Random(self.planned.recipe.seed).sample(ids, min(SAMPLED_EDITS, len(ids))))
