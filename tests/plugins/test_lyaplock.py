import pytest
import torch

from editcli.errors import OptionError, StateError
from editcli.plugin.interfaces import State
from editcli.plugin.options import build
from editcli.testing import same_state, through_bytes
from editcli_lyaplock.editor import LyapLock
from tests.support.facts import requests_of
from tests.support.sessions import Witness, assert_close, write_batch

W, ALPHA, V = 5.0, 1.5, 2.0


def ready(session, **options):
    editor = LyapLock(LyapLock.Options(mom2_update_weight=W, alpha=ALPHA, v=V, **options))
    editor.prepare(session)
    return editor


def test_a_stream_of_batches_equals_the_published_update(session):
    """The first batch by its own formula, the later ones with the queue, written out with inverses."""
    editor = ready(session)
    S = {site: session.second_moment(site) for site in session.sites}
    past = {site: (torch.zeros(session.shape).double(), torch.zeros_like(S[site])) for site in session.sites}
    p0, Z = dict.fromkeys(session.sites), dict.fromkeys(session.sites)
    for number in range(5):
        before = {site: session.weight(site).double() for site in session.sites}
        written = write_batch(session, editor, requests_of(f"b{number}", 3), [witness := Witness()])
        for site, problem in written.problems.items():
            K, R, weight = problem.keys.double(), problem.residual.double(), before[site]
            drift, (H_vk, H_kk) = session.baseline(site).double() - weight, past[site]
            if number == 0:
                # V weighs the edits here as well; the paper's V is 1.
                top, bottom = V * R @ K.T + W * drift @ S[site], V * K @ K.T + W * S[site]
            else:
                a = 1 / (ALPHA * p0[site]) ** 0.5
                top = V * R @ K.T + a * Z[site] * W * drift @ S[site] + V * (H_vk - weight @ H_kk)
                bottom = V * K @ K.T + a * Z[site] * W * S[site] + V * H_kk
            assert_close(witness.updates[site].dense(), top @ torch.linalg.inv(bottom), 1e-8)
            change = session.change(site)
            loss = float((change @ S[site] @ change.T).trace())
            if number == 0:
                p0[site], Z[site] = loss, (ALPHA * loss) ** 0.5
            else:
                least = (ALPHA * p0[site]) ** 0.5
                Z[site] = max(Z[site] + (loss - ALPHA * p0[site]) / least, least)
            now = session.weight(site).double()
            past[site] = (H_vk + (now @ K) @ K.T, H_kk + K @ K.T)
    grown = editor.record()["anchor"]
    for site in session.sites:
        assert grown[site.module] == pytest.approx(Z[site] / (ALPHA * p0[site]) ** 0.5)
        assert grown[site.module] > 1


def test_the_anchor_grows_only_once_too_much_is_lost(session):
    """A looser budget leaves the anchor at its first weight, a tight one raises it."""
    loose, tight = LyapLock(LyapLock.Options(alpha=1e6)), LyapLock(LyapLock.Options(alpha=1e-3))
    for editor in (loose, tight):
        editor.prepare(session)
        session.restore(dict(session.base))
        for number in range(3):
            write_batch(session, editor, requests_of(f"b{number}", 3))
    assert set(loose.record()["anchor"].values()) == {1.0}
    assert all(factor > 10 for factor in tight.record()["anchor"].values())


def test_its_state_is_what_was_reached_and_the_queue(session):
    editor, other = ready(session), LyapLock(LyapLock.Options(mom2_update_weight=W))
    for number in range(2):
        write_batch(session, editor, requests_of(f"b{number}", 3))
    saved = through_bytes(editor.state())
    other.load_state(session, saved)
    assert same_state(other.state(), saved)
    with pytest.raises(StateError, match="lyaplock"):
        other.load_state(session, State({}, saved.json))


def test_unusable_options_are_refused():
    with pytest.raises(OptionError, match="alpha"):
        build(LyapLock.Options, {"alpha": 0}, owner="lyaplock")
