import pytest
import torch

from editcli.errors import OptionError, StateError
from editcli.plugin.interfaces import Problem, State
from editcli.plugin.options import build
from editcli.testing import same_state, through_bytes
from editcli_alphaedit.editor import AlphaEdit
from tests.support.facts import requests_of
from tests.support.sessions import Witness, assert_close, write_batch


def projector(moment, threshold=2e-2):
    values, vectors = torch.linalg.eigh(moment)
    null = vectors[:, values < threshold]
    return null @ null.T


def test_a_stream_of_batches_equals_the_published_update(session):
    """Earlier keys enter as they are after each batch was written, not as they were when it was solved."""
    editor = AlphaEdit(AlphaEdit.Options(l2=10.0))
    size = session.shape[1]
    projectors = {site: projector(session.second_moment(site)) for site in session.sites}
    past = {site: torch.zeros(size, size, dtype=torch.float64) for site in session.sites}
    editor.prepare(session)
    for number in range(5):
        batch = requests_of(f"b{number}", 4)
        written = write_batch(session, editor, batch, [witness := Witness()])
        for site, problem in written.problems.items():
            P, H, K, R = projectors[site], past[site], problem.keys.double(), problem.residual.double()
            system = P @ (K @ K.T + H) + 10.0 * torch.eye(size, dtype=torch.float64)
            expected = (torch.linalg.inv(system) @ P @ K @ R.T).T
            assert_close(witness.updates[site].dense(), expected, 1e-8)
            assert_close(written.updates[site].dense(), expected)
        for site in session.sites:
            keys = session.keys(batch, site).float().double()
            past[site] = past[site] + keys @ keys.T


def test_updates_stay_in_the_range_of_the_projector(session):
    editor = AlphaEdit()
    projectors = {site: projector(session.second_moment(site)) for site in session.sites}
    editor.prepare(session)
    for number in range(20):
        for site, update in write_batch(session, editor, requests_of(f"b{number}", 3)).updates.items():
            assert_close(update.dense().double() @ projectors[site], update.dense())


def test_rank_is_recorded_and_survives_a_resume(session):
    editor, other = AlphaEdit(), AlphaEdit()
    editor.prepare(session)
    state = editor.state()
    other.load_state(session, through_bytes(state))
    assert same_state(state, other.state())
    # Earlier versions saved the ranks as tensors.
    earlier = {f"{site.module}.rank": torch.tensor(session.small) for site in session.sites}
    other.load_state(session, State({**state.tensors, **earlier}))
    expected = {"rank": session.small, "share": session.small / session.shape[1]}
    assert other.record() == {"nullspace": {site.module: expected for site in session.sites}}


def test_relative_threshold_does_not_depend_on_the_scale(session, monkeypatch):
    options = AlphaEdit.Options(threshold_kind="relative", nullspace_threshold=0.01)
    plain, scaled = AlphaEdit(options), AlphaEdit(options)
    plain.prepare(session)
    moment = session.second_moment
    monkeypatch.setattr(session, "second_moment", lambda site: 1e6 * moment(site))
    scaled.prepare(session)
    assert plain.ranks == scaled.ranks == {site.module: session.small for site in session.sites}


@pytest.mark.parametrize("share", [0.2, 0.4, 0.7])
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_a_share_of_the_directions_keeps_exactly_so_many(session, monkeypatch, share, scale):
    """Neither the scale of the keys nor one direction that holds nearly all of the trace changes the number."""
    moment, size = session.second_moment, session.shape[1]
    massive = torch.zeros(size, size, dtype=torch.float64)
    massive[0, 0] = 1e5
    monkeypatch.setattr(session, "second_moment", lambda site: scale * (moment(site) + massive))
    editor = AlphaEdit(AlphaEdit.Options(threshold_kind="directions", nullspace_threshold=share))
    editor.prepare(session)
    for site in session.sites:
        kept = round(share * size)
        assert editor.ranks[site.module] == kept
        assert int(torch.linalg.matrix_rank(editor.memory[site.module].matrix)) == kept
        # These are the least used ones: C is zero on the others.
        used = torch.linalg.eigh(session.second_moment(site))[1][:, kept:]
        assert float((editor.memory[site.module].matrix @ used).norm()) < 1e-9


