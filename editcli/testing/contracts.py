"""What every editor and stabilizer has to hold, as test classes that a plugin author inherits from.

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
from safetensors.torch import load, save
from torch import Tensor

from editcli.editing.pipeline import Written, commit, edit_batch
from editcli.editing.session import ModelSession, PilotSource
from editcli.editing.targets import TargetOptions
from editcli.edits import EditRequest
from editcli.interfaces import Editor, Problem, Session, Site, Stabilizer, Update, Values
from editcli.models.loading import open_model, resolve_model
from editcli.options import build, describe

SUBJECTS = ("Paris", "Rome", "Berlin", "Tokyo", "Ann", "Bob", "France", "Italy", "Spain")


class Contract:
    """What editors and stabilizers have in common; set :attr:`component`, and :attr:`options` where defaults fail."""

    component: ClassVar[type[Any]]
    options: ClassVar[Mapping[str, Any]] = {}
    family: ClassVar[str] = "llama"

    def make(self) -> Any:
        """Build the component with :attr:`options`."""
        return self.component(build(self.component.Options, self.options, owner=self.component.name))

    def test_it_names_itself_and_its_source(self) -> None:
        assert self.component.name.isidentifier()
        assert self.component.name == self.component.name.lower()
        assert self.component.reference
        assert self.component.__doc__

    def test_options_are_frozen_and_explained(self) -> None:
        assert self.component.Options.__dataclass_params__.frozen
        assert all(row["help"] for row in describe(self.component.Options))
        assert dataclasses.asdict(self.component.Options()) == dataclasses.asdict(self.component.Options())

    def test_a_resumed_stream_equals_an_unbroken_one(self, tmp_path: Path) -> None:
        """Two batches, a snapshot through bytes, a third batch: the same weights, bit by bit, as three batches."""
        unbroken, broken = self.session(tmp_path), self.session(tmp_path)
        whole, first, second = self.make(), self.make(), self.make()
        for session, component in ((unbroken, whole), (broken, first)):
            component.prepare(session)
            for number in range(2):
                self.apply(session, component, requests(number))
        before_first_write = self.session(tmp_path)
        second.load_state_dict(through_bytes(first.state_dict()), before_first_write)
        self.apply(unbroken, whole, requests(2))
        self.apply(broken, second, requests(2))
        for site in unbroken.sites:
            assert torch.equal(unbroken.weight(site), broken.weight(site)), site.module
        again = through_bytes(second.state_dict())
        assert all(torch.equal(again[name], tensor.cpu()) for name, tensor in whole.state_dict().items())

    def session(self, folder: Path) -> ModelSession:
        """Open a session on a tiny model, with second moments of its own."""
        raise AssertionError("a contract derives from EditorContract or StabilizerContract")

    def apply(self, session: ModelSession, component: Any, batch: Sequence[EditRequest]) -> Written:
        """Write one batch with the component."""
        raise AssertionError("a contract derives from EditorContract or StabilizerContract")


class EditorContract(Contract):
    """What every editor has to hold."""

    def session(self, folder: Path) -> ModelSession:
        layers = (1,) if self.component.single_site else (0, 1)
        return tiny_session(folder, self.family, layers=layers)

    def apply(self, session: ModelSession, component: Any, batch: Sequence[EditRequest]) -> Written:
        written = edit_batch(session, component, (), batch, lambda *_: None)
        commit(session, component, (), batch, written)
        return written

    def test_every_site_gets_a_finite_update_of_its_shape(self, tmp_path: Path) -> None:
        session, editor = self.session(tmp_path), self.make()
        editor.prepare(session)
        written = self.apply(session, editor, requests(0))
        for site in session.sites:
            update, weight = written.updates[site], session.weight(site)
            assert (update.left.shape[0], update.right.shape[0]) == tuple(weight.shape)
            assert 0 < update.norm() < float("inf")
            assert not torch.equal(weight, session.baseline(site))

    def test_only_remember_advances_the_state(self, tmp_path: Path) -> None:
        session, editor = self.session(tmp_path), self.make()
        editor.prepare(session)
        before = through_bytes(editor.state_dict())
        edit_batch(session, editor, (), requests(0), lambda *_: None)
        after = editor.state_dict()
        assert set(after) == set(before)
        assert all(torch.equal(before[name], tensor.cpu()) for name, tensor in after.items())


class StabilizerContract(Contract):
    """What every stabilizer has to hold; it is tested on the updates of :class:`PlainEditor`."""

    def session(self, folder: Path) -> ModelSession:
        return tiny_session(folder, self.family, layers=(0, 1))

    def apply(self, session: ModelSession, component: Any, batch: Sequence[EditRequest]) -> Written:
        return edit_batch(session, PlainEditor(), [component], batch, lambda *_: None)

    def test_it_maps_each_type_to_itself_and_changes_nothing_in_place(self, tmp_path: Path) -> None:
        session, stabilizer = self.session(tmp_path), self.make()
        stabilizer.prepare(session)
        values = session.values(requests(0))
        parts = (values.target, values.initial, values.written)
        copies = [part.clone() for part in parts]
        stable = stabilizer.stabilize_values(values, session)
        assert isinstance(stable, Values)
        assert stable.target.shape == values.target.shape
        assert all(torch.equal(before, part) for before, part in zip(copies, parts, strict=True))
        for site in session.sites:
            self._check_update(session, stabilizer, site)
            self._check_weight(session, stabilizer, site)

    def _check_update(self, session: Session, stabilizer: Stabilizer, site: Site) -> None:
        rows, columns = session.weight(site).shape
        update = Update(torch.ones(rows, 2).tril(), torch.arange(2.0 * columns).reshape(columns, 2))
        problem = Problem(site, update.right, update.left)
        left, right = update.left.clone(), update.right.clone()
        stable = stabilizer.stabilize_update(update, problem, session)
        assert isinstance(stable, Update)
        assert tuple(stable.dense().shape) == (rows, columns)
        assert torch.isfinite(stable.dense()).all()
        assert torch.equal(update.left, left)
        assert torch.equal(update.right, right)

    def _check_weight(self, session: Session, stabilizer: Stabilizer, site: Site) -> None:
        weight = session.weight(site)
        given = 2 * weight
        out = stabilizer.stabilize_weight(given, site, session)
        assert out.shape == weight.shape
        assert torch.isfinite(out).all()
        assert torch.equal(given, 2 * weight)


class PlainEditor(Editor):
    """The simplest editor there is, to test stabilizers on: least squares with C = I."""

    name: ClassVar[str] = "plain"
    reference: ClassVar[str] = "ridge regression"

    def solve(self, problem: Problem) -> Update:
        keys = problem.keys.double()
        system = keys.T @ keys + torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device)
        return Update(problem.residual.double() @ torch.linalg.inv(system), keys)


def tiny_session(folder: Path, family: str = "llama", *, layers: Sequence[int] = (0, 1)) -> ModelSession:
    """Open a session on a tiny random model in ``folder``, with made-up second moments and three pilot edits."""
    from editcli.testing import tiny_model_folder

    path = folder / family
    if not path.exists():
        tiny_model_folder(path, family)
    loaded = open_model(resolve_model(path), device="cpu")
    options = TargetOptions(steps=3, prefixes=1, prefix_tokens=2)

    def moment(site: Site) -> Tensor:
        size = session.weight(site).shape[1]
        generator = torch.Generator().manual_seed(site.layer)
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        return (basis * torch.logspace(-3, 0, size, dtype=torch.float64)) @ basis.T

    pilots = PilotSource(tuple(requests(9)), "made for tests")
    session = ModelSession(loaded, layers, options=options, second_moment=moment, pilots=pilots)
    return session


def requests(number: int) -> list[EditRequest]:
    """Return the three edits of batch ``number``."""
    subjects = [SUBJECTS[(3 * number + offset) % len(SUBJECTS)] for offset in range(3)]
    return [EditRequest(f"{number}-{s}", "The city of ", s, " is in", "Greece") for s in subjects]


def through_bytes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take tensors through the file format in which snapshots are kept."""
    return load(save({name: tensor.cpu().contiguous() for name, tensor in state.items()}))
