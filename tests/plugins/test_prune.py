import pytest
import torch

from editcli_prune.stabilizer import Prune
from tests.support.sessions import assert_close


def with_values(session, site, values):
    """A weight whose change from the baseline has the given singular values."""
    count = len(values)
    left = torch.linalg.qr(session.random("u", size=(session.shape[0], count))).Q
    right = torch.linalg.qr(session.random("v", size=(session.shape[1], count))).Q
    values = torch.tensor(values, dtype=torch.float64)
    return session.baseline(site) + left * values @ right.T, left, right


def test_only_values_above_the_weights_own_are_compressed(session):
    site, prune = session.sites[0], Prune()
    limit = float(torch.linalg.matrix_norm(session.baseline(site), 2))
    weight, left, right = with_values(session, site, [7 * limit, 2 * limit, 0.9 * limit, 0.1 * limit])
    out = prune.stabilize_weight(session, site, weight)
    logs = torch.tensor([7.0, 2.0]).double().log() + limit
    expected = torch.cat([logs, torch.tensor([0.9, 0.1], dtype=torch.float64) * limit])
    assert_close(out - session.baseline(site), left * expected @ right.T)
    assert prune.record() == {"restrained": {site.module: 2}}


def test_a_moderate_change_is_left_alone(session):
    site, prune = session.sites[0], Prune()
    weight = session.baseline(site) + 0.01 * session.random("d", size=session.shape)
    assert prune.stabilize_weight(session, site, weight) is weight
    assert prune.record() == {"restrained": {site.module: 0}}


def test_it_acts_on_the_total_change_and_not_on_a_batch(session):
    """Ten batches that are each below the limit add up to a change above it; that total is what is compressed."""
    site, prune = session.sites[0], Prune()
    limit = float(torch.linalg.matrix_norm(session.baseline(site), 2))
    weight, left, right = with_values(session, site, [5 * limit])
    step = (weight - session.baseline(site)) / 10
    total = session.baseline(site)
    for _ in range(10):
        assert float(torch.linalg.matrix_norm(step, 2)) < limit
        total = total + step
    out = prune.stabilize_weight(session, site, total)
    assert_close(out - session.baseline(site), (torch.tensor(5.0).double().log() + limit) * left @ right.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_values_above_the_limit(session, dtype):
    site, prune = session.sites[0], Prune()
    limit = float(torch.linalg.matrix_norm(session.baseline(site), 2))
    weight, _, _ = with_values(session, site, [9 * limit + i for i in range(min(session.shape))])
    out = prune.stabilize_weight(session, site, weight.to(dtype))
    assert out.dtype == dtype
    assert float(torch.linalg.matrix_norm(out.double() - session.baseline(site), 2)) < limit + 4
