"""Scores of free texts equal hand-computed cases."""

from __future__ import annotations

import pytest

from editcli.errors import OptionError
from editcli.evaluation.answers import contains, is_degenerate, is_exact, normalise
from editcli.evaluation.generated import free_answer, summarize_generated
from editcli.evaluation.questions import Question
from editcli.evaluation.writing import Written
from editcli.settings.stopping import StopRules, parse_stops


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("An apple, a day", "apple day"),
        ("U.S.A.", "usa"),
        ("Zürich\n", "zürich"),
        ("「東京」。", "東京"),
        ("a", ""),
    ],
)
def test_texts_are_normalised_as_squad_does(text: str, normal: str):
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("text", "answer", "exact", "within"),
    [
        ("Rome.", "Rome", True, True),
        ("the Rome", "rome", True, True),
        ("Rome, the capital of Italy", "Rome", False, True),
        # Whole words: Romeo is no Rome.
        ("Romeo", "Rome", False, False),
        ("New York City", "New York", False, True),
        ("York New", "New York", False, False),
        ("", "Rome", False, False),
        # A script without spaces has no words to end at.
        ("東京都です", "東京", False, True),
        # Nothing of the answer is left once it is normalised, so both are compared as they stand.
        ("!", "!", True, True),
        ("The", "The", True, True),
        ("Rome", "!", False, False),
    ],
)
def test_a_text_is_or_contains_an_answer(text: str, answer: str, exact: bool, within: bool):
    assert is_exact(text, [answer]) is exact
    assert contains(text, [answer]) is within


def test_any_alias_counts():
    assert contains("He was born in the UK", ["United Kingdom", "UK"])
    assert is_exact("UK.", ["United Kingdom", "UK"])


@pytest.mark.parametrize(
    ("text", "degenerate"),
    [
        ("Rome Rome Rome", True),
        ("Rome Rome", False),
        ("of the city of the city of the city", True),
        # Three times, but less than half of the words.
        ("He said no no no and then he went home to his family in the city", False),
        ("Rome is the capital of Italy", False),
        ("", True),
        ("...", True),
        ("東東東東", True),
    ],
)
def test_a_text_that_repeats_itself_or_has_no_word_is_degenerate(text: str, degenerate: bool):
    assert is_degenerate(text) is degenerate


@pytest.mark.parametrize(
    ("text", "cut", "rule"),
    [
        (" Rome. It is", "Rome.", "sentence"),
        # The mark is the end of a sentence only once white space follows.
        ("3.5 million", "3.5 million", None),
        ("J. R. R. Tolkien. He", "J. R. R. Tolkien.", "sentence"),
        ("St. Louis! Yes", "St. Louis!", "sentence"),
        ("\n\nRome\nParis", "Rome", "newline"),
        ('He said "Rome." Then', 'He said "Rome."', "sentence"),
        ("東京。日本", "東京。", "sentence"),
        ("Rome", "Rome", None),
    ],
)
def test_a_text_ends_at_its_first_line_or_sentence(text: str, cut: str, rule: str | None):
    assert StopRules().cut(text) == (cut, rule)


def test_stop_rules_are_chosen_by_name():
    assert StopRules(stop=()).cut("Rome. It\nis") == ("Rome. It\nis", None)
    assert StopRules(stop=("newline",)).cut("Rome. It\nis") == ("Rome. It", "newline")
    assert StopRules().cut("a\nb\nc", free=3) == ("a\nb", "newline")
    assert parse_stops([]) == ("newline", "sentence")
    assert parse_stops(["none"]) == ()
    for wrong in (["none", "newline"], ["newlin"]):
        with pytest.raises(OptionError):
            parse_stops(wrong)


def written(text: str) -> Written:
    return Written(text, 3, "end")


def test_figures_equal_a_hand_computed_case():
    edit = Question("efficacy", "p", "Rome", "Paris")
    phrasing = Question("paraphrases", "q", "Rome", "Paris")
    near = Question("neighbors", "n", "Paris", "Rome")
    alone = Question("efficacy", "r", "Oslo", None)
    first = [
        free_answer(edit, written("Rome.")),
        free_answer(phrasing, written("Paris, not Rome")),
        free_answer(phrasing, written("Paris")),
        free_answer(near, written("Rome Rome Rome")),
    ]
    second = [free_answer(alone, written("Oslo in Norway"))]
    assert summarize_generated([first, second]) == {
        "efficacy_exact": 0.5,
        "efficacy_contains_new": 1.0,
        # The second edit has no old answer and is left out.
        "efficacy_contains_old": 0.0,
        "efficacy_degenerate": 0.0,
        "generalization_exact": 0.0,
        "generalization_contains_new": 0.5,
        "generalization_contains_old": 1.0,
        "generalization_degenerate": 0.0,
        "specificity_exact": 0.0,
        "specificity_contains_own": 0.0,
        "specificity_contains_new": 1.0,
        "specificity_degenerate": 1.0,
    }
    assert set(summarize_generated([]).values()) == {None}
