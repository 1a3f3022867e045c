"""Products through oneDNN against torch's own, and when the own ones stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editcli.models import matmul
from editcli.models.matmul import quick_linears

ROWS, INTO, OUT = 6, 8, 5
MAPS = {
    "linear": lambda: nn.Linear(INTO, OUT),
    "without a bias": lambda: nn.Linear(INTO, OUT, bias=False),
    "conv1d": lambda: Conv1D(OUT, INTO),
    "one output": lambda: nn.Linear(INTO, 1),
}
INPUTS = {
    "rows": lambda: torch.randn(ROWS, INTO),
    "batch": lambda: torch.randn(2, 3, INTO),
    "no rows": lambda: torch.randn(0, INTO),
    "every other column": lambda: torch.randn(ROWS, 2 * INTO)[:, ::2],
    "transposed": lambda: torch.randn(INTO, ROWS).T,
    "one row for all": lambda: torch.randn(1, INTO).expand(ROWS, INTO),
    "part of a batch": lambda: torch.randn(2, 5, 2 * INTO)[:, 1:4, INTO:],
}


@pytest.fixture(autouse=True)
def drawn() -> Iterator[None]:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def replaced(module: nn.Module) -> bool:
    return "forward" in module.__dict__


def produced(module: nn.Module, entered: Tensor, *, quick: bool) -> tuple[Tensor, Tensor]:
    """Return what a module puts out and the gradient of its sum of squares."""
    own = entered.detach().requires_grad_(True)
    with quick_linears(module) if quick else nullcontext():
        assert replaced(module) == quick
        output = module(own)
        return output.detach(), torch.autograd.grad(output.square().sum(), own)[0]


@pytest.mark.parametrize("module", MAPS)
@pytest.mark.parametrize("shape", INPUTS)
def test_outputs_and_gradients_are_those_of_the_module(module: str, shape: str) -> None:
    linear, entered = MAPS[module]().requires_grad_(False), INPUTS[shape]()
    # Conv1D itself takes no batch that is cut out of another.
    plain, quick = produced(linear, entered.contiguous(), quick=False), produced(linear, entered, quick=True)
    for own, other in zip(plain, quick, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), quick_linears(linear):
        torch.testing.assert_close(linear(entered), plain[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", MAPS)
def test_a_weight_that_changes_in_place_counts_at_once(module: str) -> None:
    """No copy of a weight in another layout outlives a product."""
    linear, entered = MAPS[module]().requires_grad_(False), INPUTS["rows"]()
    with quick_linears(linear):
        before = linear(entered)
        weight = linear.get_parameter("weight")
        weight.copy_(torch.randn_like(weight))
        torch.testing.assert_close(linear(entered), type(linear).forward(linear, entered), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(linear(entered), before)


def test_modules_get_their_own_products_back() -> None:
    linear = MAPS["linear"]().requires_grad_(False)
    with pytest.raises(ZeroDivisionError), quick_linears(linear):
        raise ZeroDivisionError
    assert not replaced(linear)


class Louder(nn.Linear):
    """A linear map that is more than its product."""


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(INTO, OUT),
        nn.Linear(INTO, OUT, dtype=torch.bfloat16).requires_grad_(False),
        nn.Linear(INTO, OUT, dtype=torch.float64).requires_grad_(False),
        nn.Linear(INTO, OUT, device="meta").requires_grad_(False),
        Louder(INTO, OUT).requires_grad_(False),
    ],
    ids=["trained", "half", "double", "meta", "subclass"],
)
def test_what_it_cannot_take_is_left_alone(module: nn.Module) -> None:
    with quick_linears(module):
        assert not replaced(module)


def test_a_torch_whose_operation_differs_keeps_its_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*arguments: object) -> Tensor:
        raise TypeError("takes other arguments")

    monkeypatch.setattr(matmul, "_multiply", other)
    linear = MAPS["linear"]().requires_grad_(False)
    with quick_linears(linear):
        assert not replaced(linear)


def test_who_turned_onednn_off_keeps_it_off() -> None:
    linear = MAPS["linear"]().requires_grad_(False)
    torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        with quick_linears(linear):
            assert not replaced(linear)
    finally:
        torch.backends.mkldnn.set_flags(_enabled=True)
