"""The questions about one edit: each prompt with its right answer and the rival answer, by group."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from editcli.evaluation.scoring import Probe
from editcli.requests.schema import EditRequest, Neighbor


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt of an edit, with its right answer and the rival answer."""

    group: str
    prompt: str
    target: str
    rival: str | None = None
    axis: str | None = None
    between: str | None = None
    """The text between prompt and answer; by default it depends on the writing system of both."""
    aliases: tuple[str, ...] = ()
    """Other texts that are as right as the target; a model that writes freely may write any of them."""

    @property
    def probes(self) -> Iterator[Probe]:
        yield Probe(self.prompt, self.target, self.between)
        if self.rival is not None:
            yield Probe(self.prompt, self.rival, self.between)


def questions(request: EditRequest, metrics: Collection[str]) -> list[Question]:
    """Return the questions of ``metrics`` about one edit; free answers are scored after every prompt that it has."""
    new = request.target_new
    # A target that equals the true answer has no rival.
    true = None if request.target_true == new else request.target_true
    join = request.join
    plan = [Question("efficacy", request.prompt, new, true, between=join)]
    plan += [Question("paraphrases", prompt, new, true, between=join) for prompt in request.paraphrase_prompts]
    if {"counterfact", "generated"} & set(metrics):
        plan += _neutral("neighbors", request.neighborhood_prompts, new, join)
    if {"zsre", "knowedit", "generated"} & set(metrics):
        plan += _neutral("locality", request.locality, None)
    if {"knowedit", "generated"} & set(metrics):
        plan += _neutral("portability", request.portability, None)
    return plan


def _neutral(group: str, prompts: Iterable[Neighbor], rival: str | None, between: str | None = None) -> list[Question]:
    """Return the questions of prompts that come with their right answer; one without an answer cannot be scored.

    A right answer that equals the edit's new target has no rival.
    """
    return [
        Question(
            group,
            near.prompt,
            near.target,
            None if near.target == rival else rival,
            near.axis,
            between,
            near.aliases,
        )
        for near in prompts
        if near.target is not None
    ]
