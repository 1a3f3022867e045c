"""Stacks side by side on one stream: what each of them retains, and what it does to the norms.

A bench is a folder of ordinary runs, one for each stack, all from the same base with the same edits, so every figure
can be looked into with the other commands. Its own part is to start them, to resume those that were stopped, and to
put their journals beside each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from editcli.errors import NumericalError, OptionError, StateError
from editcli.evaluation.registry import differences, protocols_of
from editcli.health.growth import Growth, fit_growth
from editcli.plugin.manager import Plugins
from editcli.records.decoding import encode
from editcli.records.edits import OutcomeLine, read_table
from editcli.records.history import History, read_history
from editcli.records.journal import RETAINED, BatchRecord
from editcli.records.record import ENDED, INTERRUPTED, RUNNING, RunRecord, read_record
from editcli.records.state import RunFolder
from editcli.reporting import Reporter, Silent
from editcli.runs.apply import apply
from editcli.runs.measuring import METRICS
from editcli.runs.planning import read_requested, with_clock
from editcli.settings.recipe import Recipe
from editcli.settings.setting import settings_of
from editcli.storage.files import write_json
from editcli.storage.folders import holding

COLLAPSE = 0.60
"""CP@60: a stack has collapsed once its retained efficacy is below this."""
COLLAPSING = ("efficacy_success", "efficacy_accuracy")
"""Efficacies whose collapse point is looked for; the papers' is that of the first."""
COHORTS = 4
"""Equal parts of the stream whose edits are compared at its end: were the early ones overwritten?"""
FAILED = "failed"
"""Status of a stack whose linear algebra broke down."""
FIGURES = METRICS
"""Both forms of efficacy, generalization and specificity."""


@dataclass(frozen=True, slots=True)
class Point:
    """The figures of a stack after ``edits`` edits."""

    edits: int
    ratio: float | None
    """The largest R_n of any site that has one."""
    figures: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Curve:
    """One stack along the stream."""

    stack: str
    status: str
    points: tuple[Point, ...]
    collapse: Mapping[str, int | None]
    """CP@60 of each of :data:`COLLAPSING`: edits done when it was first below 0.60; None while it never was."""
    cohorts: Mapping[str, tuple[float, ...]]
    """Each of :data:`COLLAPSING` at the end in every quarter of the stream, the earliest quarter first."""
    growth: Growth | None
    """Growth of the largest R_n of any site, over all batches."""
    seconds_per_edit: float | None
    out: str
    protocols: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Protocol and scorer of each of :data:`FIGURES`, as the stack's own run records them."""

    @property
    def last(self) -> Point | None:
        """The stack at the end of the stream."""
        return self.points[-1] if self.points else None


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All stacks of a bench; ``complete`` is false when one of them was interrupted."""

    edits: str
    batch_size: int | None
    curves: tuple[Curve, ...]
    out: str

    @property
    def complete(self) -> bool:
        """Whether every stack came to its end."""
        return all(curve.status != INTERRUPTED for curve in self.curves)

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON object."""
        return {**asdict(self), "protocols": protocols_of(FIGURES)}


def parse_stacks(text: str, plugins: Plugins) -> tuple[tuple[str, ...], ...]:
    """Read ``memit,encore+nas``: an editor's or a stack's name, then stabilizers'; raises on one that is not known."""
    stacks = []
    for part in text.split(","):
        names = tuple(name.strip() for name in part.split("+"))
        if not all(names):
            raise OptionError(f"cannot read the stack {part!r}: write EDITOR+STABILIZER, for instance memit+nas+revive")
        if plugins.stack(names[0]) is None:
            plugins.find("editor", names[0])
        for name in names[1:]:
            plugins.find("stabilizer", name)
        stacks.append(names)
    return tuple(dict.fromkeys(stacks))


def bench(
    recipe: Recipe, stacks: Sequence[Sequence[str]], plugins: Plugins, reporter: Reporter | None = None
) -> BenchReport:
    """Run every stack as ``recipe`` says, each in its own folder under the recipe's; resume what is there."""
    reporter = reporter or Silent()
    # A stream or a preset that cannot be read is refused before anything is written.
    recipe = recipe.with_preset_read()
    read_requested(recipe, plugins)
    with holding(recipe.folder):
        curves = _curves(recipe, stacks, plugins, reporter)
    for text in _mixed(curves):
        reporter.warn(text)
    report = BenchReport(recipe.edits, recipe.batch_size, tuple(curves), str(recipe.folder))
    write_json(recipe.folder / "bench.json", report.to_json())
    return report


def _curves(recipe: Recipe, stacks: Sequence[Sequence[str]], plugins: Plugins, reporter: Reporter) -> list[Curve]:
    """Run the stacks one after the other, up to the first that is interrupted."""
    # Stacks that ran before and stacks that run today use one time in the chat template.
    recipe = with_clock(recipe, folders=[recipe.folder / "+".join(names) for names in stacks])
    curves = []
    with reporter.phase("Stacks", len(stacks), "stacks") as advance:
        for names in stacks:
            title = "+".join(names)
            reporter.note(f"Stack {title}")
            try:
                status = _run(_recipe_of(recipe, names).resolved(plugins), plugins, reporter)
            except NumericalError as error:
                # A method that fails is a result of the bench, not its end.
                reporter.warn(f"stack {title} failed: {error}")
                status = FAILED
            curves.append(replace(read_curve(title, recipe.folder / title), status=status))
            advance(1)
            if status == INTERRUPTED:
                break
    return curves


