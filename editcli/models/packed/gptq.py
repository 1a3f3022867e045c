"""Models that GPTQ quantised (2210.17323), as gptqmodel, AutoGPTQ and transformers store them.

W = (q - z) s for each row and group of columns; ``g_idx`` lists the group of each column, where columns were quantised
in order of their activations. The file holds the transpose: ``qweight`` has q in words of 32 bits along the columns of
W, ``qzeros`` has z along its rows, less one in the older of the two formats, and ``scales`` one row for each group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from editcli.models.packed.bits import WORD, pack_words, unpack_words, words_of
from editcli.models.packed.groups import Groups
from editcli.models.packed.integers import Integers
from editcli.models.packed.layout import FLOATS, Matrix, PackingError, Parts, Reader, beside, by, require, siblings
from editcli.models.packed.shaping import shaped
from editcli.storage.checkpoint import TensorEntry

SHIFTS = {"gptq": 1, "gptq_v2": 0}
"""How much less than z is stored, by the format of the file."""
BITS = (2, 4, 8)
"""Widths that divide a word."""


class Gptq:
    """Integers with the scales and zero points of groups of columns."""

    name = "GPTQ"

    def knows(self, said: Mapping[str, Any]) -> bool:
        """Tell it by the method; refuse formats of one engine alone, and widths that do not divide a word."""
        if said.get("quant_method") != "gptq":
            return False
        form = _form(said)
        if form not in SHIFTS:
            raise PackingError(f"in the format {form}, which editcli does not pack anew")
        if said.get("bits") not in BITS:
            raise PackingError(f"to {said.get('bits')} bits, which editcli does not pack anew")
        return True

    def matrices(self, said: Mapping[str, Any], entries: Mapping[str, TensorEntry], read: Reader) -> Iterator[Matrix]:
        """Yield the matrices that have words."""
        for owner, parts in siblings(entries).items():
            if "qweight" in parts:
                yield _matrix(owner, parts, SHIFTS[_form(said)])


def _form(said: Mapping[str, Any]) -> str:
    return str(said.get("checkpoint_format") or said.get("format") or "gptq")


def _matrix(owner: str, parts: Mapping[str, TensorEntry], shift: int) -> Matrix:
    words, scales, zeros = (parts.get(part) for part in ("qweight", "scales", "qzeros"))
    if words is None or scales is None or zeros is None or not len(words.shape) == len(scales.shape) == 2:
        raise PackingError(f"{owner} lacks qweight, scales or qzeros of two dimensions")
    (count, rows), listed = scales.shape, parts.get("g_idx")
    # The width is told by the shapes, as a config may give some layers another one than the rest.
    bits = next((one for one in BITS if zeros.shape == (count, words_of(rows, one))), None)
    if bits is None or not count:
        raise PackingError(f"{zeros.name} ({by(zeros.shape)}) does not fit {scales.name} ({by(scales.shape)})")
    columns = listed.shape[0] if listed is not None and len(listed.shape) == 1 else words.shape[0] * WORD // bits
    needs = {"qweight": (("I32",), (words_of(columns, bits), rows)), "scales": (FLOATS, (count, rows))}
    require(owner, parts, {**needs, "qzeros": (("I32",), zeros.shape)})
    if listed is not None:
        require(owner, parts, {"g_idx": (("I32", "I64"), (columns,))})
    if columns % count and listed is None:
        raise PackingError(f"{columns:,} columns of {owner} are no {count:,} groups")
    pieces = {"weight": words.name, "scale": scales.name, "zero": zeros.name}
    layout = GroupedIntegers(Integers(bits, lowest=shift), (rows, columns), shift)
    return Matrix(f"{owner}.weight", (rows, columns), layout, pieces, beside(parts, pieces))


@dataclass(frozen=True, slots=True)
class GroupedIntegers:
    """Numbers of few bits in words along the columns."""

    integers: Integers
    shape: tuple[int, int]
    shift: int

    @property
    def title(self) -> str:
        """The method and the width."""
        return f"GPTQ {self.integers.bits}-bit"

    def unpack(self, parts: Parts) -> Tensor:
        """Return W = (q - z) s."""
        bits, (_, columns) = self.integers.bits, self.shape
        scales, zeros = self._groups(parts).spread(parts["scale"].T, self._zeros(parts))
        return (unpack_words(parts["weight"].T, bits, columns).float() - zeros) * scales

    def pack(self, weight: Tensor, parts: Parts) -> Parts:
        """Return words, scales and zero points."""
        groups, bits = self._groups(parts), self.integers.bits
        before = parts["scale"].T, self._zeros(parts)
        scales, zeros = self.integers.fit(groups.ordered(weight), groups.blocks, *before)
        codes = shaped(weight, self.unpack(parts), groups.spread(scales, zeros), self.integers.round)
        stored = pack_words((zeros.T.int() - self.shift) & self.integers.last, bits)
        return {"weight": pack_words(codes, bits).T, "scale": scales.T, "zero": stored}

    def _zeros(self, parts: Parts) -> Tensor:
        """Return the zero points, (rows, groups)."""
        stored = unpack_words(parts["zero"], self.integers.bits, self.shape[0])
        return (stored.T.int() + self.shift) & self.integers.last

    def _groups(self, parts: Parts) -> Groups:
        listed, count = parts.get("g_idx"), len(parts["scale"])
        if listed is None:
            return Groups.even(*self.shape, count)
        return Groups.listed(self.shape[0], listed, count)
