"""Measure what edits did, every number under the name of its protocol.

========================  ==============================================================================================
efficacy_success          share of edits with P(target_new) > P(target_true) on the prompt
efficacy_accuracy         share of edits whose greedy answer is target_new, token for token
generalization_*          the same on ``paraphrase_prompts``, averaged within an edit first
specificity_success       P(true answer) > P(target_new) on ``neighborhood_prompts``
specificity_accuracy      the greedy answer is still the true one there
score                     harmonic mean of the three successes
zsre                      share of right tokens, teacher forced, on prompt, paraphrases and ``locality``
knowedit                  the same on prompt, ``portability`` and ``locality``
fluency, consistency      see :mod:`editcli.evaluation.generation`
generated                 free answers to the same prompts, see :mod:`editcli.evaluation.generated`
choice                    new, old and "unsure" to choose from, see :mod:`editcli.evaluation.choice`
kinds                     ``portability`` and ``locality`` by the kind that the record names
========================  ==============================================================================================

P is the product over the answer's tokens, length-normalised: the mean log-probability per token (as in MEMIT,
arXiv:2210.07229). A metric whose fields are missing everywhere is None, never 0; an edit without them is left out of
that metric's mean. :mod:`editcli.evaluation.scoring` does the scoring.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, harmonic_mean
from typing import TYPE_CHECKING, Any

from editcli.distributed.team import Team
from editcli.errors import OptionError, RequestError, near_miss
from editcli.evaluation.choice import Choice, Choosing, choose, summarize_choice
from editcli.evaluation.generated import FreeAnswer, free_answer, mean_of_means, summarize_generated
from editcli.evaluation.generation import Generation, consistency, fluency, generate
from editcli.evaluation.questions import Question, questions
from editcli.evaluation.scoring import BATCH_TOKENS, Probe, ProbeScore, encode_probes, score
from editcli.evaluation.writing import Written, write_freely
from editcli.models.tokens import Tokens
from editcli.reporting import Reporter, Silent
from editcli.requests.schema import EditRequest
from editcli.settings.stopping import StopRules

if TYPE_CHECKING:
    from editcli.models.loading import LoadedModel

__all__ = ["METRICS", "Answer", "Evaluation", "Outcome", "Probe", "ProbeScore", "evaluate", "score"]

METRICS = ("counterfact", "zsre", "knowedit", "generated", "choice", "distribution", "fluency", "consistency")
"""Groups of metrics by name: given answers, free answers, choices, distributions (which need a base), sampled text."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The probability of the right answer to one prompt, and of its rival."""

    prompt: str
    target: str
    logprob: float
    """Mean natural log-probability per token of ``target``."""
    exact: bool
    accuracy: float
    rival: str | None = None
    rival_logprob: float | None = None
    axis: str | None = None

    @property
    def success(self) -> bool | None:
        """True if the right answer is more probable than its rival; None without a rival."""
        return None if self.rival_logprob is None else self.logprob > self.rival_logprob


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything measured about one edit; an answer's target is what the model should say there."""

    id: str
    efficacy: tuple[Answer, ...]
    paraphrases: tuple[Answer, ...] = ()
    neighbors: tuple[Answer, ...] = ()
    locality: tuple[Answer, ...] = ()
    portability: tuple[Answer, ...] = ()
    generations: tuple[Generation, ...] = ()
    generated: tuple[FreeAnswer, ...] = ()
    choice: Choice | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the raw numbers as a JSON object: one line of ``eval --out``. What is not finite becomes null."""
        record = asdict(self)
        record["choice"] = None if self.choice is None else self.choice.to_json()
        for group in _GROUPS:
            for line, answer in zip(record[group], getattr(self, group), strict=True):
                line["success"] = answer.success
                for name in ("logprob", "rival_logprob"):
                    # A wrecked model answers with NaN, which JSON does not know.
                    line[name] = line[name] if math.isfinite(line[name] or 0) else None
        return record


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics over a set of edits; None where the records have no field for it, or where it was not asked for."""

    efficacy_accuracy: float | None
    efficacy_success: float | None
    generalization_accuracy: float | None
    generalization_success: float | None
    specificity_accuracy: float | None
    specificity_success: float | None
    score: float | None
    generated: Mapping[str, float | None] | None = None
    choice: Mapping[str, float | None] | None = None
    zsre: Mapping[str, float | None] | None = None
    knowedit: Mapping[str, float | None] | None = None
    fluency: float | None = None
    """In bits, not multiplied by 100 as some published tables do."""
    consistency: float | None = None
    kinds: Mapping[str, Mapping[str, Mapping[str, float | None]]] | None = None
    """Of portability and locality the figures of each kind that the records name."""
    counts: Mapping[str, int] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the metrics and counts, without the outcomes of single edits."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "outcomes"}

    def raw(self) -> Iterator[dict[str, Any]]:
        """Yield the raw numbers of each edit as a JSON object."""
        return (outcome.to_json() for outcome in self.outcomes)


