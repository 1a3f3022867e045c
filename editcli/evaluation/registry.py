"""The registry of metrics: every figure with its protocol, its scorer, its direction and its source.

A figure means little without the way it was taken: the same answers score 0.97 with the target fed in and 0.39 when the
model writes freely (arXiv:2502.11177). So a metric has one entry here, tables and JSON name its protocol and scorer,
and no mean is taken across protocols.

A metric is named by its path in the JSON of ``eval``, joined by dots; ``*`` stands for any name at its level, such as
the kind of a portability prompt or a task's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Protocol = Literal["teacher_forced", "generated", "choice", "distribution"]
"""The way in which an answer is obtained."""

PROTOCOLS: Mapping[Protocol, str] = {
    "teacher_forced": "a given answer is fed in, and its probability or its greedy match is read",
    "generated": "the model writes freely until a stop rule ends the text, and the text is scored",
    "choice": "the model picks one of several answers that the prompt lists, by log-probability",
    "distribution": "the whole distribution of the next token is compared with the base model's",
}
"""What each protocol does, in the order in which tables show them."""

ANY = "*"
"""Stands for any name at its level of a metric's path."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: ``name`` is its path in the JSON of ``eval``."""

    name: str
    protocol: Protocol
    scorer: str
    """How an answer becomes a number, such as ``exact_match`` or ``more_probable``."""
    meaning: str
    """What the figure is, as a phrase that follows "is"."""
    better: Literal["higher", "lower", "neither"] = "higher"
    unit: str = "share"
    source: str = ""
    """The paper or program that defines it."""

    def matches(self, name: str) -> bool:
        """Tell whether ``name`` is this metric's path, or one of those that its ``*`` stand for."""
        ours, theirs = self.name.split("."), name.split(".")
        return len(ours) == len(theirs) and all(a in (ANY, b) for a, b in zip(ours, theirs, strict=True))

    def to_json(self) -> dict[str, str]:
        """Return what a record says about the metric."""
        return {"protocol": self.protocol, "scorer": self.scorer}


_MEMIT, _MEND, _KNOWEDIT = "arXiv:2210.07229", "arXiv:2110.11309", "arXiv:2401.01286"

TEACHER_FORCED = (
    Metric("efficacy_accuracy", "teacher_forced", "exact_tokens", "share of edits whose greedy answer is the target"),
    Metric(
        "efficacy_success",
        "teacher_forced",
        "more_probable",
        "share of edits whose new answer is more probable than the old one",
        source=_MEMIT,
    ),
    Metric("generalization_accuracy", "teacher_forced", "exact_tokens", "the same on other phrasings"),
    Metric("generalization_success", "teacher_forced", "more_probable", "the same on other phrasings", source=_MEMIT),
    Metric(
        "specificity_accuracy", "teacher_forced", "exact_tokens", "share of neighbours whose greedy answer is their own"
    ),
    Metric(
        "specificity_success",
        "teacher_forced",
        "more_probable",
        "share of neighbours whose own answer is more probable than the edit's",
        source=_MEMIT,
    ),
    Metric("score", "teacher_forced", "more_probable", "harmonic mean of the three successes", source=_MEMIT),
    Metric("zsre.*", "teacher_forced", "right_tokens", "share of right tokens with the answer fed in", source=_MEND),
    Metric(
        "knowedit.*", "teacher_forced", "right_tokens", "share of right tokens with the answer fed in", source=_KNOWEDIT
    ),
)
"""Metrics of given answers."""

_SQUAD, _MIRAGE, _CHOICE = "arXiv:1606.05250", "arXiv:2502.11177", "arXiv:2604.05995"


def _generated(name: str, of: str, own: str, other: str) -> tuple[Metric, ...]:
    """Return the four figures of a group of prompts; ``own`` and ``other`` name the right answer and its rival."""
    whose = {"new": "the new answer", "old": "the old answer", "own": "the neighbour's own answer"}
    right = whose[own]
    return (
        Metric(f"generated.{name}_exact", "generated", "exact_match", f"share of {of} that are {right}", source=_SQUAD),
        Metric(
            f"generated.{name}_contains_{own}",
            "generated",
            "contains",
            f"share of {of} with {whose[own]}",
            source=_MIRAGE,
        ),
        Metric(
            f"generated.{name}_contains_{other}",
            "generated",
            "contains",
            f"share of {of} with {whose[other]}",
            "lower",
            source=_MIRAGE,
        ),
        Metric(
            f"generated.{name}_degenerate", "generated", "repetition", f"share of {of} that repeat themselves", "lower"
        ),
    )


GENERATED = (
    *_generated("efficacy", "texts after the edited prompt", "new", "old"),
    *_generated("generalization", "texts after other phrasings", "new", "old"),
    *_generated("specificity", "texts after neighbours", "own", "new"),
)
"""Metrics of texts that the model writes freely."""

JUDGED = tuple(
    Metric(f"judge.{name}_correct", "generated", "judge", f"share of {of} that a judge calls correct", source=_MIRAGE)
    for name, of in (
        ("efficacy", "texts after the edited prompt"),
        ("generalization", "texts after other phrasings"),
        ("specificity", "texts after neighbours"),
        ("portability", "texts after prompts that follow from the edit"),
        ("locality", "texts after unrelated prompts"),
    )
)
"""Metrics of the same texts, by the verdicts of another model."""

