"""Edit a loaded model as a candidate says, measure it, and give it its weights back: one trial of ``tune``.

The model, its second moments, the prefixes and the base's answers on ordinary text are made once for all trials.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from editcli.editing.curvature import GradientMoments
from editcli.editing.pipeline import commit, edit_batch, jump_of
from editcli.editing.session import ModelSession, generate_prefixes
from editcli.errors import NumericalError
from editcli.evaluation.ability import TextBaseline
from editcli.evaluation.metrics import evaluate
from editcli.heap import give_back
from editcli.linalg.ratios import ratio
from editcli.models.loading import LoadedModel, choose_device
from editcli.plugin.interfaces import Site, Stabilizer, Update
from editcli.plugin.manager import Plugins
from editcli.plugin.options import merge
from editcli.reporting import Reporter
from editcli.requests.reader import EditFile
from editcli.requests.schema import EditRequest
from editcli.runs import planning
from editcli.runs.identity import statistics_file
from editcli.runs.planning import Planned
from editcli.runs.stream import Stack
from editcli.settings.guards import refuse_nonfinite, with_default
from editcli.settings.recipe import Recipe
from editcli.statistics.moments import SecondMoments
from editcli.tuning.objective import Figures, figures_of
from editcli.tuning.space import Candidate, Space

ONE_PASS_BYTES = 4 << 30
"""Most bytes of second moments that one pass over the reference text may gather."""
PARTS = 4
"""How often a candidate is looked at on its way, the end included."""

Watch = Callable[[int, Figures | None], None]
"""Called after every batch with the edits done so far, and with figures of that part where they were measured; it may
raise to end the trial."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The figures of a candidate on a set of edits."""

    figures: Figures
    seconds: float
    """Without what the components measure on the unedited model before the first batch."""
    prepare: float
    """Seconds of the latter."""


