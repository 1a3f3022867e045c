import pytest
import torch

from editcli.errors import OptionError
from editcli.plugin.finetuning import Descent
from editcli.plugin.options import build
from editcli_ft.editor import FineTuning
from tests.support.facts import requests_of
from tests.support.sessions import assert_close, write_batch


def mean_loss(session, batch):
    return float(session.gradients(batch, positions="all").loss.mean())


def test_a_batch_descends_in_every_site_and_writes_nothing_before_its_turn(session):
    batch, editor = requests_of("b", 3), FineTuning(FineTuning.Options(norm_bound=1.0, lr=0.02))
    before, weights = mean_loss(session, batch), dict(session.weights)
    editor.begin(session, batch)
    assert all(session.weights[site] is weights[site] for site in session.sites)
    written = write_batch(session, editor, batch)
    assert mean_loss(session, batch) < 0.5 * before
    assert all(written.updates[site].norm() > 0 for site in session.sites)


@pytest.mark.parametrize("bound", [0.01, 0.05])
def test_no_site_changes_by_more_than_its_bound(session, bound):
    editor = FineTuning(FineTuning.Options(norm_bound=bound, lr=0.5))
    for number in range(3):
        weights = dict(session.weights)
        for site, update in write_batch(session, editor, requests_of(f"b{number}", 3)).updates.items():
            assert 0 < update.norm() <= bound * float(weights[site].norm()) * (1 + 1e-6)


def test_the_change_equals_adam_with_projection(session):
    """The reference is Kingma and Ba's algorithm 1 in float64, without its guard, projected after every step."""
    batch, options = requests_of("b", 3), FineTuning.Options(steps=7, norm_bound=0.05)
    start = {site: session.weight(site).double() for site in session.sites}
    changes = {site: torch.zeros_like(start[site], dtype=torch.float64) for site in session.sites}
    means, squares = (
        {site: torch.zeros_like(changes[site]) for site in session.sites},
        {site: torch.zeros_like(changes[site]) for site in session.sites},
    )
    for step in range(1, 8):
        trial = {site: start[site] + change for site, change in changes.items()}
        measured = session.gradients(batch, positions="all", trial=trial)
        for site in session.sites:
            gradient = (measured.sites[site].gradients @ measured.sites[site].inputs.T / 3).double()
            means[site] = 0.9 * means[site] + 0.1 * gradient
            squares[site] = 0.999 * squares[site] + 0.001 * gradient**2
            root = (squares[site] / (1 - 0.999**step)).sqrt().clamp_min(1e-300)
            norm = float(start[site].norm())
            rate = options.lr * norm / start[site].numel() ** 0.5
            change = changes[site] - rate * means[site] / (1 - 0.9**step) / root
            changes[site] = change * min(1.0, 0.05 * norm / float(change.norm()))
    write_batch(session, FineTuning(options), batch)
    for site in session.sites:
        assert_close(session.change(site), changes[site], 1e-5)


def test_a_batch_that_holds_already_changes_nothing(session):
    editor = FineTuning(FineTuning.Options(stop_loss=1e9))
    batch = requests_of("b", 2)
    written = write_batch(session, editor, batch)
    assert all(written.updates[site].norm() == 0 for site in session.sites)
    assert written.already_true == ("b-0", "b-1")


def test_an_edit_is_already_true_by_its_loss_before_the_first_step(session):
    batch = requests_of("b", 3)
    losses = session.gradients(batch, positions="all").loss
    editor = FineTuning(FineTuning.Options(steps=2, stop_loss=float(losses.min()) * 1.001))
    assert write_batch(session, editor, batch).already_true == (batch[int(losses.argmin())].id,)


def test_it_has_no_values_and_no_state(session):
    editor = FineTuning()
    editor.begin(session, requests_of("b", 2))
    assert not editor.needs_values
    assert not any(editor.state())


def test_unusable_options_are_refused():
    with pytest.raises(OptionError, match="norm_bound"):
        build(FineTuning.Options, {"norm_bound": 0}, owner="ft")


def test_the_scale_of_the_gradients_does_not_matter():
    """Adam's own guard is absolute: at gradients of 1e-20 it would all but stop the descent."""
    weight, gradient = torch.randn(6, 5), torch.randn(6, 5)
    plain, tiny = (Descent(weight, lr=0.01) for _ in range(2))
    for _ in range(3):
        plain.step(gradient)
        tiny.step(gradient * 1e-20)
    assert float(plain.change.norm()) > 0
    assert_close(tiny.change, plain.change, 1e-5)
