import pytest
import torch

from editcli.errors import NumericalError
from editcli_rome.editor import Rome


def test_one_edit_equals_the_rank_one_formula(session, edit_batch, make_requests, close):
    editor = Rome()
    editor.prepare(session)
    for number in range(5):
        [(problem, update)] = edit_batch(session, editor, make_requests(f"b{number}", 1))
        assert problem.site == session.sites[-1]
        image = torch.linalg.inv(session.second_moment(problem.site)) @ problem.keys
        close(update.dense(), problem.residual @ image.T / (problem.keys.T @ image))


def test_a_batch_is_written_exactly_and_no_update_that_does_so_disturbs_less(session, edit_batch, make_requests, close):
    editor = Rome()
    editor.prepare(session)
    [(problem, update)] = edit_batch(session, editor, make_requests("b", 3))
    change, moment = update.dense(), session.second_moment(problem.site)
    close(change @ problem.keys, problem.residual)
    basis = torch.linalg.qr(problem.keys).Q
    other = session.random("other", size=session.shape)
    other = change + other - other @ basis @ basis.T
    close(other @ problem.keys, problem.residual)
    assert torch.trace(change @ moment @ change.T) < torch.trace(other @ moment @ other.T)


def test_two_edits_with_one_key_are_refused(fake_session, edit_batch, make_requests):
    session = fake_session((6, 11))
    editor = Rome()
    editor.prepare(session)
    with pytest.raises(NumericalError, match="--batch-size 1") as caught:
        edit_batch(session, editor, make_requests("b", 1) * 2)
    assert caught.value.site == session.sites[-1].module
    assert caught.value.condition is not None


def test_nas_has_the_guard_that_its_paper_uses_with_rome():
    """Published: 5 anchors with ROME, 2 otherwise; what the user sets wins."""
    from editcli.plugin.manager import load_plugins
    from editcli.presets.loader import all_presets
    from editcli.runs.planning import settings_for

    preset, plugins = all_presets()[0], load_plugins()
    assert settings_for("rome", preset, {}, plugins)["nas"]["guard"] == 5.0
    assert settings_for("rome", preset, {"nas": {"guard": 3.0}}, plugins)["nas"]["guard"] == 3.0
    assert "nas" not in settings_for("memit", preset, {}, plugins)
