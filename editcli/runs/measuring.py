"""Measure the edits of a run: all before and after, each batch, and a fixed sample along the stream."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
        sample, known = self._sample(), {request.id for request in self.planned.requests}
        asked = [request for request in requests if request.id in sample or request.id not in known]
        evaluation = self.evaluate(asked) if asked else None
        return {} if evaluation is None else {**{m: getattr(evaluation, m) for m in METRICS}, "edits": len(asked)}

    def _sample(self) -> frozenset[str]:
        """Return the ids of a sample of the planned edits: the same ones every time."""
        ids = [request.id for request in self.planned.requests]
        return frozenset(random.Random(self.planned.recipe.seed).sample(ids, min(SAMPLED_EDITS, len(ids))))
