import pytest
import torch

from editcli.errors import OptionError
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
    """The reference is torch's own Adam on the same loss, projected after every step."""
    batch, options = requests_of("b", 3), FineTuning.Options(steps=7, norm_bound=0.05)
    start = {site: session.weight(site).double() for site in session.sites}
    parameters = {site: start[site].clone() for site in session.sites}
    optimisers = {
        site: torch.optim.Adam(
            [parameter], lr=options.lr * float(parameter.norm()) / parameter.numel() ** 0.5, eps=1e-12
        )
        for site, parameter in parameters.items()
    }
    for _ in range(7):
        found = session.gradients(batch, positions="all", trial={s: p.clone() for s, p in parameters.items()})
        for site, parameter in parameters.items():
            parameter.grad = found.sites[site].gradients @ found.sites[site].inputs.T / 3
            optimisers[site].step()
            change, bound = parameter - start[site], 0.05 * start[site].norm()
            parameter.copy_(start[site] + change * min(1.0, float(bound / change.norm())))
    write_batch(session, FineTuning(options), batch)
    for site in session.sites:
        assert_close(session.change(site), parameters[site] - start[site], 1e-5)


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
