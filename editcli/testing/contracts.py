"""The contracts of editors and stabilizers, as test classes that a plugin author inherits from.

::

    from editcli.testing import EditorContract
    from my_plugin.editor import MyEditor

    class TestMyEditor(EditorContract):
        component = MyEditor

Each test edits a tiny real model the way ``editcli apply`` does. Import this through :mod:`editcli.testing`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from editcli.editing import feedback
from editcli.editing.pipeline import Written, commit, edit_batch, lost_again
from editcli.editing.session import ModelSession
from editcli.errors import EditError, OptionError, RequestError
from editcli.plugin.interfaces import Dense, LowRank, Problem, Session, Site, Stabilizer, Update, Values
from editcli.plugin.manager import load_plugins
from editcli.plugin.options import build, describe
from editcli.plugin.plain import plain
from editcli.plugin.wrapping import give_wrapped
from editcli.requests.schema import EditRequest
from editcli.runs.stream import UNFIT
from editcli.testing.listing import heavy_imports
from editcli.testing.misfits import changed_tensors, changed_values
from editcli.testing.sessions import (
    PlainEditor,
    ScaledGradients,
    same_state,
    same_tensors,
    through_bytes,
    tiny_problem,
    tiny_requests,
    tiny_session,
)

ORIENTATIONS = ("llama", "gpt2")
"""A family whose projections are stored as (d_out, d_in) and one that stores their transposes."""
EXPERT_ORIENTATIONS = ("mixtral", "gpt_oss")
"""The same of mixtures, for an editor of routed experts."""


class Contract:
    """The properties that all components must have; set :attr:`component`, and :attr:`options` where defaults fail."""

    component: ClassVar[type[Any]]
    options: ClassVar[Mapping[str, Any]] = {}
    family: ClassVar[str] = "llama"
    layers: ClassVar[Sequence[int]] = (0, 1)

    def make(self) -> Any:
        """Build the component with :attr:`options`, and the editor that it wraps with its defaults."""
        made = self.component(build(self.component.Options, self.options, owner=self.component.name))
        if getattr(made, "wraps", ""):
            give_wrapped(made, {}, load_plugins())
        return made

    def session(self, folder: Path, family: str | None = None) -> ModelSession:
        """Open a session on an unedited tiny model."""
        return tiny_session(folder, family or self.family, layers=self.layers)

    def ready(self, folder: Path, family: str | None = None) -> tuple[ModelSession, Any]:
        """Return a session and the component, prepared on it."""
        session, component = self.session(folder, family), self.make()
        component.prepare(session)
        return session, component

    def apply(self, session: ModelSession, component: Any, batch: Sequence[EditRequest]) -> Written:
        """Write one batch with the component and let it remember."""
        raise AssertionError("a contract derives from EditorContract, StabilizerContract or DiagnosticContract")

    def test_it_names_itself_and_its_source(self) -> None:
        assert self.component.name.isidentifier()
        assert self.component.name == self.component.name.lower()
        assert self.component.reference
        assert self.component.__doc__

    def test_options_are_frozen_and_explained(self) -> None:
        assert self.component.Options.__dataclass_params__.frozen
        assert all(row["help"] for row in describe(self.component.Options))

    def test_options_can_be_written_as_text(self) -> None:
        """The component gets the values of ``-o NAME.KEY=VALUE`` and of a settings file; a typing error is refused."""
        options = self.component.Options
        texts = {row["name"]: _as_text(row["default"]) for row in describe(options)}
        assert build(options, texts, owner=self.component.name) == options()
        chosen = self.make().options
        again = build(options, dataclasses.asdict(chosen), owner=self.component.name)
        assert again == chosen
        assert _raises(OptionError, lambda: build(options, {"no_such_option": "1"}, owner=self.component.name))

    def test_listing_it_does_not_import_torch(self) -> None:
        """Every command lists the plugins, so importing the module of one at the start must be quick."""
        assert heavy_imports(self.component.__module__) == []

    def test_what_it_records_is_finite_json(self, tmp_path: Path) -> None:
        """``run.json`` and the snapshot hold plain numbers and text: no NaN, no tensors, no scalars of numpy."""
        session, component = self.ready(tmp_path)
        faults: list[str] = []
        for number in range(2):
            plain(component.record(), faults)
            plain(component.state().json, faults)
            self.apply(session, component, tiny_requests(number))
        assert isinstance(component.record(), Mapping)
        assert faults == []

    def test_preparing_writes_nothing(self, tmp_path: Path) -> None:
        session, _ = self.ready(tmp_path)
        assert all(torch.equal(session.weight(site), session.baseline(site)) for site in session.sites)

    def test_the_same_edits_give_the_same_weights(self, tmp_path: Path) -> None:
        weights = []
        for noise in (1, 2):
            torch.manual_seed(noise)
            session, component = self.ready(tmp_path)
            # Each batch has random numbers of its own, which follow from the run's seed.
            torch.manual_seed(0)
            self.apply(session, component, tiny_requests(0))
            weights.append({site.module: weight for site, weight in session.masters().items()})
        assert same_tensors(*weights)

    def test_a_resumed_stream_equals_an_unbroken_one(self, tmp_path: Path) -> None:
        """Two batches, a snapshot through bytes, a third batch: the same weights, bit by bit, as three batches."""
        (unbroken, whole), (broken, first), second = self.ready(tmp_path), self.ready(tmp_path), self.make()
        for session, component in ((unbroken, whole), (broken, first)):
            for number in range(2):
                self.apply(session, component, tiny_requests(number))
        saved, before_first_write = through_bytes(first.state()), self.session(tmp_path)
        second.load_state(before_first_write, saved)
        assert same_state(second.state(), saved)
        self.apply(unbroken, whole, tiny_requests(2))
        self.apply(broken, second, tiny_requests(2))
        for site in unbroken.sites:
            assert torch.equal(unbroken.weight(site), broken.weight(site)), site.module
        assert same_state(second.state(), whole.state())

    def test_a_state_that_it_did_not_save_is_refused(self, tmp_path: Path) -> None:
        """A snapshot may come from a stranger: tensors must be there, of their shape and type, and finite."""
        session, component = self.ready(tmp_path)
        for number in range(2):
            self.apply(session, component, tiny_requests(number))
        saved, unedited = through_bytes(component.state()), self.session(tmp_path)
        refusals = (EditError, *UNFIT)
        for change, state in changed_tensors(saved):
            assert _raises(refusals, lambda state=state: self.make().load_state(unedited, state)), change
        for _, state in changed_values(saved):
            # Another value may be one that it might have saved; no other error may come of it.
            _raises(refusals, lambda state=state: self.make().load_state(unedited, state))

    def test_weights_are_edited_whichever_way_round_they_are_stored(self, tmp_path: Path) -> None:
        experts = getattr(self.component, "writes_experts", False)
        for family in EXPERT_ORIENTATIONS if experts else ORIENTATIONS:
            session, component = self.ready(tmp_path, family)
            written = self.apply(session, component, tiny_requests(0))
            for site in session.sites:
                update, weight = written.updates[site], session.weight(site)
                assert update.added_to(weight).shape == weight.shape, family
                assert torch.isfinite(weight).all(), family


class SteeringContract(Contract):
    """The common properties of editors and stabilizers: state that advances batch by batch, or never."""

    def replay(self, session: ModelSession, component: Any, batch: Sequence[EditRequest], written: Written) -> None:
        """Write a recorded batch again and let the component remember it, as an undo does."""
        raise AssertionError("a contract derives from EditorContract or StabilizerContract")

    def test_an_undo_can_rebuild_the_state(self, tmp_path: Path) -> None:
        """The state after a batch is that of a component that was prepared and told what was written."""
        (session, component), (rebuilt, other) = self.ready(tmp_path), self.ready(tmp_path)
        for number in range(2):
            written = self.apply(session, component, tiny_requests(number))
            self.replay(rebuilt, other, tiny_requests(number), written)
        assert same_state(through_bytes(other.state()), through_bytes(component.state()))

    def test_a_state_that_advances_is_declared(self, tmp_path: Path) -> None:
        """An undo rebuilds only the components that set ``remembers``."""
        session, component = self.ready(tmp_path)
        before = through_bytes(component.state())
        self.apply(session, component, tiny_requests(0))
        assert component.remembers or same_state(through_bytes(component.state()), before)


class EditorContract(SteeringContract):
    """The properties that every editor must have."""

    def session(self, folder: Path, family: str | None = None) -> ModelSession:
        layers = self.layers[-1:] if self.component.single_site else self.layers
        experts = self.component.writes_experts
        family = family or ("mixtral" if experts and self.family == "llama" else self.family)
        return tiny_session(folder, family, layers=layers, routed=experts)

    def apply(self, session: ModelSession, component: Any, batch: Sequence[EditRequest]) -> Written:
        written = edit_batch(session, component, (), batch, lambda *_: None)
        commit(session, component, (), batch, written)
        return written

    def replay(self, session: ModelSession, component: Any, batch: Sequence[EditRequest], written: Written) -> None:
        if not component.needs_values:
            component.begin(session, batch)
        for site, update in written.updates.items():
            session.write(site, update)
        component.remember(session, batch, list(written.problems.values()))

    def update(self, session: ModelSession, editor: Any, *, factor: float = 1.0) -> tuple[Problem | None, Update]:
        """Return the first site's problem and its update; ``factor`` scales the residual, or the gradients."""
        batch, site = tiny_requests(0), session.sites[0]
        if not editor.needs_values:
            scaled = ScaledGradients(session, factor)
            editor.begin(scaled, batch)
            return None, editor.update(scaled, site)
        problem = editor.problem(session, batch, site, editor.values(session, batch))
        problem = Problem(site, problem.keys, factor * problem.residual)
        return problem, editor.solve(session, problem)

    def test_every_site_gets_a_finite_update(self, tmp_path: Path) -> None:
        session, editor = self.ready(tmp_path)
        written = self.apply(session, editor, tiny_requests(0))
        for site in session.sites:
            assert 0 < written.updates[site].norm() < float("inf")
            assert not torch.equal(session.weight(site), session.baseline(site))

    def test_an_editor_that_needs_no_subject_writes_plain_questions(self, tmp_path: Path) -> None:
        session, editor = self.ready(tmp_path)
        questions = [dataclasses.replace(r, before=r.prompt, subject="", after="") for r in tiny_requests(0)]
        if self.component.needs_subject:
            # Whatever such an editor reads at a subject is refused, not read somewhere else.
            assert _raises(RequestError, lambda: session.keys(questions, session.sites[0]))
        else:
            written = self.apply(session, editor, questions)
            assert all(0 < written.updates[site].norm() < float("inf") for site in session.sites)

    def test_only_remember_advances_the_state(self, tmp_path: Path) -> None:
        session, editor = self.ready(tmp_path)
        before = through_bytes(editor.state())
        edit_batch(session, editor, (), tiny_requests(0), lambda *_: None)
        assert same_state(editor.state(), before)

    def test_solving_changes_nothing_and_can_be_repeated(self, tmp_path: Path) -> None:
        session, editor = self.ready(tmp_path)
        problem, first = self.update(session, editor)
        if problem is None:
            second = editor.update(session, session.sites[0])
        else:
            keys, residual = problem.keys.clone(), problem.residual.clone()
            second = editor.solve(session, problem)
            assert torch.equal(problem.keys, keys)
            assert torch.equal(problem.residual, residual)
        assert torch.equal(first.dense(), second.dense())
        assert all(torch.equal(session.weight(site), session.baseline(site)) for site in session.sites)

    def test_nothing_to_write_writes_nothing(self, tmp_path: Path) -> None:
        session, editor = self.ready(tmp_path)
        _, update = self.update(session, editor, factor=0.0)
        assert update.norm() == 0

    def test_the_update_points_towards_the_targets(self, tmp_path: Path) -> None:
        """To first order an update brings its batch nearer: D K leans towards R, or D against the loss's gradient."""
        session, editor = self.ready(tmp_path)
        problem, update = self.update(session, editor)
        if problem is None:
            seen = session.gradients(tiny_requests(0), positions="all").sites[session.sites[0]]
            slope = seen.gradients.double() @ seen.inputs.double().T
            assert float((update.dense().double() * slope).sum()) < 0
        else:
            written = update.dense().double() @ problem.keys.double()
            assert float((written * problem.residual.double()).sum()) > 0

    def test_what_is_not_finite_is_not_passed_off_as_a_number(self, tmp_path: Path) -> None:
        session, editor = self.ready(tmp_path)
        try:
            _, update = self.update(session, editor, factor=float("nan"))
        except EditError:
            return
        assert not torch.isfinite(update.dense()).all()


