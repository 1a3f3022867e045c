"""What the user sees: progress on a terminal, plain lines elsewhere, tables of 80 columns."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console

from editcli.formatting import duration, rate, size
from editcli.render.console import EVERY, FIRST, PlainProgress, RichReporter
from editcli.render.run import plan_table, run_table
from editcli.reporting import Rejection, RunReport, SiteReport
from editcli.runs.planning import Plan


def console(*, terminal: bool = False, width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False, legacy_windows=False)


def text(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def drawn(renderable: Any) -> str:
    page = console()
    page.print(renderable)
    return text(page)


def report(**changes: Any) -> RunReport:
    efficacy = {
        "before": {"efficacy_accuracy": 0.0, "efficacy_success": 0.1},
        "immediate": {"efficacy_accuracy": 1.0, "efficacy_success": 1.0},
        "retained": {"efficacy_accuracy": 0.975, "efficacy_success": 1.0},
    }
    pair = {"before": 0.5, "after": 0.9, "accuracy": {"before": None, "after": None}}
    values: dict[str, Any] = {
        "status": "done",
        "model": "some/model",
        "editor": "memit",
        "stabilizers": ("nas", "revive"),
        "read": 2000,
        "applied": 1990,
        "rejected": (),
        "efficacy": efficacy,
        "generalization": pair,
        "specificity": None,
        "sites": tuple(SiteReport(f"model.layers.{i}.mlp.down_proj", i, 1.0 + i, 0.25 * i, 1e-3) for i in range(3)),
        "seconds": {
            "load": 0.1,
            "prepare": 2.0,
            "targets": 70.0,
            "solve": 0.0,
            "eval": 1.0,
            "save": 0.5,
            "total": 75.0,
        },
        "out": "facts-edited",
    }
    return RunReport(**{**values, **changes})


def test_progress_shows_what_is_done_and_how_long_it_takes() -> None:
    page = console(terminal=True, width=100)
    with RichReporter(console=page).phase("Editing", 40, "edits") as advance:
        advance(10)
        advance(20)
    shown = text(page)
    for part in ("Editing", "30/40 edits", "left", "0:00:0"):
        assert part in shown


def test_phases_may_be_nested_and_leave_the_terminal_clean_after_an_error() -> None:
    page = console(terminal=True, width=100)
    reporter = RichReporter(console=page)

    def work() -> None:
        with reporter.phase("Outer", 2), reporter.phase("Inner", 3) as advance:
            advance(3)
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - the error is our own.
        work()
    assert "Inner" in text(page)
    assert text(page).count("\x1b[?25l") == text(page).count("\x1b[?25h"), "the cursor is shown again"
    with reporter.phase("Again", 1) as advance:
        advance(1)
    assert "Again" in text(page)


def test_elsewhere_there_are_only_plain_lines() -> None:
    page = console()
    reporter = RichReporter(console=page)
    with reporter.phase("Editing", 3) as advance:
        advance(3)
        reporter.note("a note with [brackets] and " + "words " * 30)
        reporter.warn("a warning")
    lines = text(page).splitlines()
    assert lines[0].startswith("a note with [brackets] and words")
    assert lines[1:] == ["warning: a warning"], "a phase that is over at once says nothing"


class Progress:
    """Plain progress whose clock a test moves; its own thread finds the clock standing still and adds nothing."""

    def __init__(self) -> None:
        self.now = 100.0
        self.lines: list[str] = []
        self.plain = PlainProgress(self.lines.append, clock=lambda: self.now)
        self.phase = self.plain.phase

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.plain.look()


def test_a_phase_that_lasts_says_how_far_it_is_every_ten_seconds() -> None:
    log = Progress()
    with log.phase("Optimising targets", 1200, "edits") as advance:
        log.wait(FIRST)
        log.wait(EVERY - FIRST)
        log.wait(FIRST)
        advance(12)
        log.wait(EVERY)
        advance(288)
        log.wait(EVERY - FIRST)
        log.wait(FIRST)
        advance(900)
        log.wait(7)
    assert log.lines == [
        "Optimising targets: 0/1,200 edits",
        "Optimising targets: 0/1,200 edits after 11 s",
        "Optimising targets: 12/1,200 edits, 0.57/s",
        "Optimising targets: 300/1,200 edits, 9.68/s, 1 min 33 s left",
        "Optimising targets: 1,200 edits in 38 s",
    ]


def test_of_nested_phases_the_innermost_speaks_and_the_outer_ones_once_they_advance() -> None:
    log = Progress()
    with log.phase("Editing", 200, "edits") as outer:
        with log.phase("Targets", 100, "edits"):
            log.wait(EVERY)
            log.wait(EVERY)
        outer(100)
        with log.phase("Targets", 100, "edits"):
            log.wait(EVERY)
    assert log.lines == [
        "Targets: 0/100 edits",
        "Targets: 0/100 edits after 20 s",
        "Targets: 0/100 edits in 20 s",
        "Editing: 100/200 edits, 3.33/s, 30 s left",
        "Targets: 0/100 edits",
        "Targets: 0/100 edits in 10 s",
        "Editing: 100/200 edits in 30 s",
    ]


def test_a_phase_of_one_piece_is_not_counted() -> None:
    log = Progress()
    with log.phase("Loading", 1) as advance:
        log.wait(EVERY)
        log.wait(EVERY)
        advance(1)
    assert log.lines == ["Loading", "Loading after 20 s", "Loading: done in 20 s"]


def test_a_phase_that_fails_leaves_the_last_word_to_the_error() -> None:
    log = Progress()

    def fail() -> None:
        with log.phase("Targets", 2):
            log.wait(EVERY)
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - the error is our own.
        fail()
    assert log.lines == ["Targets: 0/2"]
    with log.phase("Targets", 2):
        log.wait(EVERY)
    assert len(log.lines) == 3, "the failed phase is forgotten"


def test_a_phase_that_is_busy_is_announced_while_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("editcli.render.console.FIRST", 0.05)
    monkeypatch.setattr("editcli.render.console.LOOK", 0.01)
    page = console()
    with RichReporter(console=page).phase("Targets", 2, "edits"):
        deadline = time.monotonic() + 20
        while "Targets: 0/2 edits" not in text(page) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert text(page).splitlines()[0] == "Targets: 0/2 edits"


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_leaves_the_warnings(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("editcli.render.console.FIRST", 0.0)
    page = console(terminal=terminal)
    reporter = RichReporter(console=page, verbosity=lambda: -1)
    with reporter.phase("Editing", 3) as advance:
        advance(3)
    reporter.note("a note")
    reporter.warn("a warning")
    assert "a warning" in text(page)
    assert "a note" not in text(page)
    assert "Editing" not in text(page)


def test_the_outcome_names_every_figure_that_was_measured() -> None:
    shown = drawn(run_table(report()))
    for part in (
        "1,990 of 2,000 edits applied",
        "some/model with memit + nas + revive",
        "before",
        "immediate",
        "retained",
    ):
        assert part in shown
    for part in ("efficacy_accuracy", "97.5 %", "generalization_success", "90.0 %", "2.000", "drifting", "collapsing"):
        assert part in shown
    for part in ("specificity", "generalization_accuracy", "solve"):
        assert part not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_an_outcome_without_any_measurement_has_no_empty_table() -> None:
    nothing = {"before": None, "immediate": None, "retained": None}
    assert "immediate" not in drawn(run_table(report(efficacy=nothing, generalization=None)))


def test_a_run_that_ended_early_says_so() -> None:
    assert "memit + nas + revive, stopped" in " ".join(drawn(run_table(report(status="stopped"))).split())


def test_an_interrupted_run_does_not_claim_a_model_that_is_written_only_at_the_end() -> None:
    shown = " ".join(drawn(run_table(report(status="interrupted"))).split())
    assert "holds the edited model" not in shown
    assert "--resume" in shown


@pytest.mark.parametrize("status", ["done", "stopped"])
def test_a_run_without_an_edit_does_not_claim_an_edited_model(status: str) -> None:
    shown = " ".join(drawn(run_table(report(status=status, applied=0))).split())
    assert "holds the edited model" not in shown
    assert "holds no edit" in shown


def test_rejected_edits_are_listed_up_to_a_point_and_never_read_as_markup() -> None:
    rejected = tuple(Rejection(f"e{i}", "the subject [red]'x'[/red] is not in the prompt", i) for i in range(9))
    shown = " ".join(drawn(run_table(report(rejected=rejected))).split())
    assert "rejected: line 0, e0: the subject [red]'x'[/red] is not in the prompt" in shown
    assert "and 4 more, see editcli/rejected.jsonl" in shown


def test_a_run_says_how_its_targets_ended() -> None:
    shown = drawn(run_table(report(targets={"optimised": 1990, "reached": 1800, "clamped": 12})))
    assert "targets: 1,800 of 1,990 were reached, 12 ended at the clamp" in shown
    assert "targets: " not in drawn(run_table(report(targets=None)))


def test_the_plan_says_what_it_costs() -> None:
    plan = Plan(
        model="bundled",
        preset="bundled",
        label="tuned",
        editor="memit",
        stabilizers=("nas",),
        edits=2000,
        rejected=(),
        batches=20,
        batch_size=100,
        sites=({"module": "model.layers.0.mlp.down_proj", "layer": 0, "shape": [128, 1536]},),
        tokens=23456,
        bytes={"model": 11_500_000, "masters": 786_432, "statistics": 18_874_368, "disk": 12_300_000},
        seconds=200.0,
        out="stream-edited",
        memory="about 11.5 MB on cpu",
    )
    shown = " ".join(drawn(plan_table(plan)).split())
    for part in ("(tuned)", "2,000 in 20 batches of 100; 23,456 tokens", "11.5 MB on cpu", "128 x 1536", "3 min 20 s"):
        assert part in shown


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (42, "42 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7620, "2 h 7 min")],
)
def test_times_are_said_as_one_would(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_sizes_and_rates_are_said_as_one_would() -> None:
    assert [size(n) for n in (5, 999, 1000, 11_546_712, 2.5e12)] == ["5 B", "999 B", "1.0 kB", "11.5 MB", "2.5 TB"]
    assert [rate(n) for n in (0.123, 12.34, 12345.6)] == ["0.12", "12.3", "12,346"]
