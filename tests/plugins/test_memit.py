import pytest
import torch

from editcli.errors import NumericalError, OptionError, StateError
from editcli.plugin.interfaces import State
from editcli.plugin.options import build
from editcli_memit.editor import Memit


def reference(keys, residual, moment, past, weight=15000.0):
    """The paper's update, with an explicit inverse."""
    return residual @ keys.T @ torch.linalg.inv(weight * moment + past + keys @ keys.T)


@pytest.mark.parametrize("remember", [False, True])
@pytest.mark.parametrize("count", [1, 4, 20])
def test_a_stream_of_batches_equals_the_published_update(session, edit_batch, make_requests, close, remember, count):
    editor = Memit(Memit.Options(mom2_update_weight=3.0, remember=remember))
    moments = {site: session.second_moment(site) for site in session.sites}
    past = {site: torch.zeros_like(moments[site]) for site in session.sites}
    editor.prepare(session)
    for batch in range(5):
        for problem, update in edit_batch(session, editor, make_requests(f"b{batch}", count)):
            close(
                update.dense(),
                reference(problem.keys, problem.residual, moments[problem.site], past[problem.site], 3.0),
            )
            if remember:
                past[problem.site] += problem.keys @ problem.keys.T


def test_a_light_penalty_writes_the_residual(fake_session, edit_batch, make_requests):
    session = fake_session((6, 11), sites=1)
    editor = Memit(Memit.Options(mom2_update_weight=1e-6))
    editor.prepare(session)
    [(problem, update)] = edit_batch(session, editor, make_requests("b", 3))
    assert (update.dense() @ problem.keys - problem.residual).norm() < 1e-4 * problem.residual.norm()


def test_solving_changes_nothing(session, edit_batch, make_requests):
    editor = Memit(Memit.Options(remember=True))
    editor.prepare(session)
    edit_batch(session, editor, make_requests("a", 3))
    batch = make_requests("b", 3)
    problem = editor.problem(session, batch, session.sites[0], editor.values(session, batch))
    first, second = editor.solve(session, problem), editor.solve(session, problem)
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)


def test_a_resumed_stream_equals_an_unbroken_one(fake_session, edit_batch, make_requests, through_bytes):
    unbroken, broken = fake_session((6, 11)), fake_session((6, 11))
    editor, first = Memit(Memit.Options(remember=True)), Memit(Memit.Options(remember=True))
    editor.prepare(unbroken)
    first.prepare(broken)
    for batch in range(2):
        edit_batch(unbroken, editor, make_requests(f"b{batch}", 3))
        edit_batch(broken, first, make_requests(f"b{batch}", 3))
    second = Memit(Memit.Options(remember=True))
    second.load_state(broken, through_bytes(first.state()))
    edit_batch(unbroken, editor, make_requests("last", 3))
    edit_batch(broken, second, make_requests("last", 3))
    assert all(torch.equal(unbroken.weights[site], broken.weights[site]) for site in unbroken.sites)


def test_without_remember_there_is_no_state(session):
    editor = Memit()
    editor.prepare(session)
    assert not any(editor.state())


def test_state_of_another_model_is_refused(session):
    editor = Memit(Memit.Options(remember=True))
    with pytest.raises(StateError, match=r"blocks\.0\.mlp\.out"):
        editor.load_state(session, State())


def test_a_singular_moment_is_refused_with_site_and_condition(session, monkeypatch):
    keys = session.random("few", size=(session.shape[1], session.shape[1] - 2))
    monkeypatch.setattr(session, "second_moment", lambda site: keys @ keys.T)
    with pytest.raises(NumericalError, match=r"tokens_per_dim.*ridge") as caught:
        Memit().prepare(session)
    assert caught.value.site == session.sites[0].module
    assert caught.value.condition is not None
    assert caught.value.condition > 1e12


def test_a_ridge_makes_a_singular_moment_usable(session, monkeypatch, edit_batch, make_requests):
    keys = session.random("few", size=(session.shape[1], session.shape[1] - 2))
    monkeypatch.setattr(session, "second_moment", lambda site: keys @ keys.T)
    editor = Memit(Memit.Options(ridge=1e-6))
    editor.prepare(session)
    assert all(bool(u.left.isfinite().all()) for _, u in edit_batch(session, editor, make_requests("b", 2)))


def test_unusable_weight_is_refused():
    with pytest.raises(OptionError, match="mom2_update_weight"):
        build(Memit.Options, {"mom2_update_weight": "0"}, owner="memit")
