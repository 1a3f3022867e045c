import pytest
import torch

from editcli.errors import OptionError, StateError
from editcli.plugin.interfaces import Dense, LowRank, Problem, State
from editcli.plugin.options import build
from editcli.testing import same_state, through_bytes
from editcli_memit.editor import Memit
from editcli_sphere.stabilizer import Sphere, principal
from tests.support.facts import requests_of
from tests.support.sessions import assert_close, write_batch

ETA, ALPHA = 0.5, 0.5


def projector(weight, eta=ETA):
    """U U^T by the paper's definition: eigenvectors of the (d_in, d_in) matrix, from a full decomposition."""
    W = weight.double()
    Wn = W / (W.norm(dim=1, keepdim=True) + 1e-8)
    values, vectors = torch.linalg.eigh(Wn.T @ Wn / len(W))
    values, vectors = values.flip(0), vectors.flip(1)
    share, r = values.cumsum(0) / values.sum(), 1
    r += sum(1 for value in share.tolist() if value <= eta)
    return vectors[:, :r] @ vectors[:, :r].T


def random_update(session, rank=3):
    left, right = (session.random(name, size=(size, rank)) for name, size in zip("ab", session.shape, strict=True))
    return LowRank(left, right)


def ready(session, **options):
    sphere = Sphere(Sphere.Options(**options))
    sphere.prepare(session)
    return sphere


@pytest.mark.parametrize("eta", [0.2, 0.5, 0.9])
def test_the_basis_is_that_of_the_rows_at_one_length(session, eta):
    for site in session.sites:
        basis = principal(session.weight(site), eta)
        assert_close(basis @ basis.T, projector(session.weight(site), eta), 1e-9)


def test_factors_and_dense_matrix_give_the_published_update(session):
    sphere, site, update = ready(session), session.sites[0], random_update(session)
    problem, size = Problem(site, update.right, update.left), session.shape[1]
    expected = update.dense() @ (torch.eye(size).double() - ALPHA * projector(session.weight(site)))
    factors = sphere.stabilize_update(session, site, update, problem)
    assert_close(factors.dense(), expected)
    assert factors.left is update.left
    assert_close(sphere.stabilize_update(session, site, Dense(update.dense()), None).dense(), expected)


def test_the_basis_follows_the_weight_every_so_many_batches(session):
    """Between two decompositions it stays what it was, bit by bit."""
    editor, sphere = Memit(Memit.Options(mom2_update_weight=1.0)), ready(session, every=2)
    editor.prepare(session)
    for number in range(4):
        before = dict(sphere.bases)
        write_batch(session, editor, requests_of(f"b{number}", 5), [sphere])
        for site in session.sites:
            now = sphere.bases[site.module]
            if number % 2 == 0:
                assert torch.equal(now, before[site.module])
            else:
                assert not torch.equal(now, before[site.module])
                assert_close(now @ now.T, projector(session.weight(site)), 1e-9)


def test_the_rows_stay_more_evenly_spread_than_without(session):
    """Updates along the rows' own directions pull the rows together; damping them leaves less of that."""
    sphere, site = ready(session, alpha=1.0, eta=0.3), session.sites[0]
    direction = principal(session.weight(site), 0.3)[:, :1]
    update = LowRank(torch.ones(session.shape[0], 1).double(), direction)
    assert sphere.stabilize_update(session, site, update, None).norm() <= 1e-9 * update.norm()
    assert sphere.record()["sites"][site.module]["removed"] == pytest.approx(1.0)


def test_its_state_is_the_basis_and_the_count(session):
    editor, sphere = Memit(Memit.Options(mom2_update_weight=1.0)), ready(session, every=3)
    editor.prepare(session)
    write_batch(session, editor, requests_of("a", 3), [sphere])
    other = Sphere(Sphere.Options(every=3))
    other.load_state(session, through_bytes(sphere.state()))
    assert other.batches == 1
    assert same_state(other.state(), sphere.state())
    with pytest.raises(StateError, match="sphere"):
        other.load_state(session, State({}, {"batches": 1}))


def test_unusable_options_are_refused():
    for options in ({"eta": 1.0}, {"alpha": 0}, {"every": 0}):
        with pytest.raises(OptionError, match="alpha"):
            build(Sphere.Options, options, owner="sphere")
