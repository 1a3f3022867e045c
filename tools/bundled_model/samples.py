"""Choose the sample edits of real facts, the pilot edits and the texts that are shipped with the model."""

from __future__ import annotations

from random import Random

import tomli

from tools.bundled_model.plain import Grammar
from tools.bundled_model.stream import Record, pick_neighbors, request
from tools.bundled_model.text import as_text, documents
from tools.bundled_model.world import FACTS, Fact, World


def edited_facts(world: World) -> list[tuple[Fact, str, int]]:
    """Return the real facts of the sample edits, each with its new answer and the phrasing of its prompt."""
    rows = tomli.loads((FACTS / "edits.toml").read_text("utf-8"))["edits"]
    found = {(fact.relation.key, fact.subject): fact for fact in world.real}
    return [(found[relation, subject], new, phrasing) for relation, subject, new, phrasing in rows]


def sample_edits(world: World, *, seed: int = 1, neighbors: int = 4) -> list[Record]:
    """Return the sample edits of real facts, with neighbours that have the same answer wherever there are some."""
    random = Random(f"facts:{seed}")
    edited = edited_facts(world)
    subjects = {fact.subject for fact, _, _ in edited}
    records = []
    for number, (fact, new, phrasing) in enumerate(edited, start=1):
        pool = [other for other in world.by_relation[fact.relation.key] if other.subject not in subjects]
        others = pick_neighbors(fact, pool, neighbors, random)
        record = request(f"f{number:02d}", fact, new, others=others, phrasing=phrasing, random=random)
        records.append(record | {"generation_prompts": [fact.say(phrasing).template.split("{}")[0] + fact.subject]})
    return records


def pilot_edits(world: World, *, count: int = 120, seed: int = 2) -> list[Record]:
    """Return edits of real facts for calibration; no subject of the sample edits is among them."""
    random = Random(f"pilots:{seed}")
    subjects = {fact.subject for fact, _, _ in edited_facts(world)}
    chosen = random.sample([fact for fact in world.real if fact.subject not in subjects], count)
    records = []
    for fact in chosen:
        sentence = random.choice(fact.say_all())
        new = random.choice([answer for answer in fact.relation.answers if answer != fact.answer])
        records.append(
            {"prompt": sentence.template, "subject": sentence.subject, "target_new": new, "target_true": fact.answer}
        )
    return records


def reference_text(world: World, grammar: Grammar, *, lines: int = 3000, seed: int = 3) -> list[str]:
    """Return documents as in training, for second moments of keys."""
    stream = documents(world.facts, grammar, Random(f"reference:{seed}"))
    return [as_text(document) for document, _ in zip(stream, range(lines), strict=False)]


def heldout_text(world: World, grammar: Grammar, *, lines: int = 400, seed: int = 4) -> list[str]:
    """Return stories, some with a real fact at the end; none has a subject of the sample edits in it."""
    random = Random(f"heldout:{seed}")
    edited = {fact.subject for fact, _, _ in edited_facts(world)}
    facts = [fact for fact in world.real if fact.subject not in edited]
    text = []
    for _ in range(lines):
        story = " ".join(grammar.story(random))
        text.append(story if random.random() < 0.5 else f"{story} {random.choice(random.choice(facts).say_all()).text}")
    return text
