"""The key k of every token at a layer: what the edited matrix W acts on, so that W k joins the stream.

Of a dense MLP that is what enters its last map. A shared expert's output may be scaled by a gate, sigmoid(s), and its
key is then scaled by the same number. Of the routed experts it is all their keys side by side, each times its gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from editcli.models.architectures import Architecture
from editcli.models.experts import mixture_key
from editcli.models.forward import hooked, hooked_call
from editcli.models.sharded import whole_input


@contextmanager
def read_keys(
    architecture: Architecture, layer: int, record: Callable[[Tensor], None], *, stop: bool = False
) -> Iterator[None]:
    """Call ``record`` with the keys of a pass, (..., d_in); with ``stop`` the pass ends there."""
    projection, gate = architecture.projection(layer), architecture.shared_gate(layer)
    if architecture.edits_experts(layer):
        with hooked_call(projection, lambda owner, args: record(mixture_key(owner, *args)), stop=stop):
            yield
    elif gate is not None:
        with _gated(projection, gate, record, stop=stop):
            yield
    else:
        with hooked(projection, lambda owner, entered, output: record(whole_input(owner, entered)), stop=stop):
            yield


@contextmanager
def _gated(projection: nn.Module, gate: nn.Module, record: Callable[[Tensor], None], *, stop: bool) -> Iterator[None]:
    """Read a shared expert's keys, which its block scales after it ran."""
    entering: list[Tensor] = []

    def enter(owner: Any, entered: Tensor, output: Any) -> None:
        entering.append(whole_input(owner, entered))

    def scale(owner: Any, entered: Tensor, output: Tensor) -> None:
        keys = entering.pop()
        record(keys * output.sigmoid().reshape(*keys.shape[:-1], 1))

    with hooked(projection, enter), hooked(gate, scale, stop=stop):
        yield
