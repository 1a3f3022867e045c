"""The table of ``eval`` in a terminal of 80 columns: formats, counts, and what is left out where it says nothing."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from editcli.commands.evaluate import Measurement
from editcli.evaluation.cohorts import Cohort
from editcli.evaluation.distribution import Divergence, Divergences, Spread
from editcli.evaluation.judge import Endpoint, Judgement
from editcli.evaluation.metrics import Evaluation
from editcli.render.eval import LEAST, evaluation_table

KIND = {"prompts": 3, "accuracy": 0.5, "right_tokens": 0.5, "generated_exact": 0.25, "generated_contains": 0.75}


def lines(**changes: Any) -> list[str]:
    """Return the lines that are shown of an evaluation of 20 edits."""
    evaluation = Evaluation(
        *(1.0, 1.0, 0.9, 0.9, 0.8, 0.8, 0.9),
        kinds={"locality": {"relation_specificity": KIND}},
        counts={"edits": 20, "paraphrases": 42, "neighbors": 56},
    )
    page = Console(file=io.StringIO(), width=80, color_system=None)
    page.print(evaluation_table(Measurement("run", "facts.jsonl", 20, evaluation, **changes)))
    assert isinstance(page.file, io.StringIO)
    return page.file.getvalue().splitlines()


def row(shown: list[str], name: str) -> list[str]:
    """Return the cells of the one line that begins with ``name``."""
    (line,) = [line for line in shown if line.strip().startswith(name)]
    return line.strip().removeprefix(name).split()


def test_divergences_that_differ_by_powers_of_ten_are_told_apart() -> None:
    near = Spread(56, 5.3e-5, 4.1e-3, (Divergence("Machu Picchu lies in", "f09", 0.2301), Divergence("x", "f01", 0.0)))
    shown = lines(divergences=Divergences(near, Spread(100, 0.0, 1.25e-6, ())))
    assert row(shown, "neighbors median") == ["5.30e-05", "56"]
    assert row(shown, "unrelated median") == ["0.0000", "100"]
    assert row(shown, "unrelated p90") == ["1.25e-06", "100"]
    assert row(shown, "Machu Picchu lies in") == ["f09", "0.2301"]
    assert not any(line.split()[:2] == ["x", "f01"] for line in shown), "a prompt that did not move moved most"


def test_a_judge_that_stopped_early_is_counted_by_what_it_judged() -> None:
    shares = {"efficacy_correct": 1.0, "generalization_correct": 0.5}
    counts = {"efficacy": 14, "generalization": 6}
    judged = Judgement(Endpoint("http://x", "grader", 20), shares, 112, 20, counts, 20, "verdicts.jsonl")
    shown = lines(judgement=judged)
    assert row(shown, "judge efficacy_correct") == ["1.0000", "14"]
    assert row(shown, "judge generalization_correct") == ["0.5000", "6"]


def test_ages_are_shown_where_every_part_has_enough_edits() -> None:
    def parts(edits: int) -> tuple[Cohort, ...]:
        return (Cohort(1, 10, 10, 1.0, 1.0, 1.0), Cohort(11, 20, edits, 0.5, 0.5, None))

    assert not any("by age" in line for line in lines(cohorts=parts(LEAST - 1)))
    assert row(lines(cohorts=parts(LEAST)), "11 to 20") == [f"{LEAST}", "0.5000", "0.5000", "-"]


def test_a_kind_has_one_short_line_under_each_protocol() -> None:
    shown = lines()
    assert row(shown, "locality relation_specificity accuracy") == ["0.5000", "3"]
    assert row(shown, "locality relation_specificity contains") == ["0.7500", "3"]
