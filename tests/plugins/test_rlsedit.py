import pytest
import torch

from editcli.errors import OptionError, StateError
from editcli.plugin.interfaces import State
from editcli.plugin.options import build
from editcli_memit.editor import Memit
from editcli_rlsedit.editor import RlsEdit
from tests.support.facts import requests_of
from tests.support.sessions import FakeSession, assert_close, write_batch


@pytest.mark.parametrize(("lam", "mu"), [(0.0, 1.0), (0.7, 0.5), (2.0, 0.0)])
def test_a_stream_equals_the_batch_least_squares_solution(session, lam, mu):
    """The recursion is exact: after every batch the weight minimises the paper's whole objective, solved at once."""
    editor = RlsEdit(RlsEdit.Options(lambda_reg=lam, mu_reg=mu, mom2_update_weight=5.0))
    site = session.sites[0]
    base, moment = session.baseline(site).double(), session.second_moment(site)
    gram = lam**2 * torch.eye(session.shape[1], dtype=torch.float64) + mu**2 * 5.0 * moment
    goal = base @ gram
    editor.prepare(session)
    for batch in range(5):
        before = session.weight(site).double()
        problem = write_batch(session, editor, requests_of(f"b{batch}", 4)).problems[site]
        keys, residual = problem.keys.double(), problem.residual.double()
        gram = gram + keys @ keys.T
        goal = goal + (before @ keys + residual) @ keys.T
        assert_close(session.weight(site), goal @ torch.linalg.inv(gram), 1e-5)


def test_without_lambda_it_is_memit_with_history():
    first, second = FakeSession((6, 11)), FakeSession((6, 11))
    rls, memit = RlsEdit(), Memit(Memit.Options(remember=True))
    rls.prepare(first)
    memit.prepare(second)
    for batch in range(5):
        write_batch(first, rls, requests_of(f"b{batch}", 4))
        write_batch(second, memit, requests_of(f"b{batch}", 4))
    for site in first.sites:
        assert_close(first.weight(site), second.weight(site))


def test_lambda_makes_a_singular_moment_usable(session, monkeypatch):
    zero = torch.zeros(session.shape[1], session.shape[1], dtype=torch.float64)
    monkeypatch.setattr(session, "second_moment", lambda site: zero.clone())
    editor = RlsEdit(RlsEdit.Options(lambda_reg=0.5))
    editor.prepare(session)
    assert torch.allclose(editor.memory[session.sites[0].module].matrix, torch.eye(session.shape[1]).double() * 4)


def test_its_state_is_one_matrix_a_site(session):
    """The name is read from run folders that exist already."""
    editor = RlsEdit()
    editor.prepare(session)
    assert set(editor.state().tensors) == {f"{site.module}.inverse_gram" for site in session.sites}


def test_no_anchor_at_all_is_refused():
    with pytest.raises(OptionError, match="lambda_reg"):
        build(RlsEdit.Options, {"mu_reg": 0.0}, owner="rlsedit")


@pytest.mark.parametrize("change", [lambda q: q[None], lambda q: q[:-1], lambda q: q.int()])
def test_a_saved_state_of_another_shape_is_refused(session, change):
    editor = RlsEdit()
    editor.prepare(session)
    tensors = dict(editor.state().tensors)
    name = f"{session.sites[-1].module}.inverse_gram"
    with pytest.raises(StateError, match=session.sites[-1].module):
        RlsEdit().load_state(session, State({**tensors, name: change(tensors[name])}))
