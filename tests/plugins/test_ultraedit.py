import pytest
import torch

from editcli.errors import OptionError, StateError
from editcli.plugin.interfaces import State
from editcli.plugin.options import build
from editcli.testing import same_state
from editcli_ultraedit.editor import UltraEdit
from editcli_ultraedit.moments import Moments

RATE = 0.01


def test_a_stream_of_batches_equals_the_published_update(session, edit_batch, make_requests, close):
    """The reference keeps every feature it ever saw and normalises by numpy-style mean and deviation."""
    editor, size = UltraEdit(UltraEdit.Options(lr=RATE)), session.shape[1]
    editor.prepare(session)
    features = {site: [] for site in session.sites}
    for number in range(5):
        batch = make_requests(f"b{number}", 4)
        measured = session.gradients(batch)
        for problem, update in edit_batch(session, editor, batch):
            seen = measured.sites[problem.site]
            features[problem.site].append(torch.cat([seen.inputs, seen.gradients]))
            past = torch.cat(features[problem.site], dim=1)
            normal = (features[problem.site][-1] - past.mean(1, keepdim=True)) / past.std(1, keepdim=True)
            K, V = seen.inputs, -RATE * normal[:size].square().sum(0) * normal[size:]
            system = K @ K.T + torch.eye(size, dtype=torch.float64)
            close(update.dense(), (torch.linalg.inv(system) @ K @ V.T).T)


def test_state_is_restored_bit_by_bit_and_the_stream_goes_on_the_same(
    fake_session, edit_batch, make_requests, through_bytes
):
    unbroken, broken = fake_session((6, 11)), fake_session((6, 11))
    editor, first, second = UltraEdit(), UltraEdit(), UltraEdit()
    edit_batch(unbroken, editor, make_requests("a", 3))
    edit_batch(broken, first, make_requests("a", 3))
    state = first.state()
    second.load_state(broken, through_bytes(state))
    assert set(state.tensors) == {f"{s.module}.{n}" for s in broken.sites for n in ("count", "mean", "squares")}
    assert same_state(state, second.state())
    edit_batch(unbroken, editor, make_requests("b", 3))
    edit_batch(broken, second, make_requests("b", 3))
    assert all(torch.equal(unbroken.weights[site], broken.weights[site]) for site in unbroken.sites)


def test_solving_a_batch_that_is_not_kept_leaves_no_trace(session, make_requests):
    editor, batch = UltraEdit(), make_requests("b", 3)
    editor.begin(session, batch)
    assert editor.update(session, session.sites[0]).norm() > 0
    assert not any(editor.state())


def test_a_state_saved_before_the_first_batch_is_empty_and_accepted(session):
    editor = UltraEdit()
    editor.load_state(session, UltraEdit().state())
    assert not any(editor.state())


def test_pilots_count_into_the_statistics(session):
    editor = UltraEdit(UltraEdit.Options(pilots=10))
    editor.prepare(session)
    assert all(moments.count == 20 for moments in editor.moments.values())


def test_a_single_position_says_what_to_do(session, make_requests, monkeypatch):
    monkeypatch.setattr(Moments, "counting", lambda self, columns: Moments(1, columns[:, 0], 0 * columns[:, 0]))
    editor, batch = UltraEdit(), make_requests("b", 1)
    editor.begin(session, batch)
    with pytest.raises(OptionError, match="--batch-size"):
        editor.update(session, session.sites[0])


def test_incomplete_state_is_refused(session):
    state = {f"{session.sites[0].module}.mean": torch.zeros(3)}
    with pytest.raises(StateError, match="incomplete"):
        UltraEdit().load_state(session, State(state))


def test_a_coordinate_that_never_varies_becomes_zero():
    columns = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]]).double()
    normal = Moments().counting(columns).normalise(columns)
    assert torch.equal(normal, torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]]).double())


def test_unusable_options_are_refused():
    with pytest.raises(OptionError, match="lr"):
        build(UltraEdit.Options, {"lr": 0}, owner="ultraedit")
