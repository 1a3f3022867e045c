import pytest
import torch

from editcli.errors import OptionError
from editcli.plugin.options import build
from editcli_locft.editor import LocFt
from tests.support.facts import requests_of
from tests.support.sessions import assert_close, write_batch


def adam(session, batch, order, *, lr, stop_loss=0.0, direction=lambda site, gradient: gradient):
    """The changes after mini-batches of ``order``, on targets with their end: Kingma and Ba's algorithm 1."""
    start = {site: session.weight(site).double() for site in session.sites}
    changes, means, squares = ({s: torch.zeros_like(w) for s, w in start.items()} for _ in range(3))
    step = 0
    for columns in order:
        trial = {site: start[site] + change for site, change in changes.items()}
        measured = session.gradients([batch[c] for c in columns], positions="all", trial=trial, ended=True)
        if float(measured.loss.mean()) < stop_loss:
            continue
        step += 1
        for site in session.sites:
            slope = measured.sites[site].gradients @ measured.sites[site].inputs.T / len(columns)
            slope = direction(site, slope.double())
            means[site] = 0.9 * means[site] + 0.1 * slope
            squares[site] = 0.999 * squares[site] + 0.001 * slope**2
            root = (squares[site] / (1 - 0.999**step)).sqrt().clamp_min(1e-300)
            rate = lr * float(start[site].norm()) / start[site].numel() ** 0.5
            changes[site] = changes[site] - rate * means[site] / (1 - 0.9**step) / root
    return changes


def test_a_batch_is_trained_breadth_first(session):
    """Every epoch sees all edits before any is seen again, in mini-batches of an order of its own."""
    batch, options = requests_of("b", 5), LocFt.Options(epochs=4, mini_batch=2, stop_loss=-1.0)
    torch.manual_seed(3)
    orders = [torch.randperm(5).tolist() for _ in range(4)]
    assert len(set(map(tuple, orders))) > 1
    order = [epoch[start : start + 2] for epoch in orders for start in (0, 2, 4)]
    expected = adam(session, batch, order, lr=options.lr)
    torch.manual_seed(3)
    write_batch(session, LocFt(options), batch)
    for site in session.sites:
        assert_close(session.change(site), expected[site], 1e-5)


def test_a_batch_that_fits_into_one_mini_batch_is_trained_whole(session):
    batch, options = requests_of("b", 3), LocFt.Options(epochs=6, stop_loss=-1.0)
    expected = adam(session, batch, [range(3)] * 6, lr=options.lr)
    write_batch(session, LocFt(options), batch)
    for site in session.sites:
        assert_close(session.change(site), expected[site], 1e-5)


def test_a_mini_batch_whose_loss_is_low_takes_no_step(session):
    batch = requests_of("b", 4)
    losses = session.gradients(batch, positions="all", ended=True).loss
    editor = LocFt(LocFt.Options(epochs=1, mini_batch=4, stop_loss=float(losses.mean()) * 1.01))
    written = write_batch(session, editor, batch)
    assert all(update.norm() == 0 for update in written.updates.values())
    assert written.already_true == tuple(request.id for request in batch)


def test_the_loss_of_all_edits_falls(session):
    batch = requests_of("b", 6)
    before = session.gradients(batch, positions="all", ended=True).loss
    write_batch(session, LocFt(LocFt.Options(mini_batch=2)), batch)
    assert float(session.gradients(batch, positions="all", ended=True).loss.sum()) < 0.5 * float(before.sum())


def test_unusable_options_are_refused():
    with pytest.raises(OptionError, match="mini_batch"):
        build(LocFt.Options, {"mini_batch": 0}, owner="locft")
