"""Run a model and read or steer its hidden states, whatever family it is.

Hooks are put on modules by the caller, so nothing here knows a family's names. Decoder blocks return a tensor in some
versions of transformers and a tuple in others; both are accepted everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from editcli.models.tokens import Encoded

CPU_TOKENS = 1024
"""Most tokens of one pass on a CPU: a pass that exceeds its caches is slower, whatever the memory."""


class _Stop(Exception):
    """Ends a forward pass once every hook has run."""


def first(output: Any) -> Tensor:
    """Return the hidden states of a module's output, which may be a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_first(output: Any, hidden: Tensor) -> Any:
    """Return ``output`` with its hidden states replaced."""
    return (hidden, *output[1:]) if isinstance(output, (tuple, list)) else hidden


@contextmanager
def hooked(module: nn.Module, hook: Callable[[Any, Tensor, Any], Any], *, stop: bool = False) -> Iterator[None]:
    """Call ``hook(module, input, output)`` after the module ran; with ``stop`` end the forward pass there.

    The value that ``hook`` returns replaces the output unless it is None.
    """

    def after(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        entered = args[0] if args else next(iter(kwargs.values()))
        replaced = hook(owner, entered, output)
        if stop:
            raise _Stop
        return replaced

    handle = module.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def hooked_call(
    module: nn.Module, hook: Callable[[Any, tuple[Any, ...]], Any], *, stop: bool = False
) -> Iterator[None]:
    """Call ``hook(module, arguments)`` after a module of several arguments ran; with ``stop`` end the pass there."""

    def after(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hook(owner, (*args, *kwargs.values()))
        if stop:
            raise _Stop

    handle = module.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run ``forward`` instead of the module's own, for as long as the context lasts."""
    attribute = module.__dict__.get("forward")
    module.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        # An instance attribute set by accelerate must come back; otherwise the class's method shows again.
        if attribute is None:
            del module.forward
        else:
            module.forward = attribute


def run(model: nn.Module, ids: Tensor, **options: Any) -> Any:
    """Run the model, without a cache unless ``options`` ask for one; a pass that a hook ended returns None."""
    try:
        return model(input_ids=ids, **{"use_cache": False, **options})
    except _Stop:
        return None


@contextmanager
def head_only_at(head: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Make the model compute logits only at the positions (rows, columns), as (1, positions, vocabulary).

    Selecting in front of the head keeps the operations of a family after it (soft-capping, scaling).
    """

    def select(owner: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden[rows.to(hidden.device), columns.to(hidden.device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def chunks(rows: Sequence[Encoded], *, budget: int) -> Iterator[list[int]]:
    """Yield indices of rows, length-sorted, in groups whose padded size stays within ``budget`` tokens."""
    return batches([len(row.ids) for row in rows], budget=budget)


def batches(lengths: Sequence[int], *, budget: int) -> Iterator[list[int]]:
    """Yield indices of texts of these lengths, sorted, in groups whose padded size stays within ``budget`` tokens."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if group and lengths[index] * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def pass_tokens(budget: int, device: torch.device) -> int:
    """Return the most tokens of one forward pass on ``device``, at most ``budget``."""
    return min(budget, CPU_TOKENS) if device.type == "cpu" else budget


def positions(pairs: Sequence[tuple[int, int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return (rows, columns) index tensors."""
    table = torch.tensor(pairs, dtype=torch.long, device=device).reshape(-1, 2)
    return table[:, 0], table[:, 1]
