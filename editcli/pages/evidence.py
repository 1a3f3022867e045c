"""The evidence of a page: what was measured, by which protocol, beside which baselines, and what was not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editcli.evaluation.registry import PROTOCOLS, metric_of, paths, value_at
from editcli.records.evidence import BesideLine, Evidence, FreeLine
from editcli.records.history import History

MAX_ANSWERS = 5000
"""Answers that the page lists; the file of the run has all."""
_ABSENT: Mapping[str, str] = {
    "base": "the base beside it: eval --base",
    "in_context": "the fact in the prompt, the baseline that edits nothing: eval --baseline in-context",
    "generated": "what the model writes freely: eval --metrics generated",
    "choice": "the choice between listed answers: eval --metrics choice, for edits with target_true",
    "distribution": "how far the next token's distribution moved: eval --base",
    "drift": "perplexity on ordinary text: eval --base",
    "kinds": "what follows from the edits and what must not: the records name no portability or locality by kind",
    "cohorts": "what is retained by the age of the edits",
    "harness": "general ability on benchmarks: eval --harness",
    "quantised": "what is left once the model is quantised: eval --as",
    "judge": "whether another model calls the answers right: eval --judge",
}
"""Parts of an evaluation, each with what is unknown without it and how to measure it."""
BY_AGE = ("efficacy_accuracy", "efficacy_success", "generated.efficacy_contains_new")
"""Metrics that are shown by the age of the edits."""
GROUPS: Mapping[str, str] = {
    "efficacy": "edited prompt",
    "paraphrases": "other phrasing",
    "neighbors": "neighbour",
    "locality": "must stay",
    "portability": "follows",
}
"""Kinds of prompts, in words."""


@dataclass(frozen=True, slots=True)
class MetricRow:
    """A metric with its figures."""

    name: str
    meaning: str
    figures: tuple[float | None, ...]
    """One for each model that was measured."""


@dataclass(frozen=True, slots=True)
class Section:
    """The metrics of one protocol."""

    protocol: str
    meaning: str
    rows: tuple[MetricRow, ...]


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """A prompt with the texts that the models wrote after it."""

    edit: str
    kind: str
    prompt: str
    texts: tuple[str, ...]
    """One for each model."""
    verdict: str
    """right, rival, both, neither, or degenerate: of the edited model's text."""


@dataclass(frozen=True, slots=True)
class AgeRow:
    """The edits of one part of the run, the oldest part first."""

    edits: str
    measured: float | None
    figures: tuple[float | None, ...]
    """Those of :data:`BY_AGE`."""


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A figure of a benchmark."""

    task: str
    name: str
    base: float | None
    edited: float | None


@dataclass(frozen=True, slots=True)
class View:
    """Everything that the section of a page shows."""

    models: tuple[str, ...]
    sections: tuple[Section, ...]
    remarks: tuple[str, ...]
    missing: tuple[str, ...]
    writers: tuple[str, ...]
    """The models whose texts are listed."""
    answers: tuple[AnswerRow, ...]
    hidden: int
    """Answers that are not listed."""
    worst: tuple[tuple[str, str, float | None], ...]
    """The prompts whose distributions moved most: edit or text, prompt, KL."""
    said: Mapping[str, str]
    """What the edited model writes after the prompt of each edit."""
    ages: tuple[AgeRow, ...] = ()
    tasks: tuple[TaskRow, ...] = ()

    @property
    def by_age(self) -> tuple[str, ...]:
        """The names of the figures of :attr:`ages`."""
        return BY_AGE


def view_of(evidence: Evidence | None, history: History, state: str | None) -> View:
    """Return what to show of the evidence of a run; ``state`` is the hash over the run's edits as they are now."""
    if evidence is None:
        return View((), (), (), ("anything beyond the figures of the run itself",), (), (), 0, (), {})
    figures = evidence.figures
    models = {"base": figures.get("base"), "in context": figures.get("in_context"), "edited": figures}
    copies = {f"as {one.get('as')}": one for one in _mappings(figures.get("quantised"))}
    shown = {name: one for name, one in {**models, **copies}.items() if isinstance(one, Mapping)}
    answers = tuple(_answers(evidence))
    return View(
        models=tuple(shown),
        sections=tuple(_sections(figures, list(shown.values()))),
        remarks=tuple(_remarks(evidence, history, state)),
        missing=tuple(text for part, text in _ABSENT.items() if not figures.get(part)),
        writers=tuple(name for name, _ in _writers(evidence)),
        answers=answers[:MAX_ANSWERS],
        hidden=max(0, len(answers) - MAX_ANSWERS),
        worst=tuple(_worst(figures.get("distribution"))),
        said={line.id: line.generated[0].text for line in evidence.answers if line.generated},
        ages=tuple(_ages(figures.get("cohorts"))),
        tasks=tuple(_tasks(figures)),
    )


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the objects in a list of a record."""
    return (one for one in value if isinstance(one, Mapping)) if isinstance(value, list) else iter(())


def _ages(value: Any) -> Iterator[AgeRow]:
    for one in _mappings(value):
        measured, figures = value_at(one, "edits"), tuple(value_at(one, name) for name in BY_AGE)
        yield AgeRow(f"{one.get('first')} to {one.get('last')}", measured, figures)


def _tasks(figures: Mapping[str, Any]) -> Iterator[TaskRow]:
    """Yield every figure of lm-evaluation-harness, of the edited model and its base."""
    base, edited = (_figures_of(one) for one in (figures.get("base"), figures))
    for (task, name), value in edited.items():
        yield TaskRow(task, name, base.get((task, name)), value)


def _figures_of(figures: Any) -> dict[tuple[str, str], float | None]:
    harness = figures.get("harness") if isinstance(figures, Mapping) else None
    tasks = harness.get("tasks") if isinstance(harness, Mapping) else None
    known = tasks if isinstance(tasks, Mapping) else {}
    return {
        (task, name): value_at(one, name) for task, one in known.items() if isinstance(one, Mapping) for name in one
    }


def _sections(figures: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    names = list(paths(figures))
    for protocol, meaning in PROTOCOLS.items():
        rows = []
        for name in names:
            values = tuple(value_at(model, name) for model in models)
            if metric_of(name).protocol == protocol and any(value is not None for value in values):
                rows.append(MetricRow(name.removeprefix(f"{protocol}."), metric_of(name).meaning, values))
        if rows:
            yield Section(protocol, meaning, tuple(rows))


def _worst(sets: Any) -> Iterator[tuple[str, str, float | None]]:
    """Yield the prompts that were named, those of the edits' neighbours first."""
    for spread in (sets.get(name) for name in ("neighbors", "unrelated")) if isinstance(sets, Mapping) else ():
        for one in spread.get("worst") or () if isinstance(spread, Mapping) else ():
            if isinstance(one, Mapping):
                yield str(one.get("edit") or "unrelated text"), str(one.get("prompt")), value_at(one, "kl")


