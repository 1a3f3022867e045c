"""Models that AWQ quantised (2306.00978), in the GEMM layout of AutoAWQ, gptqmodel and llm-awq.

W = (q - z) s for each row and group of neighbouring columns. The file holds the transpose: ``qweight`` has q, four bits
each, in words along the rows of W, and ``qzeros`` has z in the same way. Within a word the eight numbers are in the
order 0, 2, 4, 6, 1, 3, 5, 7, in which a kernel unpacks them in pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from editcli.models.packed.bits import WORD, pack_words, unpack_words, words_of
from editcli.models.packed.groups import Groups
from editcli.models.packed.integers import Integers
from editcli.models.packed.layout import FLOATS, Matrix, PackingError, Parts, Reader, beside, require, siblings
from editcli.models.packed.shaping import shaped
from editcli.storage.checkpoint import TensorEntry

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FOUR = Integers(4)
_PER_WORD = WORD // _FOUR.bits


class Awq:
    """Integers of four bits with the scales and zero points of groups of columns."""

    name = "AWQ"

    def knows(self, said: Mapping[str, Any]) -> bool:
        """Tell it by the method; refuse the layouts of other kernels, and other widths."""
        if said.get("quant_method") != "awq":
            return False
        form = str(said.get("version") or said.get("format") or "gemm").lower()
        if form != "gemm":
            raise PackingError(f"in the layout {form}, which editcli does not pack anew")
        bits = said.get("bits", said.get("w_bit", _FOUR.bits))
        if bits != _FOUR.bits:
            raise PackingError(f"to {bits} bits, which editcli does not pack anew")
        return True

    def matrices(self, said: Mapping[str, Any], entries: Mapping[str, TensorEntry], read: Reader) -> Iterator[Matrix]:
        """Yield the matrices that have words."""
        for owner, parts in siblings(entries).items():
            if "qweight" in parts:
                yield _matrix(owner, parts)


def _matrix(owner: str, parts: Mapping[str, TensorEntry]) -> Matrix:
    words, scales = parts["qweight"], parts.get("scales")
    if scales is None or not len(words.shape) == len(scales.shape) == 2:
        raise PackingError(f"{owner} lacks qweight or scales of two dimensions")
    (columns, _), (count, rows) = words.shape, scales.shape
    wide = words_of(rows, _FOUR.bits)
    needs = {"qweight": (("I32",), (columns, wide)), "qzeros": (("I32",), (count, wide))}
    require(owner, parts, {**needs, "scales": (FLOATS, (count, rows))})
    if not count or columns % count or rows % _PER_WORD:
        raise PackingError(f"{owner}, {rows:,} x {columns:,}, is not in {count:,} groups of columns and whole words")
    pieces = {"weight": words.name, "scale": scales.name, "zero": parts["qzeros"].name}
    layout = InterleavedIntegers((rows, columns), count)
    return Matrix(f"{owner}.weight", (rows, columns), layout, pieces, beside(parts, pieces))


@dataclass(frozen=True, slots=True)
class InterleavedIntegers:
    """Numbers of four bits in words along the rows, eight to a word in an order of their own."""

    shape: tuple[int, int]
    count: int

    @property
    def title(self) -> str:
        """The method, the width and the groups."""
        return f"AWQ 4-bit, groups of {self.shape[1] // self.count}"

    def unpack(self, parts: Parts) -> Tensor:
        """Return W = (q - z) s."""
        scales, zeros = self._groups.spread(parts["scale"].T, self._numbers(parts["zero"]).T)
        return (self._numbers(parts["weight"]).T.float() - zeros) * scales

    def pack(self, weight: Tensor, parts: Parts) -> Parts:
        """Return words, scales and zero points."""
        groups, before = self._groups, (parts["scale"].T, self._numbers(parts["zero"]).T)
        scales, zeros = _FOUR.fit(weight, groups.blocks, *before)
        codes = shaped(weight, self.unpack(parts), groups.spread(scales, zeros), _FOUR.round)
        return {"weight": _words(codes.T), "scale": scales.T, "zero": _words(zeros.T)}

    @property
    def _groups(self) -> Groups:
        return Groups.even(*self.shape, self.count)

    def _numbers(self, words: Tensor) -> Tensor:
        """Return the numbers of words, (lines, rows), in the order of the rows."""
        stored = unpack_words(words, _FOUR.bits, self.shape[0]).reshape(len(words), -1, _PER_WORD)
        numbers = stored.clone()
        numbers[..., list(ORDER)] = stored
        return numbers.reshape(len(words), -1)


def _words(numbers: Tensor) -> Tensor:
    """Return the words of numbers, (lines, rows)."""
    ordered = numbers.reshape(len(numbers), -1, _PER_WORD)[..., list(ORDER)]
    return pack_words(ordered.reshape(len(numbers), -1), _FOUR.bits)
