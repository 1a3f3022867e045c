"""Keys and values of past tokens that every step of an optimisation reads and none changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

PAST = "editcli_past"
"""The attribute of new keys and values that holds the past ones."""


class FrozenCache(DynamicCache):
    """An attention cache that stays as it is: a layer sees its stored keys and values before the new ones.

    With ``apart`` the new ones come back as they are, with the stored ones as the attribute ``past`` of each, for an
    attention that reads both where they lie; see :mod:`editcli.models.attention`.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], *, apart: bool = False):
        super().__init__()
        self.apart = apart
        for index, (keys, values) in enumerate(layers):
            super().update(keys, values, index)
            layer: Any = self.layers[index]
            # The cache has made a copy; the given tensors are as good, and a caller may hold them as well.
            layer.keys, layer.values = keys, values

    @property
    def pairs(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The keys and values of each layer."""
        layers: Any = self.layers
        return tuple((layer.keys, layer.values) for layer in layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the layer's keys and values, past ones first."""
        layer: Any = self.layers[layer_idx]
        if self.apart:
            for new, stored in ((key_states, layer.keys), (value_states, layer.values)):
                setattr(new, PAST, stored)
            return key_states, value_states
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)
