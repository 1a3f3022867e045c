"""What a run says of targets that their optimisation did not reach."""

from __future__ import annotations

import pytest

from editcli.runs.outcome import missed_targets
from editcli.settings.core import TargetOptions
from editcli.settings.guards import parse_guards, with_default

ABSOLUTE, RELATIVE = TargetOptions(lr_kind="absolute"), TargetOptions(lr_kind="relative", lr=0.2)


def counts(optimised: int, reached: int, clamped: int = 0) -> dict[str, int]:
    return {"optimised": optimised, "reached": reached, "clamped": clamped}


@pytest.mark.parametrize("known", [None, {}, counts(10, 10), counts(10, 9), counts(100, 90, 100)])
def test_up_to_a_tenth_may_miss(known: dict[str, int] | None) -> None:
    assert missed_targets(known, ABSOLUTE) is None


@pytest.mark.parametrize(
    ("known", "targets", "setting"),
    [
        (counts(10, 8), ABSOLUTE, "targets.lr_kind=relative"),
        (counts(10, 8), RELATIVE, "raise targets.steps=25"),
        # A longer step changes nothing for those that lie at the clamp; more of them do, along the ball.
        (counts(10, 8, 6), ABSOLUTE, "6 ended at the clamp; raise targets.steps=25 or targets.clamp=0.75"),
    ],
)
def test_more_than_a_tenth_names_what_to_change(known: dict[str, int], targets: TargetOptions, setting: str) -> None:
    said = missed_targets(known, targets)
    assert said is not None
    assert said.startswith("2 of 10 targets did not reach targets.stop_loss=0.05")
    assert setting in said


def test_the_goal_is_named_as_it_was_set() -> None:
    said = missed_targets(counts(10, 8), TargetOptions(stop="greedy"))
    assert said is not None
    assert said.startswith("2 of 10 targets did not reach targets.stop_loss=0.05 or targets.stop=greedy, so")


def test_an_editors_limit_on_jumps_holds_unless_another_is_given() -> None:
    assert with_default((), 0.5) == parse_guards(["jump>0.5"])
    assert with_default(parse_guards(["ratio>2"]), 0.5) == parse_guards(["ratio>2", "jump>0.5"])
    assert with_default(parse_guards(["jump>2"]), 0.5) == parse_guards(["jump>2"])
    assert with_default(parse_guards(["ratio>2"]), None) == parse_guards(["ratio>2"])
