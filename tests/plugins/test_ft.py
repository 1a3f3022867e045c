import pytest
import torch

from editcli.errors import OptionError
from editcli.plugin.options import build
from editcli_ft.editor import FineTuning


def mean_loss(session, batch):
    return float(session.gradients(batch, positions="all").loss.mean())


def test_a_batch_descends_in_every_site_and_writes_nothing_before_its_turn(session, edit_batch, make_requests):
    batch, editor = make_requests("b", 3), FineTuning(FineTuning.Options(norm_bound=1.0, lr=0.02))
    before, weights = mean_loss(session, batch), dict(session.weights)
    editor.begin(session, batch)
    assert all(session.weights[site] is weights[site] for site in session.sites)
    done = edit_batch(session, editor, batch)
    assert mean_loss(session, batch) < 0.5 * before
    assert all(update.norm() > 0 for _, update in done)


@pytest.mark.parametrize("bound", [0.01, 0.05])
def test_no_site_changes_by_more_than_its_bound(session, edit_batch, make_requests, bound):
    editor = FineTuning(FineTuning.Options(norm_bound=bound, lr=0.5))
    for number in range(3):
        weights = dict(session.weights)
        for problem, update in edit_batch(session, editor, make_requests(f"b{number}", 3)):
            assert update.norm() <= bound * float(weights[problem.site].norm()) * (1 + 1e-9)


def test_the_change_equals_adam_with_projection(session, edit_batch, make_requests, close):
    """The reference is torch's own Adam on the same loss, projected after every step."""
    batch, options = make_requests("b", 3), FineTuning.Options(steps=7, norm_bound=0.05)
    start = dict(session.weights)
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
    edit_batch(session, FineTuning(options), batch)
    for site in session.sites:
        close(session.weights[site] - start[site], parameters[site] - start[site], 1e-5)


def test_a_batch_that_holds_already_changes_nothing(session, edit_batch, make_requests):
    editor = FineTuning(FineTuning.Options(stop_loss=1e9))
    batch = make_requests("b", 2)
    assert all(update.norm() == 0 for _, update in edit_batch(session, editor, batch))
    assert list(editor.already_true(batch)) == [0, 1]


def test_an_edit_is_already_true_by_its_loss_before_the_first_step(session, edit_batch, make_requests):
    batch = make_requests("b", 3)
    losses = session.gradients(batch, positions="all").loss
    editor = FineTuning(FineTuning.Options(steps=2, stop_loss=float(losses.min()) * 1.001))
    edit_batch(session, editor, batch)
    assert list(editor.already_true(batch)) == [int(losses.argmin())]


def test_it_has_no_values_and_no_state(session, make_requests):
    editor = FineTuning()
    editor.begin(session, make_requests("b", 2))
    assert not editor.needs_values
    assert not any(editor.state())


def test_unusable_options_are_refused():
    with pytest.raises(OptionError, match="norm_bound"):
        build(FineTuning.Options, {"norm_bound": 0}, owner="ft")
