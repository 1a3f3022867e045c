"""``eval``: measure edits on a saved model, and on its base beside it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcli.commands.evidence import Earlier, protocol_settings, raw_lines, read_earlier
from editcli.commands.quantised import QuantisedEvaluation, measure_quantised
from editcli.distributed.team import Team, agree_on_inputs, agree_on_models
from editcli.errors import ModelError, OptionError
from editcli.evaluation.ability import Drift, general_drift, general_text
from editcli.evaluation.admission import thinking_warning
from editcli.evaluation.cohorts import Cohort, cohorts
from editcli.evaluation.distribution import Divergences, compare_distributions
from editcli.evaluation.harness import HarnessResult, require_harness, run_harness
from editcli.evaluation.in_context import stated
from editcli.evaluation.judge import Endpoint, Judgement, answers_of, judge, require_judge
from editcli.evaluation.locality import answer_locality
from editcli.evaluation.metrics import Evaluation, evaluate
from editcli.evaluation.registry import paths, protocols_of
from editcli.models.loading import (
    LoadedModel,
    Loading,
    ModelSource,
    first_model,
    open_model,
    resolve_model,
)
from editcli.models.quantisation import parse_quantisations
from editcli.models.quantised import open_quantised
from editcli.records.evidence import evidence_folder, write_evidence
from editcli.records.history import History, read_history
from editcli.records.state import RunFolder
from editcli.records.verdicts import VerdictFile
from editcli.reporting import Reporter, Silent
from editcli.requests.reader import EditFile, read_edits
from editcli.requests.schema import EditRequest
from editcli.requests.superseding import Superseded, edit_of, supersede
from editcli.runs.planning import clock_of
from editcli.settings.recipes import IN_CONTEXT, OWN_BASE, EvalRecipe
from editcli.settings.suites import SUITES
from editcli.storage.files import write_lines

if TYPE_CHECKING:
    from editcli.plugin.manager import Plugins


SHOWN = 5
"""Superseded edits that a note names."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """The result of ``eval``."""

    model: str
    edits_file: str | None
    edits: int
    evaluation: Evaluation
    harness: HarnessResult | None = None
    base: str | None = None
    base_evaluation: Evaluation | None = None
    base_harness: HarnessResult | None = None
    in_context: Evaluation | None = None
    """The base with each fact in front of its prompts."""
    drift: Drift | None = None
    divergences: Divergences | None = None
    cohorts: tuple[Cohort, ...] = ()
    """What is retained by the age of the edits, in a run of ours."""
    protocol_settings: Mapping[str, Any] = field(default_factory=dict)
    quantised: tuple[QuantisedEvaluation, ...] = ()
    judgement: Judgement | None = None
    earlier: Earlier | None = None
    warnings: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    superseded: tuple[Superseded, ...] = ()
    """Edits that were not measured, since a later edit of the file or of the model's run gives their prompt another
    target."""

    def to_json(self) -> dict[str, Any]:
        """Return the metrics as a JSON object; the raw numbers of single edits are in ``eval --out``."""
        figures = {
            "model": self.model,
            "edits_file": self.edits_file,
            "edits": self.edits,
            "rejected": list(self.rejected),
            "superseded": [{"id": one.request.id, "superseded_by": one.by.id} for one in self.superseded],
            **self.evaluation.to_json(),
            "harness": None if self.harness is None else self.harness.to_json(),
            "base": None if self.base_evaluation is None else self._base_json(self.base_evaluation),
            "in_context": None if self.in_context is None else {"model": self.base, **self.in_context.to_json()},
            "drift": None if self.drift is None else self.drift.to_json(),
            "distribution": None if self.divergences is None else self.divergences.to_json(),
            "cohorts": [cohort.to_json() for cohort in self.cohorts],
            "judge": None if self.judgement is None else self.judgement.to_json(),
            "quantised": [one.to_json() for one in self.quantised],
        }
        protocols = protocols_of(paths(figures))
        return {**figures, "protocols": protocols, "protocol_settings": dict(self.protocol_settings)}

    def _base_json(self, evaluation: Evaluation) -> dict[str, Any]:
        harness = None if self.base_harness is None else self.base_harness.to_json()
        return {"model": self.base, **evaluation.to_json(), "harness": harness}


def measure(
    recipe: EvalRecipe, plugins: Plugins, reporter: Reporter | None = None, *, team: Team | None = None
) -> Measurement:
    """Run ``recipe``; raises an :class:`~editcli.errors.EditError` in one sentence.

    Every process of ``team`` calls this alike and returns the same figures; rank 0 alone writes and reports.
    """
    team = team or Team()
    reporter = reporter if reporter is not None and team.leads else Silent()
    _refuse_unmeasurable(recipe, team)
    earlier = read_earlier(recipe.against)
    file = _read(recipe, plugins, reporter)
    source = resolve_model(recipe.model, code=recipe.trust_remote_code)
    folder = evidence_folder(source.folder) if recipe.record else None
    in_force, replaced = _in_force(file, source, reporter)
    requests = sample(in_force, recipe.sample, seed=recipe.seed)
    recipe = _with_clock(recipe, source, team)
    base_source = _base(recipe, source)
    texts = list(general_text(recipe.text)) if base_source is not None else []
    _agree(team, recipe, file, requests, texts)
    families, loading = plugins.families(), Loading.of(recipe)
    loaded = open_model(source, loading, families=families, reporter=reporter)
    base = None if base_source is None else open_model(base_source, loading, families=families, reporter=reporter)
    warning = thinking_warning(loaded.tokens)
    if warning is not None:
        reporter.warn(warning)
    _agree_on_models(team, loaded, base)
    if base is not None:
        requests = answer_locality(base, requests, reporter=reporter, team=team)
    models = _Models(recipe, loaded, base, requests, texts, reporter, team)
    measured = replace(
        models.measure(),
        edits_file=None if recipe.edits is None else file.source,
        quantised=measure_quantised(
            parse_quantisations(recipe.quantise),
            partial(open_quantised, source, loading=loading, families=families, reporter=reporter),
            models.evaluate,
        ),
        earlier=earlier,
        rejected=tuple(str(error) for error in file.rejected),
        superseded=replaced,
    )
    measured = replace(measured, judgement=_judged(measured.evaluation, recipe, reporter))
    _tell_and_write(measured, models, folder)
    return measured


@dataclass(frozen=True, slots=True)
class _Models:
    """The models of one evaluation, loaded, with what is asked of them."""

    recipe: EvalRecipe
    loaded: LoadedModel
    base: LoadedModel | None
    requests: Sequence[EditRequest]
    texts: Sequence[str]
    reporter: Reporter
    team: Team

    def measure(self) -> Measurement:
        """Measure the model, and its base beside it where there is one."""
        base, recipe, requests = self.base, self.recipe, self.requests
        shared: dict[str, Any] = {"reporter": self.reporter, "team": self.team}
        # Its data may not be there, which has to be known before anything that takes long.
        harness = self._harness(self.loaded)
        evaluation = self.evaluate(self.loaded)
        compared = base is not None and (not recipe.metrics or "distribution" in recipe.metrics)
        return Measurement(
            model=self.loaded.source.name,
            edits_file=None,
            edits=len(requests),
            evaluation=evaluation,
            harness=harness,
            base=None if base is None else base.source.name,
            base_evaluation=None if base is None else self.evaluate(base),
            base_harness=None if base is None else self._harness(base),
            in_context=self._in_context() if recipe.baseline == IN_CONTEXT else None,
            drift=None if base is None else general_drift(self.loaded, base, self.texts, **shared),
            divergences=compare_distributions(self.loaded, base, requests, self.texts, **shared)
            if base is not None and compared
            else None,
            cohorts=_cohorts(evaluation, requests, read_history(self.loaded.source.folder)),
            protocol_settings=protocol_settings(recipe, evaluation),
        )

    def evaluate(self, loaded: LoadedModel, requests: Sequence[EditRequest] | None = None) -> Evaluation:
        """Measure the edits on one of the models."""
        recipe = self.recipe
        return evaluate(
            loaded,
            self.requests if requests is None else requests,
            metrics=recipe.metrics or None,
            seed=recipe.seed,
            rules=recipe.rules,
            reporter=self.reporter,
            team=self.team,
        )

    def _in_context(self) -> Evaluation:
        assert self.base is not None
        return self.evaluate(self.base, [stated(request, self.base.tokens) for request in self.requests])

    def _harness(self, loaded: LoadedModel) -> HarnessResult | None:
        return _harness(loaded, self.recipe, self.reporter)


def _in_force(
    file: EditFile, source: ModelSource, reporter: Reporter
) -> tuple[list[EditRequest], tuple[Superseded, ...]]:
    """Return the edits of a file that no later one of it, or of the model's run, contradicts, and the others."""
    in_force, replaced = supersede(file.requests)
    history = read_history(source.folder) if in_force else None
    written = {} if history is None else {edit_of(one.request): one for one in history.superseded()}
    later = [replace(written[edit_of(r)], request=r) for r in in_force if edit_of(r) in written]
    if later:
        names = ", ".join(f"{one.request.id!r} by {one.by.id!r}" for one in later[:SHOWN])
        more = f" and {len(later) - SHOWN} more" if len(later) > SHOWN else ""
        reporter.note(f"not measured, since later edits of the run supersede them: {names}{more}")
    gone = {one.request.id for one in later}
    return [request for request in in_force if request.id not in gone], (*replaced, *later)


