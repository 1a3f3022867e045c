import pytest
import torch

from editcli.errors import OptionError
from editcli.plugin.options import build
from editcli.testing import same_state
from editcli_memit.editor import Memit
from editcli_rlsedit.editor import RlsEdit


@pytest.mark.parametrize(("lam", "mu"), [(0.0, 1.0), (0.7, 0.5), (2.0, 0.0)])
def test_a_stream_equals_the_batch_least_squares_solution(session, edit_batch, make_requests, close, lam, mu):
    """The recursion is exact: after every batch the weight minimises the paper's whole objective, solved at once."""
    editor = RlsEdit(RlsEdit.Options(lambda_reg=lam, mu_reg=mu, mom2_update_weight=5.0))
    site = session.sites[0]
    base, moment = session.baseline(site), session.second_moment(site)
    gram = lam**2 * torch.eye(session.shape[1], dtype=torch.float64) + mu**2 * 5.0 * moment
    goal = base @ gram
    editor.prepare(session)
    for batch in range(5):
        before = session.weight(site)
        problem, _ = edit_batch(session, editor, make_requests(f"b{batch}", 4))[0]
        gram = gram + problem.keys @ problem.keys.T
        goal = goal + (before @ problem.keys + problem.residual) @ problem.keys.T
        close(session.weight(site), goal @ torch.linalg.inv(gram))


def test_without_lambda_it_is_memit_with_history(fake_session, edit_batch, make_requests, close):
    first, second = fake_session((6, 11)), fake_session((6, 11))
    rls, memit = RlsEdit(), Memit(Memit.Options(remember=True))
    rls.prepare(first)
    memit.prepare(second)
    for batch in range(5):
        edit_batch(first, rls, make_requests(f"b{batch}", 4))
        edit_batch(second, memit, make_requests(f"b{batch}", 4))
    for site in first.sites:
        close(first.weight(site) - first.baseline(site), second.weight(site) - second.baseline(site), 1e-12)


def test_lambda_makes_a_singular_moment_usable(session, monkeypatch):
    zero = torch.zeros(session.shape[1], session.shape[1], dtype=torch.float64)
    monkeypatch.setattr(session, "second_moment", lambda site: zero.clone())
    editor = RlsEdit(RlsEdit.Options(lambda_reg=0.5))
    editor.prepare(session)
    assert torch.allclose(editor.memory[session.sites[0].module].matrix, torch.eye(session.shape[1]).double() * 4)


def test_state_is_restored_bit_by_bit(session, edit_batch, make_requests, through_bytes):
    editor, other = RlsEdit(), RlsEdit()
    editor.prepare(session)
    edit_batch(session, editor, make_requests("b", 3))
    state = editor.state()
    other.load_state(session, through_bytes(state))
    assert set(state.tensors) == {f"{site.module}.inverse_gram" for site in session.sites}
    assert same_state(state, other.state())


def test_no_anchor_at_all_is_refused():
    with pytest.raises(OptionError, match="lambda_reg"):
        build(RlsEdit.Options, {"mu_reg": 0.0}, owner="rlsedit")
