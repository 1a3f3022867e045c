"""Small whole numbers in words of 32 bits, and columns whose groups a file lists."""

from __future__ import annotations

import pytest
import torch

from editcli.models.packed.bits import pack_words, unpack_words, words_of
from editcli.models.packed.groups import Groups
from editcli.models.packed.layout import PackingError


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("count", [32, 40, 7])
def test_numbers_come_back_from_their_words(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, count), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (3, words_of(count, bits))
    assert torch.equal(unpack_words(words, bits, count), codes)


def test_the_first_number_is_in_the_lowest_bits() -> None:
    codes = torch.tensor([[1, 2, 0, 0, 0, 0, 0, 15]], dtype=torch.uint8)
    assert pack_words(codes, 4).tolist() == [[(0xF0000021) - (1 << 32)]]


def test_scales_of_listed_groups_reach_their_columns() -> None:
    listed = torch.tensor([1, 0, 1, 2, 1])
    groups = Groups.listed(2, listed, 4)
    scales = torch.arange(8.0).reshape(2, 4)
    (spread,) = groups.spread(scales)
    assert torch.equal(spread, scales[:, listed])
    matrix = torch.arange(10.0).reshape(2, 5)
    blocks = groups.blocks.split(groups.ordered(matrix))
    assert blocks.shape == (8, 3)
    assert set(blocks[0].tolist()) == {1.0}
    assert set(blocks[1].tolist()) == {0.0, 2.0, 4.0}
    assert set(blocks[6].tolist()) == {8.0}


def test_a_group_without_scales_is_an_error() -> None:
    with pytest.raises(PackingError, match="up to 3"):
        Groups.listed(2, torch.tensor([0, 3]), 2)
