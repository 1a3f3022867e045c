"""Any stabilizers, in any order, on any editor."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from editcli.plugin.interfaces import Editor, Stabilizer
from editcli.plugin.manager import load_plugins
from editcli.plugin.options import build
from editcli.plugin.wrapping import give_wrapped
from tests.support.facts import requests_of
from tests.support.sessions import FakeSession, assert_close, write_batch

PLUGINS = load_plugins()
# The editor of routed experts has stacks of its own in its tests.
EDITORS = [name for name in PLUGINS.all("editor") if not PLUGINS.find("editor", name).component.writes_experts]
OPTIONS = {
    "clip": {"rho": 1.05},
    "nas": {"anchor": 2.0, "guard": 100.0},
    "nse": {"met": 0.0},
    "revive": {"tau": 0.3},
    "ultraedit": {"lr": 0.01},
}


def make(kind: str, name: str) -> Any:
    component = PLUGINS.find(kind, name).component
    made = component(build(component.Options, OPTIONS.get(name, {}), owner=name))
    give_wrapped(made, OPTIONS, PLUGINS)
    return made


@pytest.mark.parametrize("stabilizer", [None, *PLUGINS.all("stabilizer")])
@pytest.mark.parametrize("editor", EDITORS)
def test_every_editor_takes_every_stabilizer(session: FakeSession, editor: str, stabilizer: str | None) -> None:
    stack = [make("stabilizer", stabilizer)] if stabilizer else []
    method: Editor = make("editor", editor)
    session.sites = session.sites[-1:] if method.single_site else session.sites
    for part in (method, *stack):
        part.prepare(session)
    for number in range(2):
        written = write_batch(session, method, requests_of(f"b{number}", 3), stack)
        assert list(written.updates) == list(session.sites)
        for site, update in written.updates.items():
            assert 0 < update.norm() < float("inf")
            assert torch.isfinite(session.weight(site)).all()


@pytest.mark.parametrize("order", list(itertools.permutations(["nas", "revive", "rect", "clip"])), ids="-".join)
def test_a_stack_keeps_the_promise_on_values_and_that_of_its_last_filter(order: tuple[str, ...]) -> None:
    """The anchor is a promise on values, which no filter of updates touches, wherever ``nas`` stands."""
    session, method = FakeSession((6, 11), small=5), make("editor", "memit")
    stack: dict[str, Stabilizer] = {name: make("stabilizer", name) for name in order}
    for part in (method, *stack.values()):
        part.prepare(session)
    last = [name for name in order if name != "nas"][-1]
    for number in range(3):
        batch, weights = requests_of(f"b{number}", 3), dict(session.weights)
        values = session.values(batch)
        anchored = stack["nas"].stabilize_values(session, values)
        torch.testing.assert_close(anchored.contribution.norm(dim=0), torch.full((3,), 2.0).double())
        written = write_batch(session, method, batch, list(stack.values()))
        first = session.sites[0]
        remaining = (anchored.target - output_on(session, weights, batch)) / len(session.sites)
        assert_close(written.problems[first].residual, remaining)
        for site, update in written.updates.items():
            check(last, session, site, update)


def output_on(session: FakeSession, weights: dict[Any, torch.Tensor], batch: Any) -> torch.Tensor:
    """Return the outputs as they were under other weights."""
    now, session.weights = session.weights, weights
    try:
        return session.output(batch)
    finally:
        session.weights = now


def check(last: str, session: FakeSession, site: Any, update: Any) -> None:
    """Assert what the last filter of a stack promises of the update that is written."""
    if last == "clip":
        assert session.weight(site).norm() <= 1.05 * session.baseline(site).norm()
    elif last == "rect":
        assert int((update.dense() == 0).sum()) >= int(0.6 * update.dense().numel())
    else:
        left, values, right = torch.linalg.svd(session.baseline(site).double(), full_matrices=False)
        k = int((values.cumsum(0) < 0.3 * values.sum()).sum()) + 1
        assert (left[:, :k].T @ update.dense().double()).norm() <= 1e-6 * update.norm()
        assert (update.dense().double() @ right[:k].T).norm() <= 1e-6 * update.norm()
