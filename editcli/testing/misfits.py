"""States that a component did not save: each has one tensor or one JSON value that is missing or another."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from editcli.plugin.interfaces import State

VALUES: tuple[Any, ...] = (None, True, -1, 0.5, 1e300, "x", "", [], [1], {}, {"x": 1})
"""JSON values of every type."""


def changed_tensors(state: State) -> Iterator[tuple[str, State]]:
    """Yield states with one tensor missing, of another shape or type, or not finite, each with what was changed."""
    for name, tensor in state.tensors.items():
        rest = {other: one for other, one in state.tensors.items() if other != name}
        yield f"{name} is missing", State(rest, state.json)
        for change, changed in _misfits(tensor):
            yield f"{name} {change}", State({**rest, name: changed}, state.json)


def _misfits(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "has one dimension more", tensor[None].clone()
    yield "is empty", tensor.new_empty(0)
    if tensor.ndim:
        yield "has a row more", torch.cat([tensor, tensor[:1]])
        yield "is one number", tensor.new_zeros(())
    yield "is of another type", tensor.long() if tensor.is_floating_point() else tensor.double()
    if tensor.is_floating_point():
        yield "is not a number", torch.full_like(tensor, float("nan"))


def changed_values(state: State) -> Iterator[tuple[str, State]]:
    """Yield states with one JSON value missing or another, at any depth, each with what was changed."""
    for place in _places(state.json):
        name = ".".join(map(str, place))
        for value in (..., *VALUES):
            whole = copy.deepcopy(dict(state.json))
            parent: Any = whole
            for key in place[:-1]:
                parent = parent[key]
            if value is ...:
                del parent[place[-1]]
            else:
                parent[place[-1]] = value
            yield f"{name} is {'missing' if value is ... else repr(value)}", State(state.tensors, whole)


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside of lists and objects."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*place, key)
        yield from _places(item, (*place, key))