class StabilizerContract(SteeringContract):
    """The properties that every stabilizer must have; it is tested on the updates of :class:`PlainEditor`."""

    def apply(self, session: ModelSession, component: Any, batch: Sequence[EditRequest]) -> Written:
        written = edit_batch(session, PlainEditor(), [component], batch, lambda *_: None)
        commit(session, PlainEditor(), [component], batch, written)
        return written

    def replay(self, session: ModelSession, component: Any, batch: Sequence[EditRequest], written: Written) -> None:
        lost: dict[Site, feedback.Lost] = {}
        for site, update in written.updates.items():
            lost |= lost_again(session, PlainEditor(), [component], site, written.problems[site], update)
            session.write(site, update)
        component.remember(session, list(written.problems.values()), written.updates)
        feedback.keep([component], lost)

    def test_it_acts_on_what_it_declares(self) -> None:
        """A run warns of a stabilizer without effect by ``acts_on``, so it names every stage that is overridden."""
        stages = {"values": "stabilize_values", "updates": "stabilize_update", "weights": "stabilize_weight"}
        changed = {k for k, name in stages.items() if getattr(self.component, name) is not getattr(Stabilizer, name)}
        declared = set(self.component.acts_on)
        assert declared <= {*stages, "problems"}
        # Updates may be judged by their problem instead of by themselves.
        assert changed <= declared | ({"updates"} if "problems" in declared else set())

    def test_it_maps_each_type_to_itself_and_changes_nothing_in_place(self, tmp_path: Path) -> None:
        session, stabilizer = self.ready(tmp_path)
        values = session.values(tiny_requests(0))
        parts = (values.target, values.initial, values.written)
        copies = [part.clone() for part in parts]
        stable = stabilizer.stabilize_values(session, values)
        assert isinstance(stable, Values)
        assert stable.target.shape == values.target.shape
        assert all(torch.equal(before, part) for before, part in zip(copies, parts, strict=True))
        for site in session.sites:
            self._check_update(session, stabilizer, site)
            self._check_weight(session, stabilizer, site)

    def test_only_remember_advances_the_state(self, tmp_path: Path) -> None:
        """A batch that a guard refuses leaves no trace, and the next attempt at it is the same."""
        session, stabilizer = self.ready(tmp_path)
        before = through_bytes(stabilizer.state())
        first, second = (self._refused_batch(session, stabilizer) for _ in range(2))
        assert same_state(stabilizer.state(), before)
        assert same_tensors(first, second)

    def test_nothing_to_write_stays_nothing(self, tmp_path: Path) -> None:
        session, stabilizer = self.ready(tmp_path)
        for site in session.sites:
            problem = tiny_problem(session, site)
            update = LowRank(0 * problem.residual, problem.keys)
            for zero in (update, Dense(update.dense())):
                assert stabilizer.stabilize_update(session, site, zero, problem).norm() == 0

    def test_an_edit_that_failed_does_not_spoil_the_others(self, tmp_path: Path) -> None:
        session, stabilizer = self.ready(tmp_path)
        values = session.values(tiny_requests(0))
        whole = stabilizer.stabilize_values(session, values)
        target = values.target.clone()
        target[:, 1] = float("nan")
        stable = stabilizer.stabilize_values(session, dataclasses.replace(values, target=target))
        assert torch.equal(stable.target[:, [0, 2]], whole.target[:, [0, 2]])
        assert 1 in stable.dropped or not torch.isfinite(stable.target[:, 1]).any()
        # An edit that is given up is reported as such, so nothing of it may be written.
        for column in stable.dropped:
            assert torch.equal(stable.target[:, column], values.initial[:, column])

    def _refused_batch(self, session: ModelSession, stabilizer: Stabilizer) -> dict[str, torch.Tensor]:
        before = session.masters()
        torch.manual_seed(0)
        written = edit_batch(session, PlainEditor(), [stabilizer], tiny_requests(0), lambda *_: None)
        session.restore(before)
        return {site.module: update.dense() for site, update in written.updates.items()}

    def _check_update(self, session: Session, stabilizer: Stabilizer, site: Site) -> None:
        rows, columns = session.weight(site).shape
        factors = LowRank(torch.ones(rows, 2).tril(), torch.arange(2.0 * columns).reshape(columns, 2))
        problem = Problem(site, factors.right, factors.left)
        # An update may be dense, and an editor without target values has no problem.
        for update, known in ((factors, problem), (Dense(factors.dense()), problem), (factors, None)):
            before = {name: part.clone() for name, part in update.parts.items()}
            stable = stabilizer.stabilize_update(session, site, update, known)
            assert isinstance(stable, Update)
            assert tuple(stable.dense().shape) == (rows, columns)
            assert torch.isfinite(stable.dense()).all()
            assert same_tensors(update.parts, before)

    def _check_weight(self, session: Session, stabilizer: Stabilizer, site: Site) -> None:
        weight = session.weight(site)
        given = 2 * weight
        out = stabilizer.stabilize_weight(session, site, given)
        assert out.shape == weight.shape
        assert torch.isfinite(out).all()
        assert torch.equal(given, 2 * weight)


def _as_text(value: Any) -> str:
    return "none" if value is None else str(value)


def _raises(kind: type[Exception] | tuple[type[Exception], ...], action: Any) -> bool:
    """Tell whether ``action`` raises ``kind``; this module needs no test framework of its own."""
    try:
        action()
    except kind:
        return True
    return False
