import pytest
import torch

from editcli.errors import StateError
from editcli.plugin.interfaces import State
from editcli.testing import same_state, through_bytes
from editcli_evoedit.editor import EvoEdit
from tests.plugins.test_alphaedit import projector
from tests.support.facts import requests_of
from tests.support.sessions import Witness, assert_close, write_batch

L2 = 10.0


def ready(session, **options):
    editor = EvoEdit(EvoEdit.Options(l2=L2, **options))
    editor.prepare(session)
    return editor


def test_a_stream_of_batches_equals_the_published_update(session):
    editor = ready(session)
    P = {site: projector(session.second_moment(site)) for site in session.sites}
    for number in range(2):
        written = write_batch(session, editor, requests_of(f"b{number}", 1), [witness := Witness()])
        for site, problem in written.problems.items():
            K, R = problem.keys.double(), problem.residual.double()
            system = K.T @ P[site] @ K + L2 * torch.eye(1).double()
            assert_close(witness.updates[site].dense(), R @ torch.linalg.inv(system) @ (P[site] @ K).T, 1e-6)
            U, values, _ = torch.linalg.svd(P[site] @ K, full_matrices=False)
            assert float(values.min()) > 1e-3
            P[site] = P[site] - U @ U.T
    for site in session.sites:
        assert_close(editor.memory[site.module].matrix, P[site], 1e-5)


def test_an_earlier_key_is_never_disturbed(session):
    """D k = 0 for every key that was written before, up to the single precision of the record."""
    editor, keys = ready(session), {site: [] for site in session.sites}
    for number in range(2):
        written = write_batch(session, editor, requests_of(f"b{number}", 1))
        for site, problem in written.problems.items():
            for old in keys[site]:
                left = written.updates[site].dense().double() @ old
                assert float(left.norm()) <= 1e-5 * written.updates[site].norm() * float(old.norm())
            keys[site].append(problem.keys.double())


def test_every_edit_uses_up_a_direction_until_none_is_left(session):
    editor, first = ready(session), session.small
    for number in range(first + 2):
        written = write_batch(session, editor, requests_of(f"b{number}", 1))
        left = {site["rank"] for site in editor.record()["nullspace"].values()}
        assert left == {max(first - number - 1, 0)}
    for site, problem in written.problems.items():
        assert written.updates[site].norm() <= 1e-4 * float(problem.residual.norm())


def test_the_same_key_twice_takes_one_direction(session):
    editor, batch = ready(session), requests_of("b", 1)
    write_batch(session, editor, [batch[0], batch[0]])
    site = session.sites[0]
    assert editor.record()["nullspace"][site.module]["rank"] == session.small - 1


def test_its_state_is_the_null_space_and_its_weight(session):
    editor, other = ready(session), EvoEdit(EvoEdit.Options(l2=L2))
    write_batch(session, editor, requests_of("a", 2))
    saved = through_bytes(editor.state())
    other.load_state(session, saved)
    assert same_state(other.state(), saved)
    assert other.record() == editor.record()
    with pytest.raises(StateError, match="l2"):
        other.load_state(session, State(saved.tensors, {}))
