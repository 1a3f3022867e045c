"""Where a text that a model writes freely ends; never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import regex

from editcli.errors import OptionError, near_miss

Stop = Literal["newline", "sentence"]
STOPS: tuple[Stop, ...] = ("newline", "sentence")
"""The rules that end a text besides the model's end of text."""
NONE = "none"
"""Stands for no rule."""
MOST = 32
"""Most new tokens of a text."""

_SENTENCE = regex.compile(
    r"(?:(?<!\b[A-Z])(?<!\b[A-Z]\w)\.|[!?])[\p{lb=QU}\p{lb=CL}\p{lb=CP}]*(?=\s)|[\p{Sentence_Terminal}&&[\p{ea=W}\p{ea=F}]]",
    regex.V1,
)
"""The end of a sentence; an initial or a title of two letters (St., Mr.) before a full stop ends none."""


@dataclass(frozen=True, slots=True)
class StopRules:
    """When a text ends: at the model's end of text always, and at the rules in ``stop`` from ``least`` tokens on."""

    most: int = MOST
    """Most new tokens."""
    least: int = 0
    """Fewest new tokens; before that many, the end of text is not allowed and no rule applies."""
    stop: tuple[Stop, ...] = STOPS

    def to_json(self) -> dict[str, Any]:
        """Return the rules as the record of an evaluation holds them."""
        return {
            "decoding": "greedy",
            "stop": ["end_of_text", *self.stop],
            "least_new_tokens": self.least,
            "most_new_tokens": self.most,
        }

    def cut(self, text: str, free: int = 0) -> tuple[str, Stop | None]:
        """Return ``text`` up to where a rule ends it, without white space around it, and that rule.

        No rule applies to the first ``free`` characters, nor to white space at the beginning.
        """
        start = max(free, len(text) - len(text.lstrip()))
        ends: list[tuple[int, Stop]] = []
        if "newline" in self.stop and (line := text.find("\n", start)) >= 0:
            ends.append((line, "newline"))
        if "sentence" in self.stop and (match := _SENTENCE.search(text, start)):
            ends.append((match.end(), "sentence"))
        place, rule = min(ends, default=(len(text), None))
        return text[:place].strip(), rule


def parse_stops(names: Sequence[str]) -> tuple[Stop, ...]:
    """Return the rules of these names, both without any; raise :class:`OptionError` for a name that is none."""
    for name in names:
        if name not in (*STOPS, NONE):
            raise OptionError(f"there is no stop rule {name!r}{near_miss(name, (*STOPS, NONE))}")
    if NONE in names and len(set(names)) > 1:
        raise OptionError("--stop none excludes the other rules; leave one of them out")
    return tuple(rule for rule in STOPS if not names or rule in names)
