"""Compare and trim texts that look alike: invisible characters, kinds of blanks and apostrophes, Unicode normalisation.

Everything follows from the properties that Unicode gives to characters (Unicode Standard, chapter 4).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

_EMPTY = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
"""Letters and marks that show nothing; most other invisible characters have the category Cf."""
_TAGS = range(0xE0020, 0xE0080)
"""Parts of the flags of regions, which are invisible alone and mean something together."""
_JOINERS = "\u200c\u200d"
_VIRAMA = 9
"""Canonical combining class of the sign behind which a joiner decides how a consonant is written."""
_APOSTROPHES = "'`\u00b4\u02b9\u02bb\u02bc\u02bd\u2018\u2019\u201b\u2032\ua78c\uff07"
_QUOTES = '"\u00ab\u00bb\u201c\u201d\u201e\u201f\u2033\u301d\u301e\uff02'
_HANGUL_TAIL = range(0x1160, 0x1200)
"""Vowels and final consonants of a Korean syllable that is written letter by letter."""


def is_invisible(character: str) -> bool:
    """Tell whether a character shows nothing and takes no room, as a zero-width space or a byte order mark."""
    if ord(character) in _TAGS:
        return False
    return character in _EMPTY or (unicodedata.category(character) in ("Cf", "Cc") and not character.isspace())


def trimmed(text: str) -> tuple[int, int]:
    """Return where ``text`` starts and stops without the blanks and invisible characters around it."""
    start, stop = 0, len(text)
    while start < stop and _is_margin(text[start]):
        start += 1
    while stop > start and _is_margin(text[stop - 1]) and not _is_part(text, stop - 1):
        stop -= 1
    return start, stop


def squeezed(text: str) -> str:
    """Return a text for comparison: composed, without invisible characters, one kind of blank, quote and dash."""
    return " ".join("".join(_looks(character) for character in unicodedata.normalize("NFC", text)).split())


def find_alike(text: str, part: str) -> list[tuple[int, int]]:
    """Return where ``text`` has something that looks like ``part``: start and stop of each place, without overlaps."""
    units, pattern = list(_units(text)), "".join(unit.fold for unit in _units(part))
    folded = "".join(unit.fold for unit in units)
    starts: dict[int, int] = {}
    stops: dict[int, int] = {}
    offset = 0
    for unit in units:
        if unit.fold:
            starts[offset], stops[offset + len(unit.fold)] = unit.start, unit.stop
        offset += len(unit.fold)
    places, at = [], folded.find(pattern) if pattern else -1
    while at >= 0:
        # A match that ends inside a character has found another one: e is not e with an accent.
        whole = at in starts and at + len(pattern) in stops
        if whole:
            places.append((starts[at], stops[at + len(pattern)]))
        at = folded.find(pattern, at + (len(pattern) if whole else 1))
    return places


def difference(text: str, other: str) -> str:
    """Return the first characters in which two texts differ, by code and name: U+2019 ..., not U+0027 ..."""
    for one, two in zip(text, other, strict=False):
        if one != two:
            return f"{_named(one)}, not {_named(two)}"
    longer = text if len(text) > len(other) else other
    more = _named(longer[min(len(text), len(other))])
    return f"{more} more" if longer is text else f"no {more}"


@dataclass(frozen=True, slots=True)
class _Unit:
    """One character with its marks, and what it looks like."""

    fold: str
    start: int
    stop: int


def _units(text: str) -> Iterator[_Unit]:
    start = 0
    for stop in range(1, len(text) + 1):
        if stop == len(text) or not _continues(text, stop):
            yield _Unit(_folded(text[start:stop]), start, stop)
            start = stop


def _continues(text: str, place: int) -> bool:
    """Tell whether a character belongs to the one before it; a run of blanks counts as one blank."""
    character = text[place]
    marks = unicodedata.category(character).startswith("M") or ord(character) in _HANGUL_TAIL
    return marks or (character.isspace() and text[place - 1].isspace())


def _folded(unit: str) -> str:
    if unit.isspace():
        return " "
    return "".join(_looks(character) for character in unicodedata.normalize("NFKD", unit))


def _looks(character: str) -> str:
    if character.isspace():
        return " "
    if is_invisible(character):
        return ""
    if character in _APOSTROPHES:
        return "'"
    if character in _QUOTES:
        return '"'
    return "-" if unicodedata.category(character) == "Pd" or character == "\u2212" else character


def _is_margin(character: str) -> bool:
    return character.isspace() or is_invisible(character)


def _is_part(text: str, place: int) -> bool:
    """Tell whether an invisible character belongs to the letter before it."""
    return text[place] in _JOINERS and place > 0 and unicodedata.combining(text[place - 1]) == _VIRAMA


def _named(character: str) -> str:
    return f"U+{ord(character):04X} {unicodedata.name(character, 'without a name')}"
