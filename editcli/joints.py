"""Where a target goes on from its prompt: whether the writing system puts a space between them.

Decided by the properties of the two characters that meet, not by language: the line breaking classes of Unicode
Standard Annex #14 say which scripts are written without spaces, and which marks stick to the word before or after.
"""

from __future__ import annotations

import unicodedata

import regex

_UNSPACED = regex.compile(
    r"(?V1)[[\p{lb=ID}\p{lb=CJ}\p{lb=NS}\p{lb=SA}\p{lb=AK}\p{lb=AP}\p{lb=AS}\p{lb=VF}\p{lb=VI}]"
    r"--\p{Extended_Pictographic}]"
)
"""Ideographs and kana, and the scripts whose words only a dictionary can tell apart (Thai, Lao, Khmer, ...)."""
_STICKS_TO_THE_LEFT = regex.compile(
    r"[\p{lb=CL}\p{lb=CP}\p{lb=EX}\p{lb=IS}\p{lb=SY}\p{lb=CM}\p{lb=ZWJ}\p{lb=WJ}\p{lb=GL}\p{lb=BA}\p{lb=PO}\p{lb=IN}]"
)
"""Closing and separating marks, and what is written behind a number."""
_STICKS_TO_THE_RIGHT = regex.compile(
    r"(?V1)[[\p{lb=OP}\p{lb=SY}\p{lb=WJ}\p{lb=GL}\p{lb=BA}\p{lb=BB}\p{Sc}\p{Pc}#@]--\p{Sentence_Terminal}]"
)
"""Opening marks, marks within a word, and what is written in front of a number or a name."""
_STRAIGHT = "\"'"
_APOSTROPHES = "'\u2019"


def wants_space(prompt: str, target: str) -> bool:
    """Tell whether a space belongs between ``prompt`` and ``target``: both are words of a script that uses spaces."""
    if not prompt or not target or prompt[-1].isspace() or target[0].isspace():
        return False
    return _ends_a_word(prompt) and _begins_a_word(target, prompt)


def _begins_a_word(target: str, prompt: str) -> bool:
    first, rest = target[0], target[1:]
    if _UNSPACED.match(first):
        return False
    if unicodedata.category(first) == "Pd":
        number = rest[:1].isnumeric() and not prompt[-1].isnumeric()
        return number or rest[:1].isspace()
    if first in _STRAIGHT:
        # A mark that comes again opens a quotation; one alone closes what the prompt opened, or is an apostrophe.
        return first in rest and prompt.count(first) % 2 == 0
    if unicodedata.category(first) in ("Pi", "Pf"):
        return unicodedata.category(first) == "Pi"
    return not _STICKS_TO_THE_LEFT.match(first)


def _ends_a_word(prompt: str) -> bool:
    last, before = prompt[-1], prompt[:-1]
    kind = unicodedata.category(last)
    if _UNSPACED.match(last) or (kind.startswith("P") and unicodedata.east_asian_width(last) in "WF"):
        return False
    if kind in ("Pd", "Sm"):
        # Standing free they separate words; attached they join them, or close a tag.
        return before[-1:].isspace()
    if last in _APOSTROPHES and before[-1:].isalpha():
        # An elided article is written together with its noun; the plural's genitive ends a word.
        return before[-1] == "s" and before[-2:-1].isalpha()
    if last in _STRAIGHT:
        return prompt.count(last) % 2 == 0 and _is_spaced(before)
    if kind == "Pi" or _STICKS_TO_THE_RIGHT.match(last):
        return False
    return _is_spaced(prompt)


def _is_spaced(text: str) -> bool:
    """Tell whether the last letter of a text, if there is one, is of a script that separates words by spaces."""
    letter = next((character for character in reversed(text) if character.isalpha()), None)
    return letter is None or not _UNSPACED.match(letter)
