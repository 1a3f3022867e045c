"""Plain connected sentences from a small seeded grammar, so that the model can also just write."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import tomli

GRAMMAR = Path(__file__).parent / "facts" / "grammar.toml"


@dataclass(frozen=True)
class Grammar:
    """Word lists by name, and stories whose sentences share the words that were drawn for them."""

    words: dict[str, tuple[str, ...]]
    stories: tuple[tuple[str, ...], ...]

    @cached_property
    def sentences(self) -> tuple[str, ...]:
        """Return every sentence pattern of every story."""
        return tuple(sentence for story in self.stories for sentence in story)

    def draw(self, random: Random) -> dict[str, str]:
        """Draw one word from each list, and a second, different one under the name with a 2."""
        drawn = {}
        for name, choices in self.words.items():
            drawn[name], drawn[name + "2"] = random.sample(choices, 2)
        return drawn

    def story(self, random: Random) -> tuple[str, ...]:
        """Return the sentences of one story in their order, sometimes without its beginning."""
        drawn = self.draw(random)
        story = random.choice(self.stories)
        return tuple(sentence.format(**drawn) for sentence in story[random.choice((0, 0, 0, 1, 2)) :])

    def sentence(self, random: Random) -> str:
        """Return one sentence on its own."""
        return random.choice(self.sentences).format(**self.draw(random))


def read_grammar() -> Grammar:
    """Read the grammar from its data file."""
    data = tomli.loads(GRAMMAR.read_text("utf-8"))
    return Grammar(
        words={name: tuple(words.split()) for name, words in data["words"].items()},
        stories=tuple(tuple(story.strip().split("\n")) for story in data["stories"]),
    )
