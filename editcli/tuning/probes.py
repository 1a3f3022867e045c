"""Facts to tune on where the user has no edits: those of a bundled list that the model itself answers.

A relation has a prompt, paraphrases and facts. A fact is known when the model says its true object greedily. A third
of the known facts of each relation are neighbours and stay unedited. Every other known fact becomes an edit; its new
answer is the object of another known fact of the relation.
"""

from __future__ import annotations

import importlib.resources
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editcli.errors import ModelError
from editcli.evaluation.scoring import Probe, score
from editcli.reporting import Reporter
from editcli.requests.schema import EditRequest, from_record
from editcli.tuning.space import SOURCE

if TYPE_CHECKING:
    from editcli.models.loading import LoadedModel

FILE = "probes.jsonl"
NEIGHBOUR_SHARE = 1 / 3
NEIGHBOURS = 2
"""Neighbours that each edit is measured on."""
FEWEST = 6
"""Edits with which a search makes sense."""


@dataclass(frozen=True, slots=True)
class Relation:
    """Facts that are asked for in the same words; ``{}`` is the subject's place."""

    name: str
    prompt: str
    paraphrases: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    """Subjects with their true objects."""


def relations() -> tuple[Relation, ...]:
    """Read the bundled list."""
    text = importlib.resources.files("editcli.tuning").joinpath(FILE).read_text("utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    return tuple(
        Relation(
            record["relation"],
            record["prompt"],
            tuple(record["paraphrases"]),
            tuple((subject, true) for subject, true in record["facts"]),
        )
        for record in records
    )


def probe_edits(loaded: LoadedModel, *, seed: int, reporter: Reporter) -> tuple[EditRequest, ...]:
    """Return counterfactual edits of facts that ``loaded`` answers; raises :class:`ModelError` when it answers few."""
    known = relations()
    probes = [Probe(relation.prompt.format(subject), true) for relation in known for subject, true in relation.facts]
    scores = score(loaded, probes, reporter=reporter)
    answered = {probe for probe, result in zip(probes, scores, strict=True) if result.exact}
    edits = counterfactuals([_answered(relation, answered) for relation in known], seed=seed)
    if len(edits) < FEWEST:
        raise ModelError(
            f"{loaded.source.name} answers only {len(answered)} of the {len(probes)} bundled probes, too few to tune "
            "on; pass an edits file: editcli tune MODEL EDITS.jsonl"
        )
    reporter.note(f"{len(answered)} of {len(probes)} bundled probes are answered by the model: {len(edits)} edits")
    return edits


def counterfactuals(answered: Sequence[Relation], *, seed: int) -> tuple[EditRequest, ...]:
    """Return an edit for two thirds of each relation's facts, with the other third as neighbours."""
    draw = random.Random(seed)
    return tuple(edit for relation in answered for edit in _edits(relation, draw))


def _answered(relation: Relation, answered: set[Probe]) -> Relation:
    facts = tuple(fact for fact in relation.facts if Probe(relation.prompt.format(fact[0]), fact[1]) in answered)
    return Relation(relation.name, relation.prompt, relation.paraphrases, facts)


def _edits(relation: Relation, draw: random.Random) -> Iterator[EditRequest]:
    facts = draw.sample(relation.facts, len(relation.facts))
    left = round(NEIGHBOUR_SHARE * len(facts))
    neighbours, edited = facts[:left], facts[left:]
    for subject, true in edited:
        others = sorted({other for _, other in facts if other != true})
        if not others or not neighbours:
            # A relation of which the model knows one answer has nothing to write in its place.
            continue
        near = draw.sample(neighbours, min(NEIGHBOURS, len(neighbours)))
        yield from_record(
            {
                "id": f"{relation.name}: {subject}",
                "prompt": relation.prompt,
                "subject": subject,
                "target_new": draw.choice(others),
                "target_true": true,
                "paraphrase_prompts": [text.format(subject) for text in relation.paraphrases],
                "neighborhood_prompts": [
                    {"prompt": relation.prompt.format(other), "target": answer} for other, answer in near
                ],
            },
            file=SOURCE,
        )
