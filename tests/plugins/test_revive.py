import pytest
import torch

from editcli.errors import OptionError
from editcli.plugin.interfaces import Dense, LowRank, Problem
from editcli.plugin.options import build
from editcli_memit.editor import Memit
from editcli_revive.stabilizer import Revive
from tests.support.facts import requests_of
from tests.support.sessions import FakeSession, assert_close, write_batch

TAU = 0.4


def leading(weight, tau=TAU):
    """The paper's definition, from a full decomposition."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
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
        session.base[site] = session.weights[site] = left[:, :3] * values[:3] @ right[:3]


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


def test_factors_and_dense_matrix_give_the_same_and_twice_is_once(any_session):
    session, revive = any_session, prepared(any_session)
    site, update = session.sites[0], random_update(any_session)
    problem = Problem(site, update.right, update.left)
    once = revive.stabilize_update(session, problem.site, update, problem)
    dense = revive.stabilize_update(session, problem.site, Dense(update.dense()), problem)
    left, _, right = leading(session.baseline(site))
    rows, columns = torch.eye(session.shape[0]).double(), torch.eye(session.shape[1]).double()
    expected = (rows - left @ left.T) @ update.dense() @ (columns - right @ right.T)
    assert_close(once.dense(), expected)
    assert_close(dense.dense(), expected)
    assert_close(revive.stabilize_update(session, problem.site, once, problem).dense(), expected)
    assert once.left.shape == update.left.shape


def test_an_update_within_the_null_space_passes_unchanged(monkeypatch):
    """A double sum over the compact decomposition would delete it."""
    session = FakeSession((6, 11))
    lower_rank(session, monkeypatch)
    revive, site = prepared(session), session.sites[0]
    left, _, right = torch.linalg.svd(session.baseline(site))
    update = LowRank(left[:, 4:5], right[8:9].T)
    assert_close(
        revive.stabilize_update(session, site, update, Problem(site, update.right, update.left)).dense(), update.dense()
    )


def test_protected_triplets_stay_exact_after_fifty_batches(any_session):
    session, editor = any_session, Memit(Memit.Options(mom2_update_weight=50.0))
    editor.prepare(session)
    revive = prepared(session)
    for number in range(50):
        write_batch(session, editor, requests_of(f"b{number}", 3), [revive])
    for site in session.sites:
        left, values, right = leading(session.baseline(site))
        weight, rounding = session.weight(site).double(), 1e-5 * session.change(site).norm()
        assert session.change(site).norm() > 0.1
        assert (weight @ right - left * values).norm() <= rounding
        assert (left.T @ weight - values[:, None] * right.T).norm() <= rounding


def test_current_basis_follows_the_weight(session):
    editor = Memit(Memit.Options(mom2_update_weight=1.0))
    editor.prepare(session)
    write_batch(session, editor, requests_of("a", 5))
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


def test_tau_is_a_share():
    with pytest.raises(OptionError, match="tau"):
        build(Revive.Options, {"tau": "1.5"}, owner="revive")