def sample(requests: Sequence[EditRequest], count: int | None, *, seed: int) -> tuple[EditRequest, ...]:
    """Return ``count`` of the requests in their order, the same for the same seed; all of them for None."""
    if count is None or count >= len(requests):
        return tuple(requests)
    chosen = random.Random(seed).sample(range(len(requests)), count)
    return tuple(requests[index] for index in sorted(chosen))


def _refuse_company(recipe: EvalRecipe, team: Team) -> None:
    if team.size == 1:
        return
    if recipe.runs_tasks:
        raise OptionError(
            f"--harness and --suite run in one process, not in {team.size}; run them without a launcher, the edits' "
            "metrics with one"
        )
    if recipe.judge:
        raise OptionError(f"--judge runs in one process, not in {team.size}; run it without a launcher")
    if recipe.edits == "-":
        raise OptionError(f"{team.size} processes cannot share the standard input; pass the edits as a file")


def _refuse_unmeasurable(recipe: EvalRecipe, team: Team) -> None:
    """Raise :class:`OptionError` for what cannot be measured here, before any weights are loaded."""
    _refuse_company(recipe, team)
    if recipe.runs_tasks:
        require_harness()
    for one in parse_quantisations(recipe.quantise):
        one.require()
    if recipe.judge:
        require_judge()
        VerdictFile(Path(recipe.verdicts))


