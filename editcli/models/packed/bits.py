"""Small whole numbers in words of 32 bits: one after the other, the first in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def words_of(count: int, bits: int) -> int:
    """Return how many words ``count`` numbers take."""
    return -(-count * bits // WORD)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Return numbers below 2^bits, (rows, count), as int32 words, (rows, words); a number may lie in two of them."""
    rows, count = codes.shape
    words = torch.zeros(rows, words_of(-(-count // WORD) * WORD, bits), dtype=torch.int64)
    for place in range(WORD):
        column = codes[:, place::WORD].long()
        word, shift = divmod(place * bits, WORD)
        span = words[:, : column.shape[1] * bits]
        span[:, word::bits] |= (column << shift) & 0xFFFFFFFF
        if shift + bits > WORD:
            span[:, word + 1 :: bits] |= column >> (WORD - shift)
    # The highest bit of a word is the sign of an int32.
    signed = torch.where(words > 0x7FFFFFFF, words - (1 << WORD), words)
    return signed.to(torch.int32)[:, : words_of(count, bits)]


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the ``count`` numbers of each row of :func:`pack_words` as uint8, (rows, count)."""
    rows, mask = len(words), (1 << bits) - 1
    blocks = -(-count // WORD)
    padded = torch.nn.functional.pad(words, (0, blocks * bits - words.shape[1]))
    codes = torch.zeros(rows, blocks * WORD, dtype=torch.uint8)
    for place in range(WORD):
        word, shift = divmod(place * bits, WORD)
        column = (padded[:, word::bits].long() & 0xFFFFFFFF) >> shift
        if shift + bits > WORD:
            column |= (padded[:, word + 1 :: bits].long() & 0xFFFFFFFF) << (WORD - shift)
        codes[:, place::WORD] = (column & mask).to(torch.uint8)
    return codes[:, :count]
