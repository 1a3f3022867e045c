"""Write a stream of edits over invented facts.

python -m tools.bundled_model.stream --seed 7 --out tuning.jsonl
python -m tools.bundled_model.stream --seed 5 --facts 3 --edits 6000 --out long.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import click

from tools.bundled_model.world import Fact, World, build_world

SAMPLE_SEED = 1
Record = dict[str, Any]


def neighbor(fact: Fact, answer: str, random: Random) -> str | dict[str, str]:
    """Ask for another fact: a bare prompt where its answer is `answer`, else with the answer beside it."""
    prompt = random.choice(fact.say_all()).prompt
    return prompt if fact.answer == answer else {"prompt": prompt, "target": fact.answer}


def request(identity: str, fact: Fact, new: str, *, others: Sequence[Fact], phrasing: int, random: Random) -> Record:
    """Return an edit that gives `fact` the answer `new`, with its other phrasings and its neighbours."""
    sentences = fact.say_all()
    return {
        "id": identity,
        "prompt": sentences[phrasing].template,
        "subject": sentences[phrasing].subject,
        "target_new": new,
        "target_true": fact.answer,
        "paraphrase_prompts": [s.prompt for i, s in enumerate(sentences) if i != phrasing][:3],
        "neighborhood_prompts": [neighbor(other, fact.answer, random) for other in others],
    }


def pick_neighbors(fact: Fact, pool: Sequence[Fact], count: int, random: Random) -> list[Fact]:
    """Pick other subjects' facts of the same relation, those with the same answer first."""
    same = [other for other in pool if other.answer == fact.answer]
    rest = [other for other in pool if other.answer != fact.answer]
    chosen = random.sample(same, min(count, len(same)))
    return chosen + random.sample(rest, min(count - len(chosen), len(rest)))


def build_stream(world: World, *, edits: int, seed: int, neighbors: int = 3, facts: int = 1) -> list[Record]:
    """Edit `facts` facts each of invented subjects, the first of all subjects first; neighbours are never edited."""
    random = Random(f"stream:{seed}")
    edited = -(-edits // facts)
    by_subject: dict[str, list[Fact]] = {}
    for fact in world.invented:
        by_subject.setdefault(fact.subject, []).append(fact)
    subjects = random.sample(list(by_subject), len(by_subject))
    untouched: dict[str, list[Fact]] = {}
    for subject in subjects[edited:]:
        for fact in by_subject[subject]:
            untouched.setdefault(fact.relation.key, []).append(fact)
    records = []
    for number in range(1, edits + 1):
        left = by_subject[subjects[(number - 1) % edited]]
        fact = random.choice(left)
        left.remove(fact)
        new = random.choice([answer for answer in fact.relation.answers if answer != fact.answer])
        others = pick_neighbors(fact, untouched[fact.relation.key], neighbors, random)
        phrasing = random.randrange(len(fact.relation.phrasings))
        records.append(request(f"s{number:04d}", fact, new, others=others, phrasing=phrasing, random=random))
    return records


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


@click.command()
@click.option("--seed", default=SAMPLE_SEED, show_default=True, help="The shipped sample has the default.")
@click.option("--edits", default=2000, show_default=True, help="Number of edits.")
@click.option("--facts", type=click.IntRange(1, 4), default=1, show_default=True, help="Facts to edit of each subject.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSONL file to write.")
def main(*, seed: int, edits: int, facts: int, out: Path) -> None:
    """Write a stream of edits over invented facts; there are 2,400 subjects of four facts each."""
    write_records(out, build_stream(build_world(), edits=edits, seed=seed, facts=facts))


if __name__ == "__main__":
    main()
