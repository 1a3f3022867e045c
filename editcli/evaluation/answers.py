"""Score a text that a model wrote freely: is it the answer, does it contain it, and is it a text at all.

Answers are compared as SQuAD compares them (arXiv:1606.05250): without case, punctuation, articles and extra white
space. Punctuation is that of Unicode, so that other scripts are treated alike.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import regex

_ARTICLES = frozenset({"a", "an", "the"})
_WORDS = regex.compile(r"[\p{lb=ID}\p{lb=CJ}\p{lb=SA}]|\w+")
"""Words; a character of a script without spaces is one."""
_UNSPACED = regex.compile(r"[\p{lb=ID}\p{lb=CJ}\p{lb=SA}]")
REPEATS = 3
"""A phrase that comes so many times in a row, at the least, is a repetition."""
PHRASE = 4
"""Most words of a phrase whose repetition is looked for."""


def normalise(text: str) -> str:
    """Return ``text`` in lower case, without punctuation, English articles and extra white space (SQuAD)."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(" " if unicodedata.category(mark)[0] in "ZC" else mark for mark in folded if not _is_mark(mark))
    return " ".join(word for word in bare.split() if word not in _ARTICLES)


def is_exact(text: str, answers: Iterable[str]) -> bool:
    """Tell whether ``text`` is one of ``answers`` once both are normalised."""
    return any(_comparable(text, answer) == _comparable(answer, answer) for answer in answers)


def contains(text: str, answers: Iterable[str]) -> bool:
    """Tell whether ``text`` contains one of ``answers`` as whole words, both normalised."""
    return any(_holds(_comparable(text, answer), _comparable(answer, answer)) for answer in answers)


def is_degenerate(text: str) -> bool:
    """Tell whether ``text`` has no word, or repeats a phrase of up to four words instead of going on.

    It does where a phrase comes three times in a row or more and these repetitions are half of its words at least.
    """
    words = _WORDS.findall(text.casefold())
    return not words or any(2 * _repeated(words, size) >= len(words) for size in range(1, PHRASE + 1))


def _repeated(words: list[str], size: int) -> int:
    """Return how many words the longest run of one phrase of ``size`` words takes; 0 below three repetitions."""
    longest = run = 0
    for index in range(size, len(words)):
        run = run + 1 if words[index] == words[index - size] else 0
        longest = max(longest, run)
    return longest + size if longest >= (REPEATS - 1) * size else 0


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "P" or character in "$+<=>^`|~"


def _comparable(text: str, answer: str) -> str:
    """Return ``text`` as it is compared with ``answer``: normalised, unless nothing of the answer is left by that."""
    return normalise(text) if normalise(answer) else " ".join(text.split())


def _holds(text: str, answer: str) -> bool:
    if not answer:
        return False
    # Words of a script without spaces have no borders to look for.
    if _UNSPACED.match(answer[0]) or _UNSPACED.match(answer[-1]):
        return answer in text
    return f" {answer} " in f" {text} "
