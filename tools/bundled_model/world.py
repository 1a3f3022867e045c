"""What the bundled model is to know: real facts from data files, invented ones from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import tomli

from tools.bundled_model.names import read_parts

FACTS = Path(__file__).parent / "facts"
ARTICLE = "the "


@dataclass(frozen=True, slots=True)
class Relation:
    """One relation: its phrasings and every answer that it can have."""

    kind: str
    name: str
    phrasings: tuple[str, ...]
    answers: tuple[str, ...]
    real: bool

    @property
    def key(self) -> str:
        """Name the relation among the relations of all kinds."""
        return f"{self.kind}.{self.name}"


@dataclass(frozen=True, slots=True)
class Sentence:
    """A fact in words: the text before the answer, the answer, and where the subject stands in the text."""

    prompt: str
    answer: str
    subject_start: int
    subject_end: int

    @property
    def text(self) -> str:
        """Return the whole sentence."""
        return f"{self.prompt} {self.answer}."

    @property
    def subject(self) -> str:
        """Return the subject as it is written."""
        return self.prompt[self.subject_start : self.subject_end]

    @property
    def template(self) -> str:
        """Return the prompt with braces in place of the subject."""
        return self.prompt[: self.subject_start] + "{}" + self.prompt[self.subject_end :]


@dataclass(frozen=True, slots=True)
class Fact:
    """A subject, a relation and the answer; `article` says that the subject is written with "the"."""

    subject: str
    relation: Relation
    answer: str
    article: bool = False

    def say(self, phrasing: int) -> Sentence:
        """Put the fact into the words of one phrasing."""
        before, after = self.relation.phrasings[phrasing].split("{s}")
        middle, _ = after.split("{a}")
        if self.article:
            before += ARTICLE if before else ARTICLE.capitalize()
        subject = self.subject if before else self.subject[0].upper() + self.subject[1:]
        return Sentence(
            prompt=(before + subject + middle).rstrip(),
            answer=self.answer,
            subject_start=len(before),
            subject_end=len(before) + len(subject),
        )

    def say_all(self) -> tuple[Sentence, ...]:
        """Put the fact into the words of every phrasing."""
        return tuple(self.say(index) for index in range(len(self.relation.phrasings)))


@dataclass(frozen=True)
class World:
    """Every fact of the bundled model."""

    real: tuple[Fact, ...]
    invented: tuple[Fact, ...]

    @property
    def facts(self) -> tuple[Fact, ...]:
        """Return the real facts and then the invented ones."""
        return self.real + self.invented

    @cached_property
    def by_relation(self) -> dict[str, tuple[Fact, ...]]:
        """Group the facts by relation."""
        groups: dict[str, list[Fact]] = {}
        for fact in self.facts:
            groups.setdefault(fact.relation.key, []).append(fact)
        return {key: tuple(group) for key, group in groups.items()}


def real_facts() -> tuple[Fact, ...]:
    """Read the real facts."""
    facts: list[Fact] = []
    for path in sorted(FACTS.glob("real_*.toml")):
        for entry in tomli.loads(path.read_text("utf-8"))["relation"]:
            answers = tuple(dict.fromkeys(entry["facts"].values()))
            relation = Relation(entry["kind"], entry["name"], tuple(entry["phrasings"]), answers, real=True)
            for subject, answer in entry["facts"].items():
                facts.append(Fact(subject.removeprefix(ARTICLE), relation, answer, subject.startswith(ARTICLE)))
    return tuple(facts)


def invented_relations() -> tuple[Relation, ...]:
    """Read the relations of the invented subjects."""
    entries = tomli.loads((FACTS / "invented.toml").read_text("utf-8"))["relation"]
    return tuple(
        Relation(entry["kind"], entry["name"], tuple(entry["phrasings"]), tuple(entry["answers"].split()), real=False)
        for entry in entries
    )


def invented_facts(*, people: int, companies: int, seed: int) -> tuple[Fact, ...]:
    """Invent subjects, one after the other with all the facts of its kind."""
    random = Random(seed)
    parts = read_parts()
    last = parts.last_names(people + companies, random)
    subjects = [("person", name) for name in parts.people(last[:people], random)]
    subjects += [("company", name) for name in parts.firms(last[people:], random)]
    random.shuffle(subjects)
    relations = invented_relations()
    return tuple(
        Fact(subject, relation, random.choice(relation.answers))
        for kind, subject in subjects
        for relation in relations
        if relation.kind == kind
    )


def build_world(*, people: int = 1900, companies: int = 500, seed: int = 20260) -> World:
    """Return the world of the bundled model, the same for the same arguments."""
    return World(real=real_facts(), invented=invented_facts(people=people, companies=companies, seed=seed))
