"""The routed experts of a layer: one module with a parameter for the matrices of all of them.

From its fifth release on, transformers keeps the experts of every family so, and says of each module in the same words
how it is built: whether its matrices are transposed, whether they have biases, how a gate and a map up become a key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from editcli.errors import ModelError

EXPERTS_WEIGHT = "down_proj"
"""The parameter with the last maps of all experts."""
_UP = "gate_up_proj"


@dataclass(frozen=True, slots=True)
class Routed:
    """The tokens that one expert reads: their indices (t,), their keys (t, d) and their gates (t,)."""

    expert: int
    tokens: Tensor
    keys: Tensor
    gates: Tensor


def edited_parameter(module: nn.Module) -> Tensor:
    """Return the parameter of a projection that is edited: its weight, or the last maps of all experts."""
    return module.get_parameter(weight_name(module))


def weight_name(module: nn.Module) -> str:
    """Return the name of :func:`edited_parameter` in its module."""
    return EXPERTS_WEIGHT if isinstance(getattr(module, EXPERTS_WEIGHT, None), nn.Parameter) else "weight"


def is_packed(module: Any) -> bool:
    """Tell whether a module holds its experts as transformers 5 does, and takes tokens, chosen experts and gates."""
    said = all(hasattr(module, name) for name in ("_apply_gate", "is_transposed", "has_bias", "has_gate"))
    return said and bool(module.has_gate) and weight_name(module) == EXPERTS_WEIGHT


def refuse_unpacked(module: Any, path: str) -> None:
    """Raise :class:`ModelError` unless one parameter holds the matrices of all experts, as in transformers 5."""
    if not is_packed(module):
        raise unpacked(path)


def unpacked(path: str) -> ModelError:
    """Return the error for experts that are held in another way."""
    return ModelError(
        f"transformers {transformers.__version__} does not hold the experts of {path} in one parameter, so they cannot "
        "be edited; install transformers>=5, or edit dense layers and shared experts"
    )


def routed(module: Any, hidden: Tensor, chosen: Tensor, gates: Tensor) -> Iterator[Routed]:
    """Yield what each expert reads of ``hidden`` (tokens, d_model), in the order of the experts.

    ``chosen`` and ``gates``, (tokens, k) each, are the arguments of the module: indices of experts and their gates.
    """
    for expert in chosen.unique().tolist():
        if expert >= len(getattr(module, EXPERTS_WEIGHT)):
            continue
        tokens, place = (chosen == expert).nonzero(as_tuple=True)
        up = getattr(module, _UP)[expert]
        entered = hidden[tokens] @ (up if module.is_transposed else up.T)
        if module.has_bias:
            entered = entered + getattr(module, f"{_UP}_bias")[expert]
        yield Routed(expert, tokens, module._apply_gate(entered), gates[tokens, place])


def mixture_key(module: Any, hidden: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """Return k = (g_1 k_1, ..., g_E k_E) of every token, (tokens, E d) float32."""
    count, rows, columns = getattr(module, EXPERTS_WEIGHT).shape
    key = torch.zeros(len(hidden), count, rows if module.is_transposed else columns, device=hidden.device)
    for part in routed(module, hidden, chosen, gates):
        key[part.tokens, part.expert] = part.keys.float() * part.gates.float()[:, None]
    return key.flatten(1)
