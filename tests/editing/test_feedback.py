"""Error feedback: what a stabilizer takes from one batch is given to the next (arXiv 2605.26670, Algorithm 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from editcli.editing import feedback
from editcli.editing.pipeline import lost_again
from editcli.errors import OptionError, StateError
from editcli.plugin.interfaces import Dense, Editor, Problem, Site, Stabilizer, State, Update, Values
from editcli.plugin.options import build
from editcli.testing import StabilizerContract
from editcli_clip.stabilizer import Clip
from editcli_ft.editor import FineTuning
from editcli_memit.editor import Memit
from editcli_nas.stabilizer import Nas
from editcli_prune.stabilizer import Prune
from editcli_rect.stabilizer import Rect
from editcli_revive.stabilizer import Revive
from tests.support.facts import requests_of
from tests.support.sessions import SHAPES, FakeSession, assert_close, write_batch


class Labyrinth(Stabilizer):
    """Carries out Algorithm 1 beside a run in float64, in the form with M, from the keys and residuals of each batch.

    It stands where the run's stabilizer does and keeps the update that the algorithm writes there.
    """

    name, reference = "labyrinth", "arXiv:2605.26670"

    def __init__(self, change: Callable[[Site, Tensor, Tensor], Tensor], gram: Callable[[Site], Tensor]):
        super().__init__()
        self.change, self.gram = change, gram
        self.error: dict[Site, Tensor] = {}
        self.history: dict[Site, Tensor] = {}
        self.updates: dict[Site, Tensor] = {}

    def stabilize_update(self, session: Any, site: Site, update: Update, problem: Problem | None) -> Update:
        assert problem is not None
        keys, residual = problem.keys.double(), problem.residual.double()
        before = self.history.get(site, self.gram(site))
        system = before + keys @ keys.T
        right = residual @ keys.T - self.error.get(site, torch.zeros_like(residual @ keys.T))
        solved = right @ torch.linalg.inv(system)
        self.updates[site] = self.change(site, session.weight(site).double(), solved)
        self.error[site], self.history[site] = (self.updates[site] - solved) @ system, system
        return Dense(self.updates[site])


def rect(session: FakeSession) -> Callable[[Site, Tensor, Tensor], Tensor]:
    def largest(site: Site, weight: Tensor, change: Tensor) -> Tensor:
        relative = (change / weight).abs().flatten()
        keep = relative.numel() - int(0.6 * relative.numel())
        mask = torch.zeros_like(relative, dtype=torch.bool)
        mask[relative.topk(keep).indices] = True
        return change.where(mask.view_as(change), 0.0)

    return largest


def clip(session: FakeSession) -> Callable[[Site, Tensor, Tensor], Tensor]:
    def bounded(site: Site, weight: Tensor, change: Tensor) -> Tensor:
        whole, bound = weight + change, 1.05 * session.baseline(site).double().norm() * (1 - 1e-6)
        return whole * min(1.0, float(bound / whole.norm())) - weight

    return bounded


def prune(session: FakeSession) -> Callable[[Site, Tensor, Tensor], Tensor]:
    def restrained(site: Site, weight: Tensor, change: Tensor) -> Tensor:
        base = session.baseline(site).double()
        left, values, right = torch.linalg.svd(weight + change - base, full_matrices=False)
        most = torch.linalg.matrix_norm(base, 2)
        return base + left * torch.where(values > most, (values / most).log() + most, values) @ right - weight

    return restrained


KINDS = {
    "rect": (Rect, {"feedback": True}, rect),
    "clip": (Clip, {"rho": 1.05, "feedback": True}, clip),
    "prune": (Prune, {"when": "batch", "feedback": True}, prune),
}


def made(kind: str) -> tuple[Any, Any]:
    component, options, reference = KINDS[kind]
    return component(build(component.Options, options, owner=kind)), reference


@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "tall", "square"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_stream_is_that_of_algorithm_1(kind: str, shape: tuple[int, int]) -> None:
    session, reference = FakeSession(shape), FakeSession(shape)
    stabilizer, change = made(kind)
    weight = 0.5
    editors = [Memit(Memit.Options(mom2_update_weight=weight, remember=True)) for _ in range(2)]
    labyrinth = Labyrinth(change(reference), lambda site: weight * reference.second_moment(site))
    for one, editor in zip((session, reference), editors, strict=True):
        editor.prepare(one)
    for number in range(5):
        batch = requests_of(f"b{number}", 3)
        write_batch(session, editors[0], batch, [stabilizer])
        write_batch(reference, editors[1], batch, [labyrinth])
        for site in session.sites:
            assert_close(session.change(site), reference.change(site), 2e-5)


def test_what_is_lost_does_not_add_up() -> None:
    """Given back, the loss of a batch reaches the model later; otherwise every batch leaves its own behind."""
    gaps = []
    for options in ({}, {"feedback": True}):
        session, whole = FakeSession((6, 11)), FakeSession((6, 11))
        editors = [Memit(Memit.Options(mom2_update_weight=0.5, remember=True)) for _ in range(2)]
        stabilizer = Rect(Rect.Options(keep=0.5, **options))
        for one, editor in zip((session, whole), editors, strict=True):
            editor.prepare(one)
        for number in range(12):
            batch = requests_of(f"b{number}", 3)
            write_batch(session, editors[0], batch, [stabilizer])
            write_batch(whole, editors[1], batch)
        gaps.append(sum(float((session.weight(s) - whole.weight(s)).norm()) for s in session.sites))
    assert gaps[1] < 0.5 * gaps[0]


def test_only_what_a_stabilizer_with_feedback_took_is_given_back() -> None:
    """REVIVE beside it projects, and would take again what it took; so its part is no loss."""
    session, editor = FakeSession((6, 11)), Memit(Memit.Options(mom2_update_weight=0.5))
    stabilizers: Sequence[Stabilizer] = (Revive(), Rect(Rect.Options(feedback=True)))
    editor.prepare(session)
    for one in stabilizers:
        one.prepare(session)
    written = write_batch(session, editor, requests_of("b", 3), stabilizers)
    for site in session.sites:
        filtered = stabilizers[0].stabilize_update(
            session, site, editor.solve(session, written.problems[site]), written.problems[site]
        )
        lost = written.updates[site].dense().double() - filtered.dense().double()
        assert set(written.lost[site]) == {"rect"}
        assert_close(stabilizers[1].lost[site.module], lost, 1e-5)
    assert not Revive().feeds_back


def test_an_editor_without_targets_writes_its_update_and_what_was_lost() -> None:
    session, editor, stabilizer = FakeSession((6, 11)), FineTuning(), Rect(Rect.Options(feedback=True))
    write_batch(session, editor, requests_of("first", 3), [stabilizer])
    before, lost = session.masters(), dict(stabilizer.lost)
    write_batch(session, editor, requests_of("second", 3), [stabilizer])
    twin = FakeSession((6, 11))
    twin.restore(before)
    editor.begin(twin, requests_of("second", 3))
    for site in session.sites:
        asked = editor.update(twin, site).dense().double() - lost[site.module].double()
        mask = (session.weight(site) - before[site]) != 0
        assert_close((session.weight(site) - before[site])[mask], asked[mask].float(), 1e-4)


def test_a_batch_that_asks_for_nothing_keeps_the_loss(tmp_path: Any) -> None:
    class Content(Memit):
        """Finds every target answered already."""

        def values(self, session: Any, requests: Any) -> Values:
            zeros = torch.zeros(session.shape[0], len(requests), dtype=torch.float64)
            return Values(zeros, zeros, zeros, {}, torch.zeros(len(requests)))

    session, stabilizer = FakeSession((6, 11)), Rect(Rect.Options(feedback=True))
    editor, content = Memit(), Content()
    editor.prepare(session)
    content.prepare(session)
    write_batch(session, editor, requests_of("b", 3), [stabilizer])
    before, lost = session.masters(), dict(stabilizer.lost)
    written = write_batch(session, content, requests_of("idle", 3), [stabilizer])
    assert all(torch.equal(session.weight(site), before[site]) for site in session.sites)
    assert all(torch.equal(stabilizer.lost[module], part) for module, part in lost.items())
    for site in session.sites:
        again = lost_again(session, content, [stabilizer], site, written.problems[site], written.updates[site])  # type: ignore[arg-type]
        assert again == {}


class TestRectWithFeedback(StabilizerContract):
    component, options = Rect, {"feedback": True}


class TestPruneWithFeedback(StabilizerContract):
    component, options = Prune, {"when": "batch", "feedback": True}


def test_a_refused_batch_leaves_the_loss_as_it_was() -> None:
    session, editor, stabilizer = FakeSession((6, 11)), Memit(), Rect(Rect.Options(feedback=True))
    editor.prepare(session)
    write_batch(session, editor, requests_of("b", 3), [stabilizer])
    before = dict(stabilizer.lost)

    class Refuses(Stabilizer):
        def stabilize_update(self, session: Any, site: Site, update: Update, problem: Problem | None) -> Update:
            if site == session.sites[-1]:
                raise StateError("refused")
            return update

    with pytest.raises(StateError):
        write_batch(session, editor, requests_of("c", 3), [stabilizer, Refuses()])
    assert stabilizer.lost == before


@pytest.mark.parametrize("change", [lambda lost: lost[:-1], lambda lost: lost.int()])
def test_a_saved_loss_that_does_not_fit_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    session, editor, stabilizer = FakeSession((6, 11)), Memit(), Rect(Rect.Options(feedback=True))
    editor.prepare(session)
    write_batch(session, editor, requests_of("b", 3), [stabilizer])
    name, lost = next(iter(stabilizer.state().tensors.items()))
    with pytest.raises(StateError, match=session.sites[0].module):
        Rect(Rect.Options(feedback=True)).load_state(session, State({name: change(lost)}))


def test_prune_at_the_end_has_no_batch_to_give_to() -> None:
    with pytest.raises(OptionError, match="when=batch"):
        build(Prune.Options, {"feedback": True}, owner="prune")
    assert not Nas().feeds_back
    assert dataclasses.asdict(Rect.Options())["feedback"] is False
    assert feedback.owed([Rect()], Site(0, "mlp", False)) is None
    assert issubclass(FineTuning, Editor)
