"""Rehearsing the load of a checkpoint takes no memory, however many experts it stacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from editcli.models.architectures import skeleton
from editcli.models.experts import EXPERTS_WEIGHT
from editcli.models.fit import examine, stored_names
from editcli.models.hollow import hollow, joined_hollow
from editcli.storage.checkpoint import Checkpoint, TensorEntry
from editcli.testing import tiny_config
from tests.support.families import needs_packed_experts

WIDE, EXPERTS = 1 << 16, 64
"""One stack of such experts takes a terabyte in float32, which no machine for tests has."""


class Listed(Checkpoint):
    """A checkpoint of which only names and shapes are there."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__(Path("listed"))
        self.listed = {name: TensorEntry(name, "", "BF16", shape, 0, 0) for name, shape in shapes.items()}

    @property
    def entries(self) -> dict[str, TensorEntry]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.listed


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("join", [torch.stack, torch.cat], ids=["stack", "cat"])
def test_what_repeats_its_numbers_is_joined_without_memory(join, dim: int) -> None:
    parts = [hollow(number, (3, 5)) for number in (1, 2)]
    expected = join([part.contiguous() for part in parts], dim=dim)
    with joined_hollow():
        made = join(parts, dim=dim)
    assert torch.equal(made, expected)
    # One number for each place along the dimension at most.
    assert made.untyped_storage().nbytes() <= expected.shape[dim] * 4


def test_other_tensors_are_joined_as_ever() -> None:
    numbers = torch.arange(12.0).reshape(3, 4)
    mixed = [numbers, hollow(7, (3, 4))]
    with joined_hollow():
        made, stacked = torch.cat(mixed), torch.stack(mixed, 1)
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            torch.cat([hollow(1, (3, 4)), hollow(1, (2, 5))])
    assert torch.equal(made, torch.cat([numbers, torch.full((3, 4), 7.0)]))
    assert torch.equal(stacked, torch.stack([numbers, torch.full((3, 4), 7.0)], 1))


@needs_packed_experts
def test_experts_larger_than_any_memory_are_rehearsed_by_name() -> None:
    config = tiny_config(
        "qwen3_moe", hidden_size=WIDE, moe_intermediate_size=WIDE, num_experts=EXPERTS, num_hidden_layers=1
    )
    model = skeleton(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    owner = next(name for name in shapes if name.endswith(f".{EXPERTS_WEIGHT}")).rpartition(".")[0]
    for stacked in [name for name in shapes if name.startswith(f"{owner}.")]:
        del shapes[stacked]
    maps = ("gate_proj", "up_proj", "down_proj")
    shapes |= {f"{owner}.{expert}.{one}.weight": (WIDE, WIDE) for expert in range(EXPERTS) for one in maps}
    checkpoint = Listed(shapes)
    fit = examine(checkpoint, model)
    assert (fit.missing, fit.reshaped, fit.unused) == ((), (), ())
    names = stored_names(checkpoint, model)
    assert names[f"{owner}.{EXPERTS_WEIGHT}"] == tuple(f"{owner}.{one}.down_proj.weight" for one in range(EXPERTS))