def _agree(
    team: Team, recipe: EvalRecipe, file: EditFile, requests: Sequence[EditRequest], texts: Sequence[str]
) -> None:
    parts = {"recipe": asdict(recipe), "file": file.sha256, "edits": [r.digest for r in requests], "text": texts}
    agree_on_inputs(team, "recipe, edits and text", parts)


def _agree_on_models(team: Team, *models: LoadedModel | None) -> None:
    if team.size > 1:
        # A fingerprint costs a pass over the files, which a process on its own has no use for.
        agree_on_models(team, [one.checkpoint.fingerprint() for one in models if one is not None])


def _read(recipe: EvalRecipe, plugins: Plugins, reporter: Reporter) -> EditFile:
    if recipe.edits is None:
        return EditFile("", "", (), (), ())
    skip = recipe.on_error == "skip"
    file = read_edits(recipe.edits, skip_bad=skip, limit=recipe.limit, formats=plugins.formats())
    for text in (*file.warnings, *(f"left out: {error}" for error in file.rejected)):
        reporter.warn(text)
    return file


def _with_clock(recipe: EvalRecipe, source: ModelSource, team: Team) -> EvalRecipe:
    """Return the recipe with the time at which the model was edited, so that it is asked what it was taught."""
    if not recipe.chat_template or recipe.template_clock is not None:
        return recipe
    return replace(recipe, template_clock=clock_of([source.folder], team))


