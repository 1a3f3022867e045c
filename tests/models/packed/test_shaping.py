"""Rounding to few bits keeps an edit that is smaller than half a step, which rounding to the nearest drops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from editcli.models.packed.blocks import Blocks
from editcli.models.packed.integers import Integers
from editcli.models.packed.shaping import shaped

ROWS, COLUMNS, FACTS = 64, 512, 4
FOUR = Integers(4)


def stored() -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return a matrix whose numbers are exactly those of four bits, with the scale and zero point of each."""
    blocks = Blocks((ROWS, COLUMNS), 1, 64)
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    scales, zeros = FOUR.fit(weight, blocks, torch.ones(blocks.grid), torch.full(blocks.grid, 8, dtype=torch.uint8))
    spread = blocks.spread(scales), blocks.spread(zeros.float())
    return numbers(FOUR.round(weight.reshape(-1, 1), tuple(one.reshape(-1) for one in spread))[0], spread), spread


def numbers(codes: Tensor, spread: tuple[Tensor, Tensor]) -> Tensor:
    return (codes.reshape(ROWS, COLUMNS).float() - spread[1]) * spread[0]


def edit(size: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys, (columns, facts), and a change of this share of the weight's norm that moves their values."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(COLUMNS, FACTS, generator=generator)
    change = torch.randn(ROWS, FACTS, generator=generator) @ torch.linalg.pinv(keys)
    return keys, change * (size * weight.norm() / change.norm())


@pytest.mark.parametrize("size", [0.01, 0.05, 0.1])
def test_what_the_edit_does_to_its_keys_is_kept(size: float) -> None:
    before, spread = stored()
    keys, change = edit(size, before)
    after = numbers(shaped(before + change, before, spread, FOUR.round), spread)
    moved, intended = (after - before) @ keys, change @ keys
    assert float((moved - intended).norm() / intended.norm()) < 0.15
    nearest = numbers(FOUR.round((before + change).reshape(-1, 1), tuple(one.reshape(-1) for one in spread))[0], spread)
    lost = float(((nearest - before) @ keys - intended).norm() / intended.norm())
    assert lost > 0.25
    # It costs little of everything else: less than the type loses anyway.
    assert float((after - before - change).norm() / before.norm()) < 0.13


def test_a_matrix_that_was_not_changed_stays_as_it_was() -> None:
    before, spread = stored()
    assert torch.equal(numbers(shaped(before, before, spread, FOUR.round), spread), before)


def test_the_same_edit_is_rounded_in_the_same_way() -> None:
    before, spread = stored()
    change = edit(0.05, before)[1]
    first, second = (shaped(before + change, before, spread, FOUR.round) for _ in range(2))
    assert torch.equal(first, second)
