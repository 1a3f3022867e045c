"""Let an accelerator compute a model's RMS norms in one kernel each, where torch has one that computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from editcli.models.forward import replaced_forward

EPSILONS = ("variance_epsilon", "eps")
"""Names of the constant in families' norms."""
SAMPLE = 4
"""Hidden states on which a norm is compared with torch's."""


Fused = Callable[..., Tensor]
"""A norm's forward."""


def fusable_norms(model: nn.Module) -> list[tuple[nn.Module, Fused]]:
    """Return the norms of ``model`` that equal torch's RMS norm, each with it; no list of families names them."""
    same, norms = dict[Any, bool](), list[tuple[nn.Module, Fused]]()
    for module in model.modules():
        fused = _fused(module)
        if fused is None:
            continue
        weight = module.get_parameter("weight")
        kind = (type(module), weight.shape, weight.dtype, weight.device, _epsilon(module))
        if kind not in same:
            same[kind] = _agree(module, fused)
        if same[kind]:
            norms.append((module, fused))
    return norms


@contextmanager
def replaced_norms(norms: Sequence[tuple[nn.Module, Fused]]) -> Iterator[None]:
    """Run norms through their other forward, where nobody has given them a forward since."""
    with ExitStack() as stack:
        for module, fused in norms:
            if "forward" not in module.__dict__:
                stack.enter_context(replaced_forward(module, fused))
        yield


def _fused(module: nn.Module) -> Fused | None:
    """Return torch's RMS norm with a module's weight, or None for a module that cannot be one."""
    if list(dict(module.named_parameters())) != ["weight"] or "forward" in module.__dict__:
        return None
    weight, epsilon, plain = module.get_parameter("weight"), _epsilon(module), module.forward
    if weight.ndim != 1 or weight.is_meta or weight.requires_grad or epsilon is None:
        return None

    def fused(*args: Any, **more: Any) -> Tensor:
        # Some families give the norm a gate as well, and then it computes more than a norm.
        if len(args) != 1 or more:
            return plain(*args, **more)
        # Looked up at every call: a weight may be replaced after the norm was compared.
        weight = cast(Tensor, module.weight)
        return functional.rms_norm(args[0], weight.shape, weight, epsilon)

    return fused


def _epsilon(module: nn.Module) -> float | None:
    values = (getattr(module, name, None) for name in EPSILONS)
    return next((float(value) for value in values if isinstance(value, (int, float))), None)


@torch.no_grad()
def _agree(module: nn.Module, fused: Fused) -> bool:
    """Compare on hidden states of ordinary size, up to the rounding of their type."""
    weight = module.get_parameter("weight")
    steps = torch.linspace(-3.0, 3.0, SAMPLE * len(weight), device=weight.device)
    hidden = steps.sin().add(0.1).view(SAMPLE, -1).to(weight.dtype)
    try:
        exact, close = module(hidden), fused(hidden)
    # The module's name for its constant says nothing of its arguments: it may be no norm, or one that needs a gate.
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        return False
    tolerance = 4 * torch.finfo(weight.dtype).eps
    return exact.dtype == close.dtype and bool(torch.allclose(exact, close, rtol=tolerance, atol=tolerance))
