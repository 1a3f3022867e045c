"""``eval``: measure edits on a saved model, and on its base beside it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcli.distributed.team import Team, agree_on_inputs, agree_on_models
from editcli.errors import ModelError, OptionError
from editcli.evaluation.ability import Drift, general_drift
from editcli.evaluation.admission import thinking_warning
from editcli.evaluation.harness import HarnessResult, require_harness, run_harness
from editcli.evaluation.locality import answer_locality
from editcli.evaluation.metrics import Evaluation, evaluate
from editcli.models.loading import (
    LoadedModel,
    Loading,
    ModelSource,
    bundled_folder,
    first_model,
    open_model,
    resolve_model,
)
from editcli.records.history import read_history
from editcli.reporting import Reporter, Silent
from editcli.requests.reader import EditFile, read_edits
from editcli.requests.schema import EditRequest
from editcli.requests.superseding import Superseded, edit_of, supersede
from editcli.runs.planning import clock_of
from editcli.settings.recipes import OWN_BASE, EvalRecipe
from editcli.storage.opening import TEXT, read_text

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
    drift: Drift | None = None
    warnings: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    superseded: tuple[Superseded, ...] = ()
    """Edits that were not measured, since a later edit of the file or of the model's run gives their prompt another
    target."""

    def to_json(self) -> dict[str, Any]:
        """Return the metrics as a JSON object; the raw numbers of single edits are in ``eval --out``."""
        return {
            "model": self.model,
            "edits_file": self.edits_file,
            "edits": self.edits,
            "rejected": list(self.rejected),
            "superseded": [{"id": one.request.id, "superseded_by": one.by.id} for one in self.superseded],
            **self.evaluation.to_json(),
            "harness": None if self.harness is None else self.harness.to_json(),
            "base": None if self.base_evaluation is None else self._base_json(self.base_evaluation),
            "drift": None if self.drift is None else self.drift.to_json(),
        }

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
    _refuse_company(recipe, team)
    if recipe.harness:
        require_harness()
    file = _read(recipe, plugins, reporter)
    source = resolve_model(recipe.model, code=recipe.trust_remote_code)
    in_force, replaced = _in_force(file, source, reporter)
    requests = sample(in_force, recipe.sample, seed=recipe.seed)
    recipe = _with_clock(recipe, source, team)
    base_source = _base(recipe, source)
    texts = list(general_text(recipe.text)) if base_source is not None else []
    parts = {"recipe": asdict(recipe), "file": file.sha256, "edits": [r.digest for r in requests], "text": texts}
    agree_on_inputs(team, "recipe, edits and text", parts)
    families = plugins.families()
    loading = Loading.of(recipe)
    loaded = open_model(source, loading, families=families, reporter=reporter)
    base = None if base_source is None else open_model(base_source, loading, families=families, reporter=reporter)
    warning = thinking_warning(loaded.tokens)
    if warning is not None:
        reporter.warn(warning)
    if team.size > 1:
        # A fingerprint costs a pass over the files, which a process on its own has no use for.
        agree_on_models(team, [one.checkpoint.fingerprint() for one in (loaded, base) if one is not None])
    if base is not None:
        requests = answer_locality(base, requests, reporter=reporter, team=team)
    evaluation = _evaluate(loaded, requests, recipe, reporter, team)
    if recipe.out is not None and team.leads:
        _write_raw(Path(recipe.out), evaluation)
    return Measurement(
        model=source.name,
        edits_file=None if recipe.edits is None else file.source,
        edits=len(requests),
        evaluation=evaluation,
        harness=_harness(loaded, recipe, reporter),
        base=None if base_source is None else base_source.name,
        base_evaluation=None if base is None else _evaluate(base, requests, recipe, reporter, team),
        base_harness=None if base is None else _harness(base, recipe, reporter),
        drift=None if base is None else general_drift(loaded, base, texts, reporter=reporter, team=team),
        rejected=tuple(str(error) for error in file.rejected),
        superseded=replaced,
    )


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
    if recipe.harness:
        raise OptionError(
            f"--harness runs in one process, not in {team.size}; run it without a launcher, the edits' metrics with one"
        )
    if recipe.edits == "-":
        raise OptionError(f"{team.size} processes cannot share the standard input; pass the edits as a file")


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
    if not recipe.harness:
        return None
    # It draws progress of its own.
    reporter.note(f"lm-evaluation-harness on {loaded.source.name}: {', '.join(recipe.harness)}")
    return run_harness(loaded, recipe.harness, include=recipe.harness_include, seed=recipe.seed)


def _evaluate(
    loaded: LoadedModel, requests: Sequence[EditRequest], recipe: EvalRecipe, reporter: Reporter, team: Team
) -> Evaluation:
    return evaluate(loaded, requests, metrics=recipe.metrics or None, seed=recipe.seed, reporter=reporter, team=team)


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


def general_text(file: str | None) -> Iterator[str]:
    """Yield the paragraphs of the text to measure general ability on: a file's, or the bundled held-out text's."""
    path = Path(file).expanduser() if file is not None else bundled_folder() / "heldout.txt"
    try:
        content = read_text(path, TEXT)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"the text {path} cannot be read: {error}") from error
    yield from (line for line in content.splitlines() if line.strip())


def _write_raw(path: Path, evaluation: Evaluation) -> None:
    from editcli.storage.files import write_lines

    write_lines(path, evaluation.raw())