def read_curve(stack: str, out: Path) -> Curve:
    """Read one stack's curve from its run folder."""
    history = read_history(out)
    if history is None:
        return Curve(stack, FAILED, (), dict.fromkeys(COLLAPSING), {}, None, None, str(out))
    record, points = history.record, _points(history)
    done = sum(len(batch.edits) for batch in history.batches)
    spent = sum(batch.duration or 0.0 for batch in history.batches)
    return Curve(
        stack=stack,
        status=record.status if record else RUNNING,
        points=points,
        collapse={name: collapse_point(points, name) for name in COLLAPSING},
        cohorts=_cohorts(history),
        growth=_growth(history),
        seconds_per_edit=spent / done if done else None,
        out=str(out),
        protocols=_protocols(record),
    )


def _protocols(record: RunRecord | None) -> dict[str, Mapping[str, str]]:
    """Return how a run took the figures that a bench compares; a run may have measured more along its stream."""
    recorded = (record and encode(record.protocols)) or {}
    return {name: recorded[name] for name in FIGURES if name in recorded}


def _mixed(curves: Sequence[Curve]) -> Iterator[str]:
    """Yield a warning for each stack whose metrics were taken in another way than the first stack's."""
    for curve in curves[1:]:
        for text in differences(curves[0].protocols, curve.protocols):
            yield f"{curves[0].stack} and {curve.stack} were measured differently, do not compare them: {text}"


def _recipe_of(recipe: Recipe, names: Sequence[str]) -> Recipe:
    out = recipe.folder / "+".join(names)
    return replace(
        recipe,
        editor=names[0],
        stabilizers=tuple(names[1:]),
        out=str(out),
        resume=RunFolder(out).is_run,
        overwrite=False,
    )


def _run(recipe: Recipe, plugins: Plugins, reporter: Reporter) -> str:
    """Run or resume one stack; a stack that came to its end as this recipe says is not run again."""
    record = read_record(recipe.folder)
    if record is None or record.status not in ENDED:
        return apply(recipe, plugins, reporter).status
    asked = recipe.to_json()
    deciding = ["settings", *(name for name, setting in settings_of(Recipe).items() if setting.decides)]
    made = record.recipe
    other = [name for name in deciding if _rooted(name, asked[name]) != _rooted(name, made.get(name))]
    if other:
        raise StateError(f"{recipe.folder} was made with other {', '.join(other)}; choose another --out")
    return record.status


def _rooted(name: str, value: Any) -> Any:
    """Return a setting as a run records it: the edits by their path from the root."""
    return str(Path(value).absolute()) if name == "edits" and value else value


def collapse_point(points: Sequence[Point], figure: str) -> int | None:
    """Return the edits done when a retained figure was first below :data:`COLLAPSE`; None when it never was."""
    known = ((point.edits, point.figures.get(figure)) for point in points)
    return next((edits for edits, value in known if value is not None and value < COLLAPSE), None)


def _points(history: History) -> tuple[Point, ...]:
    points = []
    for edits, batch in _counted(history):
        retained = batch.measured(RETAINED)
        if retained:
            figures = {name: retained.get(name) for name in FIGURES}
            points.append(Point(edits, batch.largest_ratio, figures))
    return tuple(points)


def _growth(history: History) -> Growth | None:
    counted = _counted(history)
    known = [(edits, ratio) for edits, batch in counted if (ratio := batch.largest_ratio) is not None]
    return fit_growth([edits for edits, _ in known], [ratio for _, ratio in known])


def _counted(history: History) -> list[tuple[int, BatchRecord]]:
    """Return the batches, each with the number of edits done after it."""
    return list(zip(accumulate(len(batch.edits) for batch in history.batches), history.batches, strict=True))


def _cohorts(history: History) -> dict[str, tuple[float, ...]]:
    """Return both efficacies of each quarter of the stream, from the final evaluation; nothing without one."""
    lines = read_table(history.folder.outcomes, OutcomeLine).lines
    answers = {line.id: line.efficacy[0] for line in lines if line.efficacy}
    ids = [name for batch in history.batches for name in batch.edits if name in answers]
    size = len(ids) // COHORTS
    if not size:
        return {}
    parts = [[answers[name] for name in ids[start * size : (start + 1) * size]] for start in range(COHORTS)]
    cohorts = {"efficacy_accuracy": tuple(fmean(answer.exact for answer in part) for part in parts)}
    # An edit without a true answer has no success to be averaged.
    known = [[answer.success for answer in part if answer.success is not None] for part in parts]
    if all(len(some) == size for some in known):
        cohorts = {"efficacy_success": tuple(map(fmean, known)), **cohorts}
    return cohorts
