"""Locality prompts without an answer: the base model's answer is the one that must stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from editcli.distributed.team import Team
from editcli.evaluation.generation import generate
from editcli.evaluation.scoring import Probe, score
from editcli.reporting import Reporter, Silent
from editcli.requests.schema import EditRequest, Neighbor

if TYPE_CHECKING:
    from editcli.models.loading import LoadedModel

TOKENS = 5
"""Tokens of the base model's greedy answer."""


def answer_locality(
    base: LoadedModel,
    requests: Sequence[EditRequest],
    *,
    reporter: Reporter | None = None,
    team: Team | None = None,
) -> tuple[EditRequest, ...]:
    """Return ``requests`` with the base model's greedy answers as the targets of locality prompts that have none.

    An answer that the tokenizer does not read back as the same tokens cannot be compared; its prompt stays without one
    and is counted in a warning. The work is shared out over ``team``.
    """
    reporter = reporter or Silent()
    prompts = _unanswered(requests)
    if not prompts:
        return tuple(requests)
    written = generate(base, prompts, tokens=TOKENS, top_k=1, to_end=True, reporter=reporter, team=team)
    probes = [Probe(prompt, text) for prompt, generation in written.items() if (text := generation.text.strip())]
    scores = score(base, probes, reporter=reporter, team=team)
    answers = {probe.prompt: probe.target for probe, result in zip(probes, scores, strict=True) if result.exact}
    if len(answers) < len(prompts):
        reporter.warn(f"{len(prompts) - len(answers)} locality prompts left out: the base model's answer is no text")
    return tuple(replace(request, locality=_answered(request.locality, answers)) for request in requests)


def _unanswered(requests: Iterable[EditRequest]) -> list[str]:
    return list(dict.fromkeys(n.prompt for request in requests for n in request.locality if n.target is None))


def _answered(locality: Iterable[Neighbor], answers: dict[str, str]) -> tuple[Neighbor, ...]:
    return tuple(near if near.target else replace(near, target=answers.get(near.prompt)) for near in locality)