def evaluate(
    loaded: LoadedModel,
    requests: Sequence[EditRequest],
    *,
    metrics: Collection[str] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    rules: StopRules | None = None,
    reporter: Reporter | None = None,
    team: Team | None = None,
) -> Evaluation:
    """Measure ``requests`` on a model as it stands; all prompts go through it in one length-sorted pass.

    Scoring and generating are shared out over ``team``, whose ranks all get the same answer.

    ``metrics`` names some of :data:`METRICS`; by default all but fluency and consistency whose fields are there.
    ``rules`` end the free answers. Raises :class:`OptionError` for an unknown metric and :class:`RequestError` for a
    prompt too long.
    """
    reporter = reporter or Silent()
    chosen = _choose(metrics, requests)
    plans = [questions(request, chosen) for request in requests]
    probes = list(dict.fromkeys(probe for plan in plans for question in plan for probe in question.probes))
    try:
        scored = score(loaded, probes, batch_tokens=batch_tokens, reporter=reporter, team=team)
    except RequestError:
        _refuse_unreadable(requests, plans, loaded.tokens)
        raise
    heard = _Heard(scores=dict(zip(probes, scored, strict=True)))
    if chosen & {"fluency", "consistency"}:
        prompts = [prompt for request in requests for prompt in request.generation_prompts]
        heard.sampled = generate(loaded, prompts, seed=seed, batch_tokens=batch_tokens, reporter=reporter, team=team)
    if "generated" in chosen:
        prompts = [question.prompt for plan in plans for question in plan]
        heard.written = write_freely(loaded, prompts, rules, reporter=reporter, team=team)
    if "choice" in chosen:
        asked = [one for request in requests if (one := choosing(request)) is not None]
        heard.choices = choose(loaded, asked, batch_tokens=batch_tokens, reporter=reporter, team=team)
    outcomes = tuple(_outcome(request, plan, heard) for request, plan in zip(requests, plans, strict=True))
    return summarize(outcomes, requests=requests, metrics=chosen)


@dataclass(slots=True)
class _Heard:
    """Everything that the model said, by what it was asked."""

    scores: Mapping[Probe, ProbeScore]
    sampled: Mapping[str, Generation] = field(default_factory=dict)
    written: Mapping[str, Written] = field(default_factory=dict)
    choices: Mapping[Choosing, Choice] = field(default_factory=dict)


def choosing(request: EditRequest) -> Choosing | None:
    """Return what the model chooses from at an edit; None where old and new answer are not two."""
    old, new = request.target_true, request.target_new
    return None if old is None or old.strip() == new.strip() else Choosing(request.prompt, new, old)


def _refuse_unreadable(requests: Sequence[EditRequest], plans: Sequence[Sequence[Question]], tokens: Tokens) -> None:
    """Raise :class:`RequestError` at the line of the first edit whose prompts cannot be scored."""
    for request, plan in zip(requests, plans, strict=True):
        try:
            encode_probes(tokens, [probe for question in plan for probe in question.probes])
        except RequestError as error:
            raise request.refusal(error.reason) from error


def summarize(outcomes: Sequence[Outcome], *, requests: Sequence[EditRequest], metrics: Collection[str]) -> Evaluation:
    """Average the outcomes of single edits: over the prompts of an edit first, then over edits."""
    successes = [_mean(outcomes, group, "success") for group in ("efficacy", "paraphrases", "neighbors")]
    accuracies = [_mean(outcomes, group, "exact") for group in ("efficacy", "paraphrases", "neighbors")]
    tokens = {group: _mean(outcomes, group, "accuracy") for group in _GROUPS}
    zsre = {"efficacy": tokens["efficacy"], "generalization": tokens["paraphrases"], "locality": tokens["locality"]}
    knowedit = {"edit_success": tokens["efficacy"]} | {n: tokens[n] for n in ("portability", "locality")}
    generations = {outcome.id: [g.text for g in outcome.generations] for outcome in outcomes}
    return Evaluation(
        efficacy_accuracy=accuracies[0],
        efficacy_success=successes[0],
        generalization_accuracy=accuracies[1],
        generalization_success=successes[1],
        specificity_accuracy=accuracies[2],
        specificity_success=successes[2],
        score=harmonic(successes),
        generated=summarize_generated([outcome.generated for outcome in outcomes]) if "generated" in metrics else None,
        choice=summarize_choice([o.choice for o in outcomes if o.choice]) if "choice" in metrics else None,
        zsre=zsre if "zsre" in metrics else None,
        knowedit=knowedit if "knowedit" in metrics else None,
        fluency=fluency(generations) if "fluency" in metrics else None,
        consistency=consistency(generations, _references(requests)) if "consistency" in metrics else None,
        kinds=_kinds(outcomes),
        counts={"edits": len(outcomes)}
        | {n: sum(len(getattr(o, n)) for o in outcomes) for n in _GROUPS[1:]}
        | {"choices": sum(o.choice is not None for o in outcomes)},
        outcomes=tuple(outcomes),
    )


