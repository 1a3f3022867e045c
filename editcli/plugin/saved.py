"""Take the state of a component back from a snapshot, which somebody else may have written.

A component declares the shape, type and range of every tensor and field as it reads it. What does not fit is one
:class:`StateError` that names the component and the tensor or field. This module never imports torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from editcli.errors import StateError
from editcli.storage.conversion import UnreadableError, convert

if TYPE_CHECKING:
    from torch import Tensor

    from editcli.plugin.interfaces import State

T = TypeVar("T")

FLOATS = ("float32", "float64")
"""Types of the numbers that components compute with."""
WHOLE = ("int32", "int64")
"""Types of counts."""
_ADVICE = "restore the run from a backup, or start a new run"


def misfit(tensor: Tensor, shape: Sequence[int | None], types: Collection[str] | None = None) -> str | None:
    """Return a clause that says why a tensor is not finite numbers of ``shape``; None where it is.

    A size of None fits any. Without ``types``, every floating-point type fits.
    """
    fits = tensor.ndim == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    name = str(tensor.dtype).removeprefix("torch.")
    typed = tensor.is_floating_point() if types is None else name in types
    if not (fits and typed):
        sizes = " x ".join("n" if size is None else str(size) for size in shape) or "one number"
        kind = "numbers" if types is None else " or ".join(types)
        return f"is {name} {tuple(tensor.shape)} in place of {kind} ({sizes})"
    return None if bool(tensor.isfinite().all()) else "holds numbers that are not finite"


@dataclass(frozen=True, slots=True)
class SavedState:
    """The state of the component ``owner``, checked as it is read.

    Every method raises :class:`StateError` where something is missing or does not fit.
    """

    owner: str
    """Name of the component."""
    state: State
    """What ``load_state`` was given."""

    def __contains__(self, name: str) -> bool:
        """Tell whether there is a tensor of this name."""
        return name in self.state.tensors

    def tensor(
        self, name: str, shape: Sequence[int | None], *, types: Collection[str] = FLOATS, least: float | None = None
    ) -> Tensor:
        """Return a tensor of finite numbers of ``shape`` (None: any size) and one of ``types``, none below ``least``.

        Types are named as torch names them, without ``torch.``
        """
        tensor = self.state.tensors.get(name)
        if tensor is None:
            raise StateError(f"the saved state of {self.owner} has no {name}; {_ADVICE}")
        fault = misfit(tensor, shape, types)
        if fault is None and least is not None and not bool((tensor >= least).all()):
            fault = f"holds numbers below {least:g}"
        if fault is not None:
            raise self.refusal(f"{name} {fault}")
        return tensor

    def count(self, name: str) -> int:
        """Return a whole number of at least 0 that was saved as a tensor."""
        return int(self.tensor(name, (), types=WHOLE, least=0))

    def fields(self, kind: type[T]) -> T:
        """Return the JSON part as ``kind``: a dataclass, a mapping, a list or a plain type, down to the last value.

        A dataclass refuses values by raising ``ValueError`` in ``__post_init__``.
        """
        try:
            return convert(dict(self.state.json), kind)
        except UnreadableError as error:
            raise self.refusal(str(error)) from error

    def refusal(self, reason: str) -> StateError:
        """Return the error for a state that does not fit, with the ``reason`` as a clause."""
        return StateError(f"the saved state of {self.owner} does not fit ({reason}); {_ADVICE}")
