"""Any stabilizers, in any order, on any editor."""

import itertools

import pytest

from editcli.plugin.manager import load_plugins
from editcli.plugin.options import build

PLUGINS = load_plugins()
OPTIONS = {"clip": {"rho": 1.05}, "revive": {"tau": 0.3}, "ultraedit": {"lr": 0.01}}


def make(kind, name):
    component = PLUGINS.find(kind, name).component
    return component(build(component.Options, OPTIONS.get(name, {}), owner=name))


@pytest.mark.parametrize("stabilizer", [None, *PLUGINS.all("stabilizer")])
@pytest.mark.parametrize("editor", PLUGINS.all("editor"))
def test_every_editor_takes_every_stabilizer(session, edit_batch, make_requests, editor, stabilizer):
    stack = [make("stabilizer", stabilizer)] if stabilizer else []
    method = make("editor", editor)
    for part in (method, *stack):
        part.prepare(session)
    for number in range(2):
        for problem, update in edit_batch(session, method, make_requests(f"b{number}", 3), stack):
            assert update.dense().shape == session.shape
            assert bool(session.weight(problem.site).isfinite().all())
            assert session.weight(problem.site).dtype == session.baseline(problem.site).dtype


@pytest.mark.parametrize("order", list(itertools.permutations(["nas", "revive", "rect", "clip"])), ids="-".join)
def test_the_last_stabilizer_of_a_stack_has_its_way(fake_session, edit_batch, make_requests, order):
    session, method = fake_session((6, 11), small=5), make("editor", "memit")
    stack = [make("stabilizer", name) for name in order]
    for part in (method, *stack):
        part.prepare(session)
    for number in range(3):
        for problem, update in edit_batch(session, method, make_requests(f"b{number}", 3), stack):
            again = stack[-1].stabilize_update(session, problem.site, update, problem).dense()
            if order[-1] == "revive":
                assert (again - update.dense()).norm() <= 1e-9 * update.norm()
            if order[-1] == "clip":
                assert session.weight(problem.site).norm() <= 1.05 * session.baseline(problem.site).norm()
            if order[-1] == "rect":
                assert int((update.dense() == 0).sum()) >= int(0.6 * update.dense().numel())
