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
    monkeypatch.setattr(Moments, "counting", lambda self, columns, **_: Moments(1, columns[:, 0], 0 * columns[:, 0]))
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


def test_a_whitened_stream_equals_stableedits_update(session):
    """The reference keeps every gradient it ever saw and takes the covariance of them all."""
    (rows, size), alpha = session.shape, 10.0
    editor = UltraEdit(UltraEdit.Options(lr=RATE, whiten=True, alpha=alpha))
    editor.prepare(session)
    features, whitened = {site: [] for site in session.sites}, 0
    for number in range(5):
        batch = requests_of(f"b{number}", 4)
        measured = session.gradients(batch)
        written = write_batch(session, editor, batch)
        for site in session.sites:
            seen = measured.sites[site]
            features[site].append(torch.cat([seen.inputs, seen.gradients]))
            past, now = torch.cat(features[site], dim=1), features[site][-1]
            normal = (now - past.mean(1, keepdim=True)) / past.std(1, keepdim=True)
            gradient, count = normal[size:], past.shape[1]
            if count > rows + 1:
                centred = past[size:] - past[size:].mean(1, keepdim=True)
                values, vectors = torch.linalg.eigh(centred @ centred.T / (count - rows - 1))
                root = vectors @ torch.diag(values.clamp_min(1e-6 * float(values[-1])).rsqrt()) @ vectors.T
                gradient, whitened = root @ (now[size:] - past[size:].mean(1, keepdim=True)), whitened + 1
            K, V = seen.inputs, -RATE * normal[:size].square().sum(0) * gradient
            system = K @ K.T + alpha * torch.eye(size, dtype=torch.float64)
            assert_close(written.updates[site].dense(), (torch.linalg.inv(system) @ K @ V.T).T, 1e-5)
    # The first batch of a tall weight has too few positions; every later one is whitened.
    assert whitened == (15 if rows < 7 else 12)


def test_the_state_of_a_whitening_stream_has_the_scatter(session):
    editor, other = (UltraEdit(UltraEdit.Options(whiten=True)) for _ in range(2))
    write_batch(session, editor, requests_of("a", 3))
    other.load_state(session, editor.state())
    assert torch.equal(other.moments[session.sites[0].module].scatter, editor.moments[session.sites[0].module].scatter)
    with pytest.raises(StateError, match=r"has no .*scatter"):
        UltraEdit(UltraEdit.Options(whiten=True)).load_state(
            session, State({k: v for k, v in editor.state().tensors.items() if "scatter" not in k})
        )
