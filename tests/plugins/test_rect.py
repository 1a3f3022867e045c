import pytest
import torch

from editcli.errors import OptionError
from editcli.plugin.interfaces import Dense, LowRank, Problem
from editcli.plugin.options import build
from editcli_rect.stabilizer import Rect
from tests.support.sessions import FakeSession, assert_close


@pytest.fixture
def problem(session):
    keys, residual = session.random("b", size=(session.shape[1], 3)), session.random("a", size=(session.shape[0], 3))
    return Problem(session.sites[0], keys, residual)


def test_the_relatively_largest_entries_are_kept_as_they_were(session, problem):
    change = (update := LowRank(problem.residual, problem.keys)).dense()
    kept = Rect().stabilize_update(session, problem.site, update, problem).dense()
    relative = (change / session.weight(problem.site)).abs()
    mask = kept != 0
    assert int(mask.sum()) == change.numel() - int(0.6 * change.numel())
    assert torch.allclose(kept[mask], change[mask])
    assert relative[mask].min() > relative[~mask].max()


def test_keeping_everything_changes_nothing(session, problem):
    update = LowRank(problem.residual, problem.keys)
    assert Rect(Rect.Options(keep=1.0)).stabilize_update(session, problem.site, update, problem) is update


def test_a_change_of_a_zero_weight_counts_as_largest_and_an_unchanged_one_as_smallest():
    session = FakeSession((2, 5))
    site = session.sites[0]
    session.weights[site] = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]] * 2).double()
    change = torch.tensor([[1e-9, 3.0, 2.0, 1.0, 0.0]] * 2).double()
    kept = Rect().stabilize_update(session, site, Dense(change), Problem(site, change.T, change)).dense()
    assert_close(kept, torch.tensor([[1e-9, 3.0, 0.0, 0.0, 0.0]] * 2).double())


def test_keep_is_a_share():
    with pytest.raises(OptionError, match="keep"):
        build(Rect.Options, {"keep": 0}, owner="rect")