def _remarks(evidence: Evidence, history: History, state: str | None) -> Iterator[str]:
    """Yield what a reader has to know about the figures before believing them."""
    figures, settings = evidence.figures, evidence.figures.get("protocol_settings")
    if evidence.state != state:
        yield "The run has changed since these figures were taken: measure it again."
    total = sum(len(batch.edits) for batch in history.batches)
    yield f"{figures.get('edits')} edits of {figures.get('edits_file')} were measured; the run wrote {total}."
    yield f"Taken {evidence.measured}, with base {_named(figures)}."
    for name, one in settings.items() if isinstance(settings, Mapping) else ():
        if isinstance(one, Mapping):
            yield f"{name}: " + ", ".join(f"{key} {_text(value)}" for key, value in one.items()) + "."
        else:
            yield f"{name}: {_text(one)}."
    yield from _judged(figures.get("judge"))


def _judged(judge: Any) -> Iterator[str]:
    """Yield who judged, by which rubric, and how much of it."""
    if isinstance(judge, Mapping):
        who = f"{judge.get('model')} at {judge.get('url')}, rubric {judge.get('rubric')}, temperature 0"
        yield f"judge: {who}; {judge.get('judged')} of {judge.get('answers')} answers have a verdict."


def _named(figures: Mapping[str, Any]) -> str:
    base = figures.get("base")
    return str(base.get("model")) if isinstance(base, Mapping) else "none"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _writers(evidence: Evidence) -> list[tuple[str, str]]:
    """Return the models that wrote texts, each with its field of a line; the edited one is the last."""
    first = evidence.answers[0] if evidence.answers else None
    fields = (("base", "base"), ("in context", "in_context"))
    known = [(name, field) for name, field in fields if first is not None and getattr(first, field) is not None]
    return [*known, ("edited", "")]


def _answers(evidence: Evidence) -> Iterator[AnswerRow]:
    fields = [field for _, field in _writers(evidence) if field]
    for line in evidence.answers:
        others: list[BesideLine | None] = [getattr(line, field) for field in fields]
        for place, one in enumerate(line.generated):
            # The same questions are asked of every model in the same order.
            beside = [other.generated[place].text if other and place < len(other.generated) else "" for other in others]
            kind = GROUPS.get(one.group, one.group) + (f": {one.axis}" if one.axis else "")
            yield AnswerRow(line.id, kind, one.prompt, (*beside, one.text), _verdict(one))


def _verdict(one: FreeLine) -> str:
    if one.degenerate:
        return "degenerate"
    return {(True, True): "both", (True, False): "right", (False, True): "rival"}.get(
        (bool(one.right), bool(one.rival)), "neither"
    )
