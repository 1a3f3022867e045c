"""Guards: read as they are written, checked before anything is kept, and what they leave behind."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editcli.editing.pipeline import edit_batch
from editcli.errors import GuardError, OptionError
from editcli.plugin.interfaces import Editor, LowRank, Problem, Site, Update, Values
from editcli.records.recovery import recover
from editcli.records.state import RunFolder
from editcli.reporting import Silent
from editcli.settings.core import TargetOptions
from editcli.settings.guards import Guard, needs_retained, parse_guards, refuse_nonfinite
from tests.support.facts import CAPITALS
from tests.support.workshop import STACKS, same_stream


@given(
    st.sampled_from(["ratio", "drift", "efficacy", "retained"]),
    st.sampled_from([">", ">=", "<", "<="]),
    st.floats(-1e6, 1e6),
    st.floats(),
)
def test_a_guard_stops_exactly_where_its_condition_holds(
    figure: str, relation: str, limit: float, value: float
) -> None:
    (guard,) = parse_guards([f" {figure} {relation} {limit!r}"])
    assert guard == Guard(figure, relation, limit)
    compare = {">": value > limit, ">=": value >= limit, "<": value < limit, "<=": value <= limit}
    if compare[relation] or math.isnan(value):
        with pytest.raises(GuardError, match="last good state is kept"):
            guard.check(figure, value, where="here")
    else:
        guard.check(figure, value, where="here")


def test_a_guard_looks_at_its_own_figure() -> None:
    Guard("ratio", ">", 1.0).check("drift", 5.0, where="here")


@pytest.mark.parametrize(
    "text", ["ratio", "ratio=2", "ratoi>2", "ratio>", "ratio>two", "ratio>1e999", "ratio>1.2.3", ""]
)
def test_a_condition_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(OptionError):
        parse_guards([text])


def test_nonfinite_is_always_on_and_retained_costs_a_measurement() -> None:
    assert parse_guards(["nonfinite"]) == ()
    assert needs_retained(parse_guards(["ratio>2", "retained<0.5"]))
    assert not needs_retained(parse_guards(["ratio>2"]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    refuse_nonfinite("it", [torch.ones(2)], where="here")
    with pytest.raises(GuardError, match="stopped by nonfinite: it is not finite here"):
        refuse_nonfinite("it", [torch.ones(2), torch.tensor([bad])], where="here")


@pytest.mark.parametrize("broken", ["keys", "residual", "left"])
def test_a_batch_that_is_not_finite_anywhere_leaves_the_weights(broken: str) -> None:
    site = Site(0, "mlp", False)
    parts = {name: torch.ones(2, 1) for name in ("keys", "residual", "left")}
    parts[broken] = torch.full((2, 1), float("nan"))

    class Fake(Editor):
        name, reference = "fake", "none"

        def values(self, session: Any, requests: Any) -> Any:
            return Values(torch.ones(2, 1), zeros := torch.zeros(2, 1), zeros, {}, torch.ones(1))

        def problem(self, session: Any, requests: Any, site: Site, values: Any) -> Problem:
            return Problem(site, parts["keys"], parts["residual"])

        def solve(self, session: Any, problem: Problem) -> Update:
            return LowRank(parts["left"], torch.ones(2, 1))

    written: list[Any] = []
    session: Any = SimpleNamespace(
        sites=[site],
        masters=dict,
        restore=lambda before: None,
        write=lambda *arguments: written.append(arguments),
        reporter=Silent(),
        options=TargetOptions(),
    )
    session.stages = (session,)
    with pytest.raises(GuardError, match="at mlp"):
        edit_batch(session, Fake(), (), (), lambda site, update: None)
    assert written == []


@pytest.mark.parametrize(
    ("guard", "said"),
    [
        ("drift>0.02", r"stopped by drift>0.02: drift would be 0\.0\d+ at model.layers.[12].mlp.down_proj with edits"),
        (
            "ratio<1.1",
            r"stopped by ratio<1.1: ratio would be [01.\d]+ at model.layers.1.mlp.down_proj with edits France",
        ),
    ],
)
def test_a_guard_ends_the_run_with_code_3_and_says_why(shop: Any, guard: str, said: str) -> None:

    ended = shop.apply("out", *STACKS["memit"], "--stop-if", guard, "--json")
    assert ended.code == 3, ended.err
    document = json.loads(ended.out)
    assert document["status"] == "stopped"
    assert re.search(said, document["stopped_by"])
    assert document["verdict"] == document["stopped_by"]
    assert json.loads((shop.folder / "out/editcli/run.json").read_text())["stopped_by"] == document["stopped_by"]
    applied = document["edits"]["applied"]
    assert applied == len(recover(RunFolder(shop.folder / "out")).requests)
    assert (shop.folder / "out/model.safetensors").exists() == (applied > 0)


@pytest.mark.slow
def test_a_stopped_run_goes_on_once_its_guard_allows(shop: Any, finished: Callable[[str], Path]) -> None:
    assert shop.apply("out", *STACKS["rlsedit"], "--stop-if", "drift>0.02").code == 3
    assert shop.apply("out", *STACKS["rlsedit"], "--resume", "--stop-if", "drift>0.02").code == 3
    assert shop.apply("out", *STACKS["rlsedit"], "--resume").code == 0
    same_stream(shop.folder / "out", finished("rlsedit"))


@pytest.mark.slow
@pytest.mark.parametrize("guard", ["efficacy<=1", "retained<=1"])
def test_a_guard_on_what_is_measured_keeps_nothing_of_the_batch(shop: Any, guard: str) -> None:
    shop.edits("facts.jsonl", [{**edit, "target_true": "Bob"} for edit in CAPITALS])
    ended = shop.apply("out", *STACKS["alphaedit"], "--eval", "--stop-if", guard)
    assert ended.code == 3, ended.err
    assert recover(RunFolder(shop.folder / "out")).snapshot.step == 0
    assert shop.apply("out", *STACKS["alphaedit"], "--resume").code == 0
    same_stream(shop.folder / "out", shop.unbroken("never", *STACKS["alphaedit"]))


def test_a_weight_that_the_saved_type_cannot_hold_stops_the_run(shop: Any) -> None:
    prelude = (
        "from editcli_memit.editor import Memit\n"
        "def solve(self, session, problem, real=Memit.solve):\n"
        "    return real(self, session, problem).scaled(1e7)\n"
        "Memit.solve = solve"
    )
    ended = shop.apply("out", "--editor", "memit", "--save-dtype", "float16", "--json", prelude=prelude)
    assert ended.code == 3, ended.err
    assert "the weight is not finite at model.layers." in json.loads(ended.out)["stopped_by"]
