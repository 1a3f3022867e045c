"""Invent names for people and companies, each with a last name of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import tomli

NAMES = Path(__file__).parent / "facts" / "names.toml"


@dataclass(frozen=True, slots=True)
class Parts:
    """What names are put together from."""

    first: tuple[str, ...]
    starts: tuple[str, ...]
    endings: tuple[str, ...]
    companies: tuple[str, ...]

    def last_names(self, count: int, random: Random) -> tuple[str, ...]:
        """Return `count` distinct last names in which every ending is used about equally often."""
        per_ending = -(-count // len(self.endings))
        names = [start + ending for ending in self.endings for start in random.sample(self.starts, per_ending)]
        random.shuffle(names)
        return tuple(dict.fromkeys(names))[:count]

    def people(self, last: tuple[str, ...], random: Random) -> tuple[str, ...]:
        """Return one person for each last name."""
        return tuple(f"{random.choice(self.first)} {name}" for name in last)

    def firms(self, last: tuple[str, ...], random: Random) -> tuple[str, ...]:
        """Return one company for each last name; its kind stands before the name."""
        return tuple(f"{random.choice(self.companies)} {name}" for name in last)


def read_parts() -> Parts:
    """Read the parts from their data file."""
    data = tomli.loads(NAMES.read_text("utf-8"))
    return Parts(**{name: tuple(words.split()) for name, words in data.items()})
