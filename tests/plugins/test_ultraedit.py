import pytest
import torch

from editcli.errors import OptionError, StateError
from editcli.plugin.interfaces import State
from editcli.plugin.options import build
from editcli_ultraedit.editor import UltraEdit
from editcli_ultraedit.moments import Moments
from tests.support.facts import requests_of
from tests.support.sessions import assert_close, write_batch

RATE = 0.01


def test_a_stream_of_batches_equals_the_published_update(session):
    """The reference keeps every feature it ever saw and normalises by numpy-style mean and deviation."""
    editor, size = UltraEdit(UltraEdit.Options(lr=RATE)), session.shape[1]
    editor.prepare(session)
    features = {site: [] for site in session.sites}
    for number in range(5):
        batch = requests_of(f"b{number}", 4)
        measured = session.gradients(batch)
        written = write_batch(session, editor, batch)
        for site in session.sites:
            seen = measured.sites[site]
            features[site].append(torch.cat([seen.inputs, seen.gradients]))
            past = torch.cat(features[site], dim=1)
            normal = (features[site][-1] - past.mean(1, keepdim=True)) / past.std(1, keepdim=True)
            K, V = seen.inputs, -RATE * normal[:size].square().sum(0) * normal[size:]
            system = K @ K.T + torch.eye(size, dtype=torch.float64)
            assert_close(written.updates[site].dense(), (torch.linalg.inv(system) @ K @ V.T).T)


def test_its_state_counts_what_it_saw(session):
    """The names are read from run folders that exist already."""
    editor = UltraEdit()
    write_batch(session, editor, requests_of("a", 3))
    state = editor.state().tensors
    assert set(state) == {f"{s.module}.{n}" for s in session.sites for n in ("count", "mean", "squares")}
    assert all(state[f"{site.module}.count"] == 6 for site in session.sites)


def test_a_state_saved_before_the_first_batch_is_empty_and_accepted(session):
    editor = UltraEdit()
    editor.load_state(session, UltraEdit().state())
    assert not any(editor.state())


def test_pilots_count_into_the_statistics(session):
    editor = UltraEdit(UltraEdit.Options(pilots=10))
    editor.prepare(session)
    assert all(moments.count == 20 for moments in editor.moments.values())


def test_a_single_position_says_what_to_do(session, monkeypatch):
    monkeypatch.setattr(Moments, "counting", lambda self, columns: Moments(1, columns[:, 0], 0 * columns[:, 0]))
    editor, batch = UltraEdit(), requests_of("b", 1)
    editor.begin(session, batch)
    with pytest.raises(OptionError, match="--batch-size"):
        editor.update(session, session.sites[0])


def test_incomplete_state_is_refused(session):
    state = {f"{session.sites[0].module}.mean": torch.zeros(3)}
    with pytest.raises(StateError, match=r"ultraedit .*\.mean is float32 \(3,\) in place of float64"):
        UltraEdit().load_state(session, State(state))


def test_a_coordinate_that_never_varies_becomes_zero():
    columns = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]]).double()
    normal = Moments().counting(columns).normalise(columns)
    assert torch.equal(normal, torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]]).double())


def test_unusable_options_are_refused():
    with pytest.raises(OptionError, match="lr"):
        build(UltraEdit.Options, {"lr": 0}, owner="ultraedit")
