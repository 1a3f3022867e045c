from dataclasses import replace

import pytest
import torch

from editcli.editing.pipeline import edit_batch
from editcli.errors import OptionError
from editcli.plugin.options import build
from editcli.testing import tiny_requests, tiny_session
from editcli_nse.editor import Nse
from tests.support.facts import requests_of
from tests.support.sessions import FakeSession, Witness, assert_close, write_batch

W, MET, LOST = 5.0, 0.12, 4.0


def ready(session, **options):
    chosen = {"mom2_update_weight": W, "met": MET, "lost": LOST, "bounds_kind": "relative", **options}
    editor = Nse(Nse.Options(**chosen))
    editor.prepare(session)
    return editor


def passes_of(session, batch, history, most):
    """Write a batch pass by pass with explicit inverses; return the weights and the edits that each pass wrote."""
    values, chosen, first = session.values(batch), [], None
    # The weights of before come back at the end.
    with session.under({}):
        for _ in range(most):
            distance = (values.target - session.output(batch)).norm(dim=0)
            first = distance if first is None else first
            unmet = (distance > MET * first) & (distance < LOST * first)
            if chosen and not unmet.any():
                break
            chosen.append(unmet.tolist())
            for site in session.sites:
                K, R = session.keys(batch, site), session.residual(batch, site, values) * unmet
                gram = W * session.second_moment(site) + history[site] + K @ K.T
                session.weights[site] = session.weights[site] + (R @ K.T @ torch.linalg.inv(gram)).float()
        weights = dict(session.weights)
    return weights, chosen


def test_a_stream_of_batches_equals_the_passes_written_one_after_the_other(session):
    """Also the memory: H has the keys as they are once all passes are written."""
    editor = ready(session, passes=3)
    history = {site: torch.zeros(session.shape[1], session.shape[1]).double() for site in session.sites}
    subsets = []
    for number in range(4):
        batch = requests_of(f"b{number}", 3)
        expected, chosen = passes_of(session, batch, history, 3)
        written = write_batch(session, editor, batch, [Witness()])
        subsets += chosen[1:]
        for site in session.sites:
            assert_close(session.weight(site), expected[site], 1e-5)
            K = session.keys(batch, site)
            assert_close(written.problems[site].remembered, K)
            history[site] = history[site] + K @ K.T
    for site in session.sites:
        inverse = torch.linalg.inv(W * session.second_moment(site) + history[site])
        assert_close(editor.memory[site.module].matrix, inverse, 1e-5)
    assert subsets, "no batch took a second pass"
    assert any(len(set(subset)) == 2 for subset in subsets), "no pass wrote some of its edits only"


def test_one_pass_is_memit_with_history_on_targets_of_the_unedited_model(session):
    editor = ready(session, passes=1)
    batch = requests_of("b", 3)
    problem = write_batch(session, editor, batch, [witness := Witness()]).problems[session.sites[0]]
    K, R = problem.keys.double(), problem.residual.double()
    gram = W * session.second_moment(session.sites[0]) + K @ K.T
    assert_close(witness.updates[session.sites[0]].dense(), R @ K.T @ torch.linalg.inv(gram), 1e-8)


def test_targets_in_the_middle_of_a_stream_are_those_of_the_unedited_model(tmp_path):
    session, editor = tiny_session(tmp_path), ready(tiny_session(tmp_path))
    edit_batch(session, editor, (), tiny_requests(0), lambda *_: None)
    before = session.masters()
    values, fresh = editor.values(session, tiny_requests(1)), tiny_session(tmp_path).values(tiny_requests(1))
    assert torch.equal(values.target, fresh.target)
    assert not torch.equal(session.values(tiny_requests(1)).target, fresh.target)
    assert all(session.weight(site) is before[site] for site in session.sites)


def test_an_edit_that_is_lost_or_met_or_given_up_is_held_where_it_is(monkeypatch):
    """Absolute bounds: only the edit between them moves, and those outside are named."""
    session = FakeSession((6, 11), sites=1)
    (site,) = session.sites
    values, start = session.values(requests_of("b", 4)), session.output(requests_of("b", 4))
    target = start + torch.tensor([0.5, 10.0, 200.0, 10.0]) * start / start.norm(dim=0)
    asked = replace(values, target=target).drop({3: "given up"})
    monkeypatch.setattr(session, "values", lambda requests: asked)
    editor = ready(session, bounds_kind="absolute", met=2.5, lost=50.0, mom2_update_weight=1e-3)
    written = write_batch(session, editor, requests_of("b", 4))
    moved = (session.output(requests_of("b", 4)) - start).norm(dim=0)
    assert float(moved[1]) > 9
    assert float(moved[[0, 2, 3]].max()) < 0.1
    assert written.problems[site].remembered.shape[1] == 4
    assert [text for text in session.reporter.warnings if "nse.lost" in text and "'b-2'" in text]


def test_a_fact_that_the_unedited_model_knows_is_written_again_once_the_stream_lost_it(session, monkeypatch):
    """z = h on the unedited model: nothing to do at first, and everything once another batch moved h."""
    editor, batch = ready(session), requests_of("known", 2)
    plain = session.values

    def values(requests):
        found = plain(requests)
        if requests[0].id != "known-0":
            return found
        with session.under({}, unedited=True):
            at = session.output(requests)
        return replace(found, target=at, initial=at, reached=torch.ones(2).bool(), clamped=torch.zeros(2).bool())

    monkeypatch.setattr(session, "values", values)
    first = write_batch(session, editor, batch)
    assert first.already_true == ("known-0", "known-1")
    assert all(update.norm() == 0 for update in first.updates.values())
    write_batch(session, editor, requests_of("other", 3))
    again = write_batch(session, editor, batch)
    assert again.already_true == ()
    assert all(update.norm() > 0 for update in again.updates.values())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"passes": 0}, "passes"),
        ({"met": 60.0}, "less than lost"),
        ({"bounds_kind": "relative"}, "met must be below 1"),
        ({"mom2_update_weight": 0.0}, "mom2_update_weight"),
    ],
)
def test_unusable_options_are_refused(options, named):
    with pytest.raises(OptionError, match=named):
        build(Nse.Options, options, owner="nse")
