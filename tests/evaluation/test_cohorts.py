"""Retained by age: parts of a run equal a hand-computed case."""

from __future__ import annotations

from editcli.evaluation.cohorts import cohorts
from editcli.evaluation.generated import FreeAnswer
from editcli.evaluation.metrics import Answer, Outcome


def outcome(name: str, *, exact: bool, success: bool, right: bool | None = None) -> Outcome:
    answer = Answer("p", "t", -1.0 if success else -3.0, exact, 0.0, "r", -2.0)
    free = () if right is None else (FreeAnswer("efficacy", "p", "t", right, right, None, False, 1, "end"),)
    return Outcome(name, efficacy=(answer,), generated=free)


def test_parts_are_equal_and_the_first_is_the_oldest():
    outcomes = [outcome(f"e{n}", exact=n >= 10, success=n >= 5, right=n >= 15) for n in range(20)]
    found = cohorts(outcomes, {f"e{n}": n for n in range(20)}, 20)
    assert [(one.first, one.last, one.edits) for one in found] == [(2 * n + 1, 2 * n + 2, 2) for n in range(10)]
    assert [one.efficacy_accuracy for one in found] == [0.0] * 5 + [1.0] * 5
    assert [one.efficacy_success for one in found] == [0.0, 0.0, 0.5, *[1.0] * 7]
    assert [one.contains_new for one in found] == [0.0] * 7 + [0.5, 1.0, 1.0]


def test_every_edit_lies_in_the_part_that_names_its_place():
    for total in (1, 3, 10, 14, 23, 101):
        names = {f"e{n}": n for n in range(total)}
        found = cohorts([outcome(name, exact=True, success=True) for name in names], names, total)
        assert len(found) == min(10, total)
        assert [one.last - one.first + 1 for one in found] == [one.edits for one in found]
        assert (found[0].first, found[-1].last) == (1, total)


def test_a_sample_and_strangers_are_placed_by_the_whole_run():
    outcomes = [outcome("e0", exact=True, success=True), outcome("other", exact=False, success=False)]
    (found,) = cohorts(outcomes, {"e0": 95, "e1": 0}, 100)
    assert (found.first, found.last, found.edits, found.contains_new) == (91, 100, 1, None)
    assert cohorts(outcomes, {}, 0) == ()
