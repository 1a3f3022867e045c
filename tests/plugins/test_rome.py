import pytest
import torch

from editcli.errors import NumericalError
from editcli_rome.editor import Rome
from tests.support.facts import requests_of
from tests.support.sessions import SHAPES, FakeSession, assert_close, write_batch


@pytest.fixture(params=SHAPES, ids=["wide", "tall", "square"])
def session(request):
    """A run with this editor edits one site."""
    return FakeSession(request.param, sites=1)


def test_one_edit_equals_the_rank_one_formula(session):
    editor = Rome()
    editor.prepare(session)
    for number in range(5):
        written = write_batch(session, editor, requests_of(f"b{number}", 1))
        [(site, problem)] = written.problems.items()
        keys = problem.keys.double()
        image = torch.linalg.inv(session.second_moment(site)) @ keys
        assert_close(written.updates[site].dense(), problem.residual.double() @ image.T / (keys.T @ image))


def test_a_batch_is_written_exactly_and_no_update_that_does_so_disturbs_less(session):
    editor = Rome()
    editor.prepare(session)
    written = write_batch(session, editor, requests_of("b", 3))
    [(site, problem)] = written.problems.items()
    keys, change, moment = problem.keys.double(), written.updates[site].dense().double(), session.second_moment(site)
    assert_close(change @ keys, problem.residual)
    basis = torch.linalg.qr(keys).Q
    other = session.random("other", size=session.shape)
    other = change + other - other @ basis @ basis.T
    assert_close(other @ keys, problem.residual)
    assert torch.trace(change @ moment @ change.T) < torch.trace(other @ moment @ other.T)


def test_two_edits_with_one_key_are_refused():
    session = FakeSession((6, 11), sites=1)
    editor = Rome()
    editor.prepare(session)
    with pytest.raises(NumericalError, match="--batch-size 1") as caught:
        write_batch(session, editor, requests_of("b", 1) * 2)
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