def _harness(loaded: LoadedModel, recipe: EvalRecipe, reporter: Reporter) -> HarnessResult | None:
    if not recipe.runs_tasks:
        return None
    suite = None if recipe.suite is None else SUITES[recipe.suite]
    names = (*(suite.tasks if suite else ()), *recipe.harness)
    # It draws progress of its own.
    reporter.note(f"lm-evaluation-harness on {loaded.source.name}: {', '.join(names)}")
    result = run_harness(
        loaded,
        recipe.harness,
        suite=suite,
        include=recipe.harness_include,
        limit=recipe.documents,
        seed=recipe.seed,
    )
    if result.suite is not None and result.suite["left_out"]:
        missing = ", ".join(result.suite["left_out"])
        reporter.warn(f"lm-evaluation-harness {result.version} has no {missing}, so the suite was run without")
    return result


def _judged(evaluation: Evaluation, recipe: EvalRecipe, reporter: Reporter) -> Judgement | None:
    if recipe.judge is None or recipe.judge_model is None:
        return None
    endpoint = Endpoint(recipe.judge, recipe.judge_model, recipe.judge_budget)
    return judge(answers_of(evaluation.outcomes), endpoint, VerdictFile(Path(recipe.verdicts)), reporter=reporter)


def _cohorts(evaluation: Evaluation, requests: Sequence[EditRequest], history: History | None) -> tuple[Cohort, ...]:
    """Return what the run in ``history`` retains by the age of its edits; an edit of another text is none of them."""
    written = {} if history is None else history.requests()
    asked = {request.id: request.digest for request in requests}
    places = {name: place for place, name in enumerate(written) if written[name].digest == asked.get(name)}
    return cohorts(evaluation.outcomes, places, len(written))


def _tell_and_write(measured: Measurement, models: _Models, run: RunFolder | None) -> None:
    """Warn of an earlier evaluation that was taken differently, and write the raw numbers where they were asked for."""
    figures = measured.to_json()
    for text in measured.earlier.warnings(figures) if measured.earlier is not None else ():
        models.reporter.warn(text)
    if not models.team.leads:
        return
    others = {"base": measured.base_evaluation, "in_context": measured.in_context}
    near = measured.divergences.values if measured.divergences is not None else ()
    lines = list(raw_lines(measured.evaluation, others, near)) if models.recipe.out or run is not None else []
    if models.recipe.out is not None:
        write_lines(Path(models.recipe.out), lines)
    if run is not None:
        write_evidence(run, figures, lines)
        models.reporter.note(f"Kept in {run.folder} for 'editcli report'")


def _base(recipe: EvalRecipe, source: ModelSource) -> ModelSource | None:
    code = recipe.trust_remote_code
    if recipe.base != OWN_BASE:
        return None if recipe.base is None else resolve_model(recipe.base, code=code)
    history = read_history(source.folder)
    places = history.bases if history is not None else ()
    base = first_model(places, code=code, convert=history is not None and history.converts)
    if base is not None:
        return base
    known = f"its base {places[0]} is not where it was" if places else "it records no base"
    raise ModelError(f"{source.name}: {known}; pass the base as --base=MODEL")