CHOICES = (
    Metric(
        "choice.two_new",
        "choice",
        "listed_letters",
        "share of edits whose new answer wins against the old",
        source=_CHOICE,
    ),
    Metric(
        "choice.two_consistent",
        "choice",
        "listed_letters",
        "share of edits in which one answer wins in both orders",
        "neither",
    ),
    Metric(
        "choice.three_new", "choice", "listed_letters", "share of edits whose new answer wins of three", source=_CHOICE
    ),
    Metric(
        "choice.three_old",
        "choice",
        "listed_letters",
        "share of edits whose old answer wins of three",
        "lower",
        source=_CHOICE,
    ),
    Metric(
        "choice.three_unsure",
        "choice",
        "listed_letters",
        'share of edits in which "unsure" wins of three',
        "neither",
        source=_CHOICE,
    ),
)
"""Metrics of listed answers."""

KINDS = (
    Metric(
        "kinds.*.*.accuracy",
        "teacher_forced",
        "exact_tokens",
        "share of prompts of a kind whose greedy answer is right",
    ),
    Metric(
        "kinds.*.*.right_tokens", "teacher_forced", "right_tokens", "share of right tokens of a kind", source=_KNOWEDIT
    ),
    Metric(
        "kinds.*.*.generated_exact",
        "generated",
        "exact_match",
        "share of texts of a kind that are the answer",
        source=_SQUAD,
    ),
    Metric(
        "kinds.*.*.generated_contains",
        "generated",
        "contains",
        "share of texts of a kind with the answer",
        source="arXiv:2307.12976",
    ),
)
"""Metrics of what follows from an edit and of what must not, by the kind that the record names."""

DISTRIBUTIONS = (
    Metric(
        "distribution.*.median", "distribution", "kl", "median KL(base || edited) of the next token", "lower", "nats"
    ),
    Metric("distribution.*.p90", "distribution", "kl", "90th percentile of the same", "lower", "nats"),
)
"""Metrics of the next token's distribution, on the edits' neighbours and on unrelated texts."""

TEXTS = (
    Metric(
        "fluency", "generated", "ngram_entropy", "entropy of the word pairs and triples", unit="bits", source=_MEMIT
    ),
    Metric("consistency", "generated", "tfidf_cosine", "likeness of the texts to reference texts", source=_MEMIT),
)
"""Metrics of sampled texts."""

ABILITY = (
    Metric("drift.perplexity", "teacher_forced", "perplexity", "perplexity on ordinary text", "lower", ""),
    Metric("drift.perplexity_base", "teacher_forced", "perplexity", "the base's on the same text", "lower", ""),
    Metric("drift.kl", "distribution", "kl", "mean KL(base || edited) per token of ordinary text", "lower", "nats"),
)
"""Metrics of general ability."""

METRICS: tuple[Metric, ...] = (*TEACHER_FORCED, *GENERATED, *JUDGED, *CHOICES, *DISTRIBUTIONS, *KINDS, *TEXTS, *ABILITY)
"""Every metric, in the order in which tables show them; a new one is declared here and nowhere else."""


ANSWERS = tuple(metric.name for metric in TEACHER_FORCED[:6])
"""The figures that every run measures: both forms of efficacy, generalization and specificity."""


def metric_of(name: str) -> Metric:
    """Return the metric at a path; raise :class:`KeyError` where none is registered."""
    for metric in METRICS:
        if metric.matches(name):
            return metric
    raise KeyError(f"{name} is no registered metric; declare it in {__name__}")


def protocols_of(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return protocol and scorer of each metric, as records hold them."""
    return {name: metric_of(name).to_json() for name in names}


def one_protocol(names: Iterable[str]) -> Protocol:
    """Return the protocol that all ``names`` share; raise :class:`ValueError` where they are of several.

    Everything that averages or ranks metrics calls this first.
    """
    kinds: set[Protocol] = {metric_of(name).protocol for name in names}
    if len(kinds) != 1:
        raise ValueError(f"figures of different protocols ({', '.join(sorted(kinds))}) have no common mean or rank")
    return kinds.pop()


def paths(figures: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted paths of the numbers in nested figures that are registered metrics; None counts as one."""
    for key, value in figures.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from paths(value, f"{name}.")
        elif (value is None or isinstance(value, (int, float))) and any(metric.matches(name) for metric in METRICS):
            yield name


def value_at(figures: Mapping[str, Any], name: str) -> float | None:
    """Return the figure at a dotted path; None where there is none."""
    value: Any = figures
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one sentence for each metric of two records of protocols that was not taken in the same way.

    Each record maps names to ``{"protocol", "scorer"}``; metrics that only one of them has are left out.
    """
    other = [(name, ours[name], theirs[name]) for name in ours if name in theirs and ours[name] != theirs[name]]
    return tuple(f"{name} is {_named(mine)} here and {_named(yours)} there" for name, mine, yours in other)


def _named(record: Any) -> str:
    known = record if isinstance(record, Mapping) else {}
    return f"{known.get('protocol', 'unknown')} ({known.get('scorer', 'unknown')})"
