"""Turn facts and plain sentences into documents of one to four sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from tools.bundled_model.plain import Grammar
from tools.bundled_model.world import Fact, Sentence

# Shares of documents. The prefixes that editing puts before a prompt are plain text cut off in the middle, so plain
# sentences also come before facts, now and then cut off.
STORY = 0.05
PLAIN_BEFORE = 0.15
CUT = 0.3
LENGTHS = (1, 1, 2, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Plain:
    """A sentence without a fact; `cut` says that it was cut off and closed with a full stop."""

    text: str
    cut: bool = False


Document = tuple[Sentence | Plain, ...]


def plain_sentence(grammar: Grammar, random: Random) -> Plain:
    """Return a plain sentence, now and then cut off after a few words."""
    text = grammar.sentence(random)
    if random.random() >= CUT:
        return Plain(text)
    words = text.rstrip(".?").split()
    return Plain(" ".join(words[: random.randint(3, len(words))]) + ".", cut=True)


def documents(facts: Sequence[Fact], grammar: Grammar, random: Random) -> Iterator[Document]:
    """Yield documents that say every fact once, in random order and random phrasings, among plain text."""
    order = list(facts)
    random.shuffle(order)
    while order:
        if random.random() < STORY:
            yield tuple(Plain(text) for text in grammar.story(random))
        pieces: list[Sentence | Plain] = []
        for _ in range(random.choice(LENGTHS)):
            if not order:
                break
            if random.random() < PLAIN_BEFORE:
                pieces.append(plain_sentence(grammar, random))
            fact = order.pop()
            pieces.append(fact.say(random.randrange(len(fact.relation.phrasings))))
        yield tuple(pieces)


def as_text(document: Document) -> str:
    """Write a document as one line of text."""
    return " ".join(piece.text for piece in document)