def test_a_cut_at_the_median_halves_the_directions_at_any_scale(session, monkeypatch):
    moment, size = session.second_moment, session.shape[1]
    for scale in (1.0, 1e6):
        monkeypatch.setattr(session, "second_moment", lambda site, scale=scale: scale * moment(site))
        for times in (1.0, 1.0001):
            editor = AlphaEdit(AlphaEdit.Options(threshold_kind="median", nullspace_threshold=times))
            editor.prepare(session)
            # Torch's median is the lower of two middle values.
            assert set(editor.ranks.values()) == {(size - 1) // 2 + (times > 1)}


def test_relative_l2_does_not_depend_on_the_scale_of_the_keys(session, monkeypatch):
    options = AlphaEdit.Options(threshold_kind="relative", nullspace_threshold=0.01, l2=0.5, l2_kind="relative")
    plain, scaled, site = AlphaEdit(options), AlphaEdit(options), session.sites[0]
    plain.prepare(session)
    moment = session.second_moment
    monkeypatch.setattr(session, "second_moment", lambda site: 100 * moment(site))
    scaled.prepare(session)
    keys, residual = session.random("k", size=(session.shape[1], 3)), session.random("r", size=(session.shape[0], 3))
    once, again = (
        e.solve(session, Problem(site, k, residual)).dense() for e, k in ((plain, keys), (scaled, 10 * keys))
    )
    assert_close(10 * again, once)


@pytest.mark.parametrize(("threshold", "change"), [(1e-9, "raise"), (1e9, "lower")])
def test_no_rank_and_full_rank_say_what_to_change(session, threshold, change):
    with pytest.raises(OptionError, match=rf"nullspace_threshold.*{change}.*directions"):
        AlphaEdit(AlphaEdit.Options(nullspace_threshold=threshold)).prepare(session)


LEAK = {"leak": 300.0, "l2": 10.0}


def test_a_leaking_stream_equals_betaedits_update(session):
    """D^T = (P (K K^T + H + l1 C) + l2 I)^-1 P K R^T, with the null space of the unedited model."""
    editor, size = AlphaEdit(AlphaEdit.Options(**LEAK)), session.shape[1]
    past = {site: torch.zeros(size, size, dtype=torch.float64) for site in session.sites}
    editor.prepare(session)
    for number in range(4):
        batch = requests_of(f"b{number}", 4)
        written = write_batch(session, editor, batch, [witness := Witness()])
        for site, problem in written.problems.items():
            C, H, K, R = session.second_moment(site), past[site], problem.keys.double(), problem.residual.double()
            P = projector(C)
            system = P @ (K @ K.T + H + 300.0 * C) + 10.0 * torch.eye(size, dtype=torch.float64)
            # Remembered keys are those of the record, in single precision.
            assert_close(witness.updates[site].dense(), (torch.linalg.inv(system) @ P @ K @ R.T).T, 1e-6)
        for site in session.sites:
            keys = session.keys(batch, site)
            past[site] = past[site] + keys @ keys.T


def test_a_refreshed_null_space_is_that_of_reference_text_and_edits_together(session):
    """P anew from (H / n + l1 C) / (1 + l1) once 6 edits were written, and every earlier key is in the balance."""
    editor, size = AlphaEdit(AlphaEdit.Options(**LEAK, refresh=6)), session.shape[1]
    past = {site: torch.zeros(size, size, dtype=torch.float64) for site in session.sites}
    editor.prepare(session)
    projectors = {site: projector(session.second_moment(site)) for site in session.sites}
    for number in range(4):
        batch = requests_of(f"b{number}", 4)
        written = write_batch(session, editor, batch, [witness := Witness()])
        for site, problem in written.problems.items():
            C, H, K, R = session.second_moment(site), past[site], problem.keys.double(), problem.residual.double()
            P = projectors[site]
            system = P @ (K @ K.T + H + 300.0 * C) @ P + 10.0 * torch.eye(size, dtype=torch.float64)
            expected = (torch.linalg.inv(system) @ P @ K @ R.T).T
            assert_close(witness.updates[site].dense(), expected, 1e-6)
        for site in session.sites:
            keys = session.keys(batch, site)
            past[site] = past[site] + keys @ keys.T
            done = 4 * (number + 1)
            if done // 6 > (done - 4) // 6:
                projectors[site] = projector((past[site] / done + 300.0 * session.second_moment(site)) / 301.0)
    ranks = {site.module: round(float(projectors[site].trace())) for site in session.sites}
    assert editor.ranks == ranks
    assert editor.edits == 16


def test_a_refreshing_stream_continues_from_its_state(session):
    options = AlphaEdit.Options(**LEAK, refresh=2)
    editor, other = AlphaEdit(options), AlphaEdit(options)
    editor.prepare(session)
    write_batch(session, editor, requests_of("a", 3))
    saved = through_bytes(editor.state())
    other.load_state(session, saved)
    assert same_state(other.state(), saved)
    with pytest.raises(StateError, match=r"has no .*past"):
        other.load_state(session, State({k: v for k, v in saved.tensors.items() if "past" not in k}, saved.json))


def test_a_share_of_the_width_is_the_relative_leak(session):
    size, site = session.shape[1], session.sites[0]
    relative = AlphaEdit(AlphaEdit.Options(leak=0.5, leak_kind="relative"))
    absolute = AlphaEdit(AlphaEdit.Options(leak=0.5 * size))
    assert torch.equal(relative.initial_inverse(session, site), absolute.initial_inverse(session, site))


@pytest.mark.parametrize(
    "options", [{"refresh": 5}, {"leak": -1}, {"l2": 0}, {"threshold_kind": "directions", "nullspace_threshold": 1}]
)
def test_unusable_options_are_refused(options):
    with pytest.raises(OptionError, match="alphaedit"):
        build(AlphaEdit.Options, options, owner="alphaedit")


def test_a_null_space_that_has_gone_stays_as_it_was(session):
    """The batch after which it would be found again is written by then."""
    editor = AlphaEdit(AlphaEdit.Options(leak=1e-3, refresh=60))
    editor.prepare(session)
    ranks = dict(editor.ranks)
    write_batch(session, editor, requests_of("b", 60))
    assert editor.ranks == ranks
    assert any("null space" in warning for warning in session.reporter.warnings)
