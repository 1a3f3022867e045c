"""Multiply with frozen float32 weights on a CPU through oneDNN, which uses the widest vectors of every maker's CPU.

torch hands such products to MKL, which keeps to narrower vectors on some CPUs and is then half as fast. The sums are
the same up to rounding, and equal from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editcli.models.forward import replaced_forward


@contextmanager
def quick_linears(model: nn.Module) -> Iterator[None]:
    """Let the model's linear maps run through oneDNN where it can take them; gradients reach inputs, not weights."""
    with ExitStack() as stack:
        for module in model.modules() if _available() else ():
            forward = _quick(module)
            if forward is not None:
                stack.enter_context(replaced_forward(module, forward))
        yield


def gram(rows: Tensor) -> Tensor:
    """Return rows^T rows, (d, d), of float32 ``rows`` (n, d) on any device."""
    if rows.device.type != "cpu" or not _available():
        return rows.T @ rows
    columns = rows.T.contiguous()
    return _multiply(columns, columns, None)


def _available() -> bool:
    """Tell whether the operation is there and works as expected: it is not among those that torch keeps stable."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    ones = torch.ones(2, 2)
    try:
        return torch.equal(_multiply(ones, ones, ones[0]), ones + 2)
    # It was left out or takes other arguments; torch's own products remain.
    except (AttributeError, RuntimeError, TypeError):
        return False


def _quick(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return a forward for a linear map, or None where its own has to stay."""
    # A subclass may compute something else, and accelerate gives a module a forward of its own.
    if type(module) not in (nn.Linear, Conv1D) or "forward" in module.__dict__:
        return None
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
    # A weight that is spread over processes is of a type of its own, with its own products.
    if type(weight) is not nn.Parameter or weight.requires_grad:
        return None
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    matrix = weight.T if isinstance(module, Conv1D) else weight
    return lambda hidden: _product(hidden, matrix, bias)


def _product(hidden: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Return hidden @ matrix.T + bias for ``hidden`` (..., d_in) and ``matrix`` (d_out, d_in)."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    product = _Product.apply(flat, matrix, bias) if hidden.requires_grad else _multiply(flat, matrix, bias)
    return cast(Tensor, product).view(*hidden.shape[:-1], len(matrix))


def _multiply(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, matrix, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """A linear map whose weights are constants."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        ctx.matrix = matrix
        return _multiply(rows, matrix, bias)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        return _multiply(slopes[0].contiguous(), ctx.matrix.T, None), None, None
