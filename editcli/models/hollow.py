"""Tensors of any shape that hold one number and take no memory, also once they are stacked or put side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def hollow(number: float, shape: Sequence[int]) -> Tensor:
    """Return a float32 tensor of ``shape`` of which every element is the same one in memory."""
    return torch.tensor(float(number)).expand(tuple(shape))


@contextmanager
def joined_hollow() -> Iterator[None]:
    """Keep ``torch.stack`` and ``torch.cat`` from writing out tensors that repeat their numbers.

    Transformers stacks the matrices of experts that are stored one by one. Written out, these would take the memory of
    the whole model in float32.
    """
    with _Joining():
        yield


class _Joining(TorchFunctionMode):
    """Joins tensors along one dimension, and repeats the result along those that all of them repeat."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.stack:
            return _stacked(*args, **(kwargs or {}))
        if func is torch.cat:
            return _joined(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _stacked(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return _joined([tensor.unsqueeze(dim) for tensor in tensors], dim)


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return the tensors side by side along ``dim``; their other sizes must agree, as for ``torch.cat``."""
    first, dim = tensors[0], dim % max(1, tensors[0].ndim)
    repeated = [
        place
        for place, size in enumerate(first.shape)
        if place != dim and all(one.ndim == first.ndim and one.shape[place] == size for one in tensors)
        # A dimension without a stride repeats what lies in memory once.
        if size > 1 and not any(one.stride(place) for one in tensors)
    ]
    narrow = list(tensors)
    for place in repeated:
        narrow = [one.narrow(place, 0, 1) for one in narrow]
    whole = torch.cat(narrow, dim)
    return whole.expand([first.shape[place] if place in repeated else size for place, size in enumerate(whole.shape)])
