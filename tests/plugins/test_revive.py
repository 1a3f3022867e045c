import pytest
import torch

from editcli.errors import OptionError
from editcli.plugin.interfaces import Dense, LowRank, Problem
from editcli.plugin.options import build
from editcli_memit.editor import Memit
from editcli_revive.stabilizer import Revive

TAU = 0.4


def leading(weight, tau=TAU):
    """The paper's definition, from a full decomposition."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    k = int((values.cumsum(0) < tau * values.sum()).sum()) + 1
    return left[:, :k], values[:k], right[:k].T


def prepared(session, **options):
    revive = Revive(Revive.Options(tau=TAU, **options))
    revive.prepare(session)
    return revive


def lower_rank(session, monkeypatch):
    """Make every weight of the session rank 3."""
    for site in session.sites:
        left, values, right = torch.linalg.svd(session.weights[site], full_matrices=False)
        session._base[site] = session.weights[site] = left[:, :3] * values[:3] @ right[:3]


def random_update(session, rank=3):
    return LowRank(
        session.random("a", size=(session.shape[0], rank)), session.random("b", size=(session.shape[1], rank))
    )


@pytest.fixture(params=["full rank", "rank 3"])
def any_session(request, session, monkeypatch):
    if request.param == "rank 3":
        lower_rank(session, monkeypatch)
    return session


def test_nothing_is_left_of_an_update_on_the_protected_directions(any_session):
    session, revive = any_session, prepared(any_session)
    for site in session.sites:
        left, _, right = leading(session.baseline(site))
        update = random_update(session)
        change = revive.stabilize_update(session, site, update, Problem(site, update.right, update.left)).dense()
        assert (left.T @ change).norm() <= 1e-6 * change.norm()
        assert (change @ right).norm() <= 1e-6 * change.norm()


def test_factors_and_dense_matrix_give_the_same_and_twice_is_once(any_session, close):
    session, revive = any_session, prepared(any_session)
    site, update = session.sites[0], random_update(any_session)
    problem = Problem(site, update.right, update.left)
    once = revive.stabilize_update(session, problem.site, update, problem)
    dense = revive.stabilize_update(session, problem.site, Dense(update.dense()), problem)
    left, _, right = leading(session.baseline(site))
    rows, columns = torch.eye(session.shape[0]).double(), torch.eye(session.shape[1]).double()
    expected = (rows - left @ left.T) @ update.dense() @ (columns - right @ right.T)
    close(once.dense(), expected)
    close(dense.dense(), expected)
    close(revive.stabilize_update(session, problem.site, once, problem).dense(), expected)
    assert once.left.shape == update.left.shape


def test_an_update_within_the_null_space_passes_unchanged(fake_session, monkeypatch, close):
    """A double sum over the compact decomposition would delete it."""
    session = fake_session((6, 11))
    lower_rank(session, monkeypatch)
    revive, site = prepared(session), session.sites[0]
    left, _, right = torch.linalg.svd(session.baseline(site))
    update = LowRank(left[:, 4:5], right[8:9].T)
    close(
        revive.stabilize_update(session, site, update, Problem(site, update.right, update.left)).dense(), update.dense()
    )


def test_protected_triplets_stay_exact_after_fifty_batches(any_session, edit_batch, make_requests):
    session, editor = any_session, Memit(Memit.Options(mom2_update_weight=50.0))
    editor.prepare(session)
    revive = prepared(session)
    for number in range(50):
        edit_batch(session, editor, make_requests(f"b{number}", 3), [revive])
    for site in session.sites:
        left, values, right = leading(session.baseline(site))
        assert (session.weight(site) - session.baseline(site)).norm() > 0.1
        assert torch.allclose(session.weight(site) @ right, left * values, atol=1e-9)
        assert torch.allclose(left.T @ session.weight(site), values[:, None] * right.T, atol=1e-9)


def test_current_basis_follows_the_weight(session, edit_batch, make_requests):
    editor = Memit(Memit.Options(mom2_update_weight=1.0))
    editor.prepare(session)
    edit_batch(session, editor, make_requests("a", 5))
    revive, site = prepared(session, basis="current"), session.sites[0]
    left, _, right = leading(session.weight(site))
    update = random_update(session)
    change = revive.stabilize_update(session, site, update, Problem(site, update.right, update.left)).dense()
    assert (left.T @ change).norm() <= 1e-6 * change.norm()
    assert (change @ right).norm() <= 1e-6 * change.norm()


def test_record_tells_k_and_what_was_removed(session):
    revive, site = prepared(session), session.sites[0]
    left, _, right = leading(session.baseline(site))
    revive.stabilize_update(session, site, LowRank(left[:, :1], right[:, :1]), Problem(site, right, left))
    figures = revive.record()["sites"][site.module]
    assert figures["k"] == left.shape[1]
    assert figures["removed_left"] == pytest.approx(1.0)
    assert figures["removed_right"] == pytest.approx(1.0)


def test_float32_factors_stay_float32(session):
    update, site = random_update(session), session.sites[0]
    update = LowRank(update.left.float(), update.right.float())
    out = prepared(session).stabilize_update(session, site, update, Problem(site, update.right, update.left))
    assert out.left.dtype == out.right.dtype == torch.float32
    left, _, _ = leading(session.baseline(site))
    assert (left.T @ out.dense().double()).norm() <= 1e-6 * out.norm()


def test_a_resumed_filter_is_the_same(session, through_bytes):
    revive, resumed = prepared(session), Revive(Revive.Options(tau=TAU))
    resumed.load_state(session, through_bytes(revive.state()))
    update, site = random_update(session), session.sites[1]
    problem = Problem(site, update.right, update.left)
    first, second = (r.stabilize_update(session, problem.site, update, problem) for r in (revive, resumed))
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)


def test_tau_is_a_share():
    with pytest.raises(OptionError, match="tau"):
        build(Revive.Options, {"tau": "1.5"}, owner="revive")
