"""The components of a run: calibrated together, saved together, given back together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from editcli.editing.session import ModelSession
from editcli.interfaces import Component, Diagnostic, Editor, Stabilizer


@dataclass(frozen=True, slots=True)
class Stack:
    """The components of a run, in the order in which they act."""

    editor: Editor
    stabilizers: tuple[Stabilizer, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def parts(self) -> Mapping[str, Component]:
        """All components, by the name under which their state is saved."""
        steering = (self.editor, *self.stabilizers)
        named: dict[str, Component] = {f"component/{part.name}": part for part in steering}
        return {**named, **{f"diagnostic/{part.name}": part for part in self.diagnostics}}

    @property
    def remembering(self) -> tuple[Stabilizer, ...]:
        """The stabilizers whose state advances with every batch."""
        return tuple(part for part in self.stabilizers if type(part).remember is not Stabilizer.remember)

    @property
    def watching(self) -> tuple[Diagnostic, ...]:
        """The diagnostics whose figures depend on what they have seen before."""
        return tuple(part for part in self.diagnostics if type(part).state_dict is not Diagnostic.state_dict)

    @property
    def rebuilt(self) -> tuple[Component, ...]:
        """The components whose state an undo rebuilds batch by batch, from that of the unedited model."""
        return (self.editor, *self.remembering, *self.watching)

    def prepare(self, session: ModelSession) -> None:
        """Let every component measure the unedited model."""
        for part in self.parts.values():
            part.prepare(session)
        self.settle(session)
        session.forget_moments()

    def settle(self, session: ModelSession) -> None:
        """Have every component hold its state in the layout in which a resumed run will find it.

        Kernels round differently on a transposed matrix, so a stream that is resumed would part from one that was not.
        """
        for part in self.parts.values():
            state = part.state_dict()
            if not all(tensor.is_contiguous() for tensor in state.values()):
                part.load_state_dict({key: tensor.contiguous() for key, tensor in state.items()}, session)

    def state(self) -> dict[str, Tensor]:
        """Return the state of all components."""
        return {f"{name}/{key}": value for name, part in self.parts.items() for key, value in part.state_dict().items()}

    def load_state(
        self, tensors: Mapping[str, Tensor], session: ModelSession, *, afresh: Sequence[Component] = ()
    ) -> None:
        """Give every component its state back, on the unedited model; those in ``afresh`` are prepared instead."""
        for name, part in self.parts.items():
            prefix = f"{name}/"
            state = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            # A diagnostic that was installed after the snapshot has no state in it.
            if part in afresh or (isinstance(part, Diagnostic) and not state):
                part.prepare(session)
            else:
                part.load_state_dict(state, session)
        self.settle(session)
        session.forget_moments()
