"""A model family: the facts that a plugin states about where a kind of model keeps its MLPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_LAYERS = 10_000
"""No model has more: what a damaged file names would take hours to build, a mistyped range would fill the memory."""


@dataclass(frozen=True, slots=True)
class Family:
    """The names of the parts of one kind of model.

    ``blocks``, ``final_norm`` and ``head`` are paths from the model's root, ``mlp``, ``projection`` and ``mlp_norm``
    are paths from a block. Where a block has no module for its MLP, its last linear map stands for it.
    """

    name: str
    model_types: tuple[str, ...]
    """Values of ``model_type`` in ``config.json``."""
    blocks: str = "model.layers"
    mlp: str = "mlp"
    projection: str = "mlp.down_proj"
    mlp_norm: str | None = None
    """Norm that is applied to the MLP's output before it joins the residual stream."""
    final_norm: str = "model.norm"
    head: str = "lm_head"
    parallel: bool | tuple[str, ...] = False
    """Whether attention and MLP read the same stream; configuration keys, any of which says so, where that differs."""
    experts: str | None = None
    """Path from a block, in the layers that are mixtures of experts, of the module that holds all routed experts; the
    parameter ``down_proj`` of it holds their last maps, (experts, d_out, d_in) or (experts, d_in, d_out)."""
    shared: str | None = None
    """Path from a block, in those layers, of the last map of the expert that every token passes."""
    shared_gate: str | None = None
    """Path from a block of the linear map whose sigmoid scales what the shared expert gives."""
    residual_multiplier: str | None = None
    """Configuration key of a factor on everything that joins the residual stream."""
    refused: tuple[tuple[str, Any, str], ...] = ()
    """Variants that cannot be edited: configuration key, its value, and what such a model does."""