def harmonic(values: Iterable[float | None]) -> float | None:
    """Return the harmonic mean, 0 when one value is 0, None when one is missing."""
    known = list(values)
    return None if not known or None in known else harmonic_mean([value for value in known if value is not None])


_GROUPS = ("efficacy", "paraphrases", "neighbors", "locality", "portability")


def _choose(metrics: Collection[str] | None, requests: Sequence[EditRequest]) -> set[str]:
    if metrics is None:
        detailed = any(request.locality or request.portability for request in requests)
        return {"counterfact", "generated", "choice"} | ({"zsre", "knowedit"} if detailed else set())
    for name in metrics:
        if name not in METRICS:
            raise OptionError(f"there is no metric {name!r}{near_miss(name, METRICS)}")
    return set(metrics)


def _outcome(
    request: EditRequest,
    plan: Sequence[Question],
    heard: _Heard,
) -> Outcome:
    groups: dict[str, list[Answer]] = {group: [] for group in _GROUPS}
    for question in plan:
        right, *rival = (heard.scores[probe] for probe in question.probes)
        groups[question.group].append(
            Answer(
                prompt=question.prompt,
                target=question.target,
                logprob=right.logprob,
                exact=right.exact,
                accuracy=right.accuracy,
                rival=question.rival,
                rival_logprob=rival[0].logprob if rival else None,
                axis=question.axis,
            )
        )
    asked = choosing(request)
    return Outcome(
        request.id,
        **{name: tuple(group) for name, group in groups.items()},
        generations=tuple(heard.sampled[prompt] for prompt in request.generation_prompts if prompt in heard.sampled),
        generated=tuple(free_answer(q, heard.written[q.prompt]) for q in plan if q.prompt in heard.written),
        choice=None if asked is None else heard.choices.get(asked),
    )


def _kinds(outcomes: Sequence[Outcome]) -> dict[str, dict[str, dict[str, float | None]]] | None:
    """Return the figures of portability and locality by kind; None where no record names any."""
    kinds: dict[str, dict[str, dict[str, float | None]]] = {}
    for group in ("portability", "locality"):
        names = dict.fromkeys(answer.axis for outcome in outcomes for answer in getattr(outcome, group) if answer.axis)
        for kind in names:
            kinds.setdefault(group, {})[kind] = _kind(outcomes, group, kind)
    return kinds or None


def _kind(outcomes: Sequence[Outcome], group: str, kind: str) -> dict[str, float | None]:
    given = [[answer for answer in getattr(outcome, group) if answer.axis == kind] for outcome in outcomes]
    free = [
        [answer for answer in outcome.generated if (answer.group, answer.axis) == (group, kind)] for outcome in outcomes
    ]
    return {
        "prompts": sum(map(len, given)),
        "accuracy": _mean_of([[answer.exact for answer in edit] for edit in given]),
        "right_tokens": _mean_of([[answer.accuracy for answer in edit] for edit in given]),
        "generated_exact": mean_of_means(free, lambda answer: answer.exact),
        "generated_contains": mean_of_means(free, lambda answer: answer.right),
    }


def _mean_of(edits: Iterable[Sequence[float]]) -> float | None:
    means = [fmean(values) for values in edits if values]
    return fmean(means) if means else None


def _mean(outcomes: Iterable[Outcome], group: str, figure: str) -> float | None:
    means = []
    for outcome in outcomes:
        known = [value for answer in getattr(outcome, group) if (value := getattr(answer, figure)) is not None]
        if known:
            means.append(fmean(known))
    return fmean(means) if means else None


def _references(requests: Iterable[EditRequest]) -> dict[str, list[str]]:
    """Return each edit's ``reference_texts``: texts about things of which the new fact is true."""
    given = {request.id: request.extra.get("reference_texts") for request in requests}
    return {key: [t for t in texts if isinstance(t, str)] for key, texts in given.items() if isinstance(texts, list)}
