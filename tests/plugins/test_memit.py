import pytest
import torch

from editcli.errors import NumericalError, OptionError, StateError
from editcli.plugin.interfaces import State
from editcli.plugin.options import build
from editcli_memit.editor import Memit
from tests.support.facts import requests_of
from tests.support.sessions import FakeSession, Witness, assert_close, write_batch


def reference(keys, residual, moment, past, weight=15000.0):
    """The paper's update, with an explicit inverse."""
    return residual @ keys.T @ torch.linalg.inv(weight * moment + past + keys @ keys.T)


@pytest.mark.parametrize("remember", [False, True])
@pytest.mark.parametrize("count", [1, 4, 20])
def test_a_stream_of_batches_equals_the_published_update(session, remember, count):
    editor = Memit(Memit.Options(mom2_update_weight=3.0, remember=remember))
    moments = {site: session.second_moment(site) for site in session.sites}
    past = {site: torch.zeros_like(moments[site]) for site in session.sites}
    editor.prepare(session)
    for batch in range(5):
        written = write_batch(session, editor, requests_of(f"b{batch}", count), [witness := Witness()])
        for site, problem in written.problems.items():
            keys, residual = problem.keys.double(), problem.residual.double()
            expected = reference(keys, residual, moments[site], past[site], 3.0)
            assert_close(witness.updates[site].dense(), expected, 1e-8)
            assert_close(written.updates[site].dense(), expected, 1e-3)
            if remember:
                past[site] += keys @ keys.T


def test_a_light_penalty_writes_the_residual():
    session = FakeSession((6, 11), sites=1)
    editor = Memit(Memit.Options(mom2_update_weight=1e-6))
    editor.prepare(session)
    written = write_batch(session, editor, requests_of("b", 3))
    [(site, problem)] = written.problems.items()
    assert_close(written.updates[site].dense() @ problem.keys, problem.residual, 1e-4)


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


def test_a_ridge_makes_a_singular_moment_usable(session, monkeypatch):
    keys = session.random("few", size=(session.shape[1], session.shape[1] - 2))
    monkeypatch.setattr(session, "second_moment", lambda site: keys @ keys.T)
    editor = Memit(Memit.Options(ridge=1e-6))
    editor.prepare(session)
    assert all(update.norm() > 0 for update in write_batch(session, editor, requests_of("b", 2)).updates.values())


def test_unusable_weight_is_refused():
    with pytest.raises(OptionError, match="mom2_update_weight"):
        build(Memit.Options, {"mom2_update_weight": "0"}, owner="memit")
