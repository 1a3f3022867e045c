"""Find the subject's place in a prompt.

A prompt marks it with ``{}`` or holds the subject itself. The subject is what is seen of it: blanks and invisible
characters around it would move the token at which a fact is written, so they are put outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from editcli.requests.texts import difference, find_alike, trimmed

MARK = "{}"
"""The placeholder of the subject in a prompt."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A prompt around its subject, and what was put right on the way."""

    before: str
    subject: str
    after: str
    notes: tuple[str, ...] = ()


def place_subject(prompt: str, subject: str) -> Placed:
    """Split ``prompt`` at its subject; raise ValueError with the reason when there is not exactly one place."""
    places = prompt.count(MARK)
    if places > 1:
        raise ValueError(f"the prompt has more than one {MARK}; mark the subject's place once")
    if places == 1:
        before, _, after = prompt.partition(MARK)
        return _filled(before, subject, after)
    count = prompt.count(subject)
    if count > 1:
        raise ValueError(_several(subject, count))
    if count == 1:
        before, _, after = prompt.partition(subject)
        return _trimmed(before, subject, after)
    return _alike(prompt, subject)


def _filled(before: str, subject: str, after: str) -> Placed:
    """Fill the subject in; a blank around it stays in the prompt where two words would run together without it."""
    placed = _trimmed("", subject, "")
    left = " " if any(map(str.isspace, placed.before)) and before[-1:].isalnum() else ""
    right = " " if any(map(str.isspace, placed.after)) and after[:1].isalnum() else ""
    return Placed(before + left, placed.subject, right + after, placed.notes)


def _trimmed(before: str, subject: str, after: str) -> Placed:
    """Put the blanks and invisible characters around a subject outside of it."""
    start, stop = trimmed(subject)
    if start == stop:
        raise ValueError("the field 'subject' holds nothing that can be seen; write the name of what the fact is about")
    notes = tuple(_margins(subject[:start], subject[stop:]))
    return Placed(before + subject[:start], subject[start:stop], subject[stop:] + after, notes)


def _margins(left: str, right: str) -> Iterator[str]:
    for where, margin in (("before", left), ("after", right)):
        if margin:
            kind = "a blank" if margin.isspace() else "an invisible character"
            codes = " ".join(f"U+{ord(character):04X}" for character in margin)
            yield f"{kind} {where} the subject was left out of it ({codes})"


def _alike(prompt: str, subject: str) -> Placed:
    """Find a subject that the prompt writes otherwise; the prompt's spelling is what the model reads."""
    start, stop = trimmed(subject)
    places = find_alike(prompt, subject[start:stop])
    if len(places) > 1:
        raise ValueError(_several(subject, len(places)))
    if not places:
        raise ValueError(f"the subject {subject!r} is not in the prompt{_near(prompt, subject)}")
    (first, last) = places[0]
    spelling = prompt[first:last]
    placed = _trimmed(prompt[:first], spelling, prompt[last:])
    note = f"the prompt writes the subject otherwise ({difference(placed.subject, subject)}); its spelling is taken"
    # A subject that differs by its margins alone is not written otherwise.
    return Placed(
        placed.before, placed.subject, placed.after, (note,) if placed.subject != subject[start:stop] else placed.notes
    )


def _several(subject: str, count: int) -> str:
    return f"the subject {subject!r} is in the prompt {count} times; mark its place with {MARK}"


def _near(prompt: str, subject: str) -> str:
    """Say where the prompt comes near to the subject, else what to do."""
    lowered = prompt.lower()
    # Lower-casing may change a text's length, and then offsets mean nothing.
    place = lowered.find(subject.strip().lower()) if len(lowered) == len(prompt) else -1
    if place >= 0:
        return f", which has {prompt[place : place + len(subject.strip())]!r}; write both alike"
    return f"; write {MARK} where it belongs"