class Workbench:
    """A loaded model whose edits are taken back after every trial."""

    def __init__(
        self, loaded: LoadedModel, recipe: Recipe, plugins: Plugins, reporter: Reporter, *, texts: Iterable[str]
    ):
        self.loaded, self.recipe, self.plugins, self.reporter = loaded, recipe, plugins, reporter
        self.start = self._planned(recipe, ())
        self.prefixes = generate_prefixes(loaded, self.start.targets, seed=recipe.seed, reporter=reporter)
        self.text = TextBaseline(loaded, texts)
        self.moments = SecondMoments(
            loaded,
            options=self.start.statistics,
            corpus=recipe.corpus,
            file=None if recipe.stats is None else statistics_file(recipe.stats),
            reporter=reporter,
            seed=recipe.seed,
        )
        self._candidates: tuple[int, ...] = ()

    @property
    def effective(self) -> Mapping[str, Mapping[str, Any]]:
        """The settings in force at the preset's own point, ``{component: {option: value}}``."""
        parts = {part.name: asdict(part.options) for part in self.start.components}
        core = {"targets": asdict(self.start.targets), "statistics": asdict(self.start.statistics)}
        return {**core, **parts}

    def expect(self, space: Space) -> None:
        """Say which layers may be asked for, so that their second moments are gathered in one pass over the text."""
        self._candidates = space.all_layers()

    def measure_base(self, requests: Sequence[EditRequest]) -> Figures:
        """Return the figures of the unedited model."""
        return figures_of(evaluate(self.loaded, requests, metrics=("counterfact",), reporter=self.reporter), kl=0.0)

    def run(self, candidate: Candidate, requests: Sequence[EditRequest], *, batch: int, watch: Watch) -> Trial:
        """Write ``requests`` in batches as ``candidate`` says, measure all of them at the end, and restore the weights.

        Raises what the methods raise, :class:`NumericalError` for one, and what ``watch`` raises.
        """
        recipe = self.recipe
        settings = merge(recipe.settings, candidate.settings)
        planned = self._planned(replace(recipe, layers=candidate.layers, settings=settings), requests)
        self.moments.plan(self._one_pass(planned.sites))
        session = self._session(planned, requests)
        stack = Stack(planned.editor, planned.stabilizers)
        before, started = session.masters(), time.perf_counter()
        try:
            with _seeded(recipe.seed, 0):
                stack.prepare(session)
            prepared = time.perf_counter()
            self._write(session, stack, planned, batch=batch, watch=watch)
            figures = self._measure(session, planned.stabilizers, requests)
        finally:
            session.restore(before)
            session.forget_reads()
            give_back()
        return Trial(figures, time.perf_counter() - prepared, prepared - started)

    def _planned(self, recipe: Recipe, requests: Sequence[EditRequest]) -> Planned:
        return planning.plan_on(self.loaded, recipe, self.plugins, EditFile(recipe.edits, "", tuple(requests), (), ()))

    def _session(self, planned: Planned, requests: Sequence[EditRequest]) -> ModelSession:
        recipe = self.recipe
        return ModelSession(
            self.loaded,
            planned.layers,
            options=planned.targets,
            prefixes=self.prefixes,
            second_moment=self.moments,
            gradient_moment=GradientMoments(self.loaded, planned.sites, self.moments),
            cache=self.moments.files,
            pilots=planning.pilot_source(requests),
            save_dtype=None if recipe.save_dtype == "auto" else getattr(torch, recipe.save_dtype),
            reporter=self.reporter,
            seed=recipe.seed,
            solve_device=None if recipe.solve_device is None else choose_device(recipe.solve_device),
        )

    def _one_pass(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Return the sites whose second moments to gather when one of ``sites`` is asked for: all, if they fit."""
        architecture = self.loaded.architecture
        every = [architecture.site(layer) for layer in self._candidates]
        size = sum(8 * architecture.shape(site.layer)[1] ** 2 for site in every)
        return every if every and size <= ONE_PASS_BYTES else sites

    def _write(self, session: ModelSession, stack: Stack, planned: Planned, *, batch: int, watch: Watch) -> None:
        requests, looked = planned.requests, 0

        def check(site: Site, update: Update) -> None:
            refuse_nonfinite("the update", update.parts.values(), where=f"at {site.module}")
            jump = jump_of(session, site, update)
            if jump is not None:
                for guard in with_default(planned.guards, stack.editor.largest_jump(site)):
                    guard.check("jump", jump, where=f"at {site.module}", remedy=stack.editor.tempered_by)

        for start in range(0, len(requests), batch):
            chosen = requests[start : start + batch]
            done = start + len(chosen)
            with _seeded(session.seed, start // batch + 1):
                written = edit_batch(session, stack.editor, stack.stabilizers, chosen, check)
                commit(session, stack.editor, stack.stabilizers, chosen, written)
                stack.settle(session)
            session.forget_reads()
            if done == len(requests) or _part(done, len(requests)) == _part(looked, len(requests)):
                watch(done, None)
                continue
            # Only the edits written since the last look: measuring all would cost more with every batch.
            since, looked = requests[looked:done], done
            watch(done, figures_of(evaluate(self.loaded, since, metrics=("counterfact",), reporter=self.reporter)))

    def _measure(
        self, session: ModelSession, stabilizers: Sequence[Stabilizer], requests: Sequence[EditRequest]
    ) -> Figures:
        with session.read_out(stabilizers) as weights:
            evaluation = evaluate(self.loaded, requests, metrics=("counterfact",), reporter=self.reporter)
            norms = ((float(weight.norm()), float(session.baseline(site).norm())) for site, weight in weights.items())
            ratios = [known for pair in norms if (known := ratio(*pair)) is not None]
            drift = self.text.drift(self.loaded)
            if not math.isfinite(drift.kl):
                raise NumericalError(
                    "the edited model's answers are not numbers any more", site=session.sites[-1].module
                )
            return figures_of(evaluation, kl=drift.kl, ratio=max(ratios, default=None))


def _part(done: int, total: int) -> int:
    """Return how many of the equal parts of a set of edits are done."""
    return done * PARTS // total


@contextmanager
def _seeded(seed: int, step: int) -> Iterator[None]:
    """Give every step of every trial the same random numbers, and the caller's back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)
        yield
