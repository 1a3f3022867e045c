"""Models of the package compressed-tensors, as llm-compressor writes them and vLLM runs them.

W = (q - z) s with one scale, and one zero point where the format is not symmetric, for a matrix, a row, a group of
columns or a block. ``int-quantized`` stores q as int8; ``pack-quantized`` stores q + 2^(bits - 1) in words of 32 bits
along a row, and z in words along a column; ``float-quantized`` stores E4M3 numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from editcli.models.packed.bits import pack_words, unpack_words, words_of
from editcli.models.packed.blocks import Blocks, Scales
from editcli.models.packed.fp8 import STORED as E4M3
from editcli.models.packed.fp8 import eight_bit_floats
from editcli.models.packed.groups import Groups
from editcli.models.packed.integers import Integers
from editcli.models.packed.layout import (
    FLOATS,
    Matrix,
    PackingError,
    Parts,
    Reader,
    beside,
    blocks_of,
    by,
    require,
    siblings,
)
from editcli.models.packed.shaping import shaped
from editcli.storage.checkpoint import TensorEntry

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_BITS = (2, 4, 8)
"""Widths that divide a word, which all versions of the package pack alike."""
_EIGHT = Integers(8)


class CompressedTensors:
    """Integers of eight bits, packed integers of fewer, and eight-bit floats."""

    name = "compressed-tensors"

    def knows(self, said: Mapping[str, Any]) -> bool:
        """Tell it by the method; refuse formats in which nothing can be written again."""
        if said.get("quant_method") != self.name:
            return False
        unknown = sorted({str(form) for form in _formats(said)} - set(FORMATS))
        if unknown:
            raise PackingError(f"in the format {unknown[0]}, which editcli does not pack anew")
        if said.get("quantization_status", "compressed") != "compressed":
            raise PackingError(f"and not compressed ({said['quantization_status']}), so that no packed weight is there")
        for extra, what in (("transform_config", "with transforms"), ("sparsity_config", "with sparse weights")):
            if _says_something(said.get(extra)):
                raise PackingError(f"{what} ({extra}), which editcli does not pack anew")
        return True

    def matrices(self, said: Mapping[str, Any], entries: Mapping[str, TensorEntry], read: Reader) -> Iterator[Matrix]:
        """Yield the matrices that have scales."""
        weights = [group["weights"] for group in _groups(said) if isinstance(group.get("weights"), dict)]
        sizes = [_block(one) for one in weights]
        bits = sorted({one["num_bits"] for one in weights if one.get("num_bits") in _BITS})
        shifted = bool(weights) and not any(one.get("symmetric", True) for one in weights)
        for owner, parts in siblings(entries).items():
            weight = parts.get("weight")
            if shifted and "weight_scale" in parts and "weight_zero_point" not in parts:
                raise PackingError(f"{owner} lacks weight_zero_point")
            if "weight_packed" in parts:
                yield _packed(owner, parts, _shape(owner, parts, read), bits, sizes)
            elif weight is not None and weight.dtype == "I8":
                yield _whole(owner, parts, weight, sizes)
            elif weight is not None and weight.dtype == E4M3:
                yield eight_bit_floats(parts, weight, sizes)


def _groups(said: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = said.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _formats(said: Mapping[str, Any]) -> list[Any]:
    """Return the formats of a model's groups; the model's own is theirs unless they have one."""
    whole = said.get("format", "dense")
    return [group.get("format") or whole for group in _groups(said)] or [whole]


def _says_something(config: Any) -> bool:
    if not isinstance(config, dict) or config.get("format") == "dense":
        return False
    return any(value for value in config.values())


def _block(weights: Mapping[str, Any]) -> list[Any] | None:
    """Return the rows and columns of a block, where the config names them."""
    if weights.get("strategy") in ("group", "tensor_group"):
        return [1, weights.get("group_size")]
    return weights.get("block_structure")


def _shape(owner: str, parts: Mapping[str, TensorEntry], read: Reader) -> tuple[int, int]:
    entry = parts.get("weight_shape")
    if entry is None or entry.shape != (2,) or entry.dtype not in ("I64", "I32"):
        raise PackingError(f"{owner} lacks weight_shape, two whole numbers")
    rows, columns = (int(size) for size in read(entry.name).tolist())
    if not (0 < rows < 1 << 31 and 0 < columns < 1 << 31):
        raise PackingError(f"{entry.name} gives the shape {rows} x {columns}")
    return rows, columns


def _packed(
    owner: str, parts: Mapping[str, TensorEntry], shape: tuple[int, int], bits: list[int], sizes: list[Any]
) -> Matrix:
    """Return a matrix in words of 32 bits."""
    stored = parts["weight_packed"]
    fitting = [one for one in bits if stored.shape == (shape[0], words_of(shape[1], one))]
    if len(fitting) != 1 or stored.dtype != "I32":
        raise PackingError(
            f"{stored.name} ({stored.dtype}, {by(stored.shape)}) does not hold {by(shape)} numbers of "
            f"{' or '.join(map(str, bits)) or 'no known'} bits"
        )
    scale = _scale(owner, parts)
    pieces = {"weight": stored.name, "scale": scale.name}
    zero, order = parts.get("weight_zero_point"), parts.get("weight_g_idx")
    if zero is not None:
        needed = (words_of(shape[0], fitting[0]), scale.shape[-1])
        require(owner, parts, {"weight_zero_point": (("I32",), needed)})
        pieces["zero"] = zero.name
    if order is not None:
        require(owner, parts, {"weight_g_idx": (("I32", "I64"), shape[1:])})
    if zero is not None or order is not None:
        require(owner, parts, {"weight_scale": (FLOATS, (shape[0], scale.shape[-1]))})
    layout = PackedIntegers(Integers(fitting[0]), shape, blocks_of(shape, scale, sizes))
    return Matrix(f"{owner}.weight", shape, layout, pieces, beside(parts, pieces))


def _whole(owner: str, parts: Mapping[str, TensorEntry], weight: TensorEntry, sizes: list[Any]) -> Matrix:
    """Return a matrix of int8 numbers."""
    if len(weight.shape) != 2:
        raise PackingError(f"{weight.name} has {len(weight.shape)} dimensions and not two")
    scale = _scale(owner, parts)
    pieces = {"weight": weight.name, "scale": scale.name}
    if "weight_zero_point" in parts:
        require(owner, parts, {"weight_zero_point": (("I8",), scale.shape)})
        pieces["zero"] = parts["weight_zero_point"].name
    layout = WholeIntegers(blocks_of((weight.shape[0], weight.shape[1]), scale, sizes))
    return Matrix(weight.name, weight.shape, layout, pieces, beside(parts, pieces))


def _scale(owner: str, parts: Mapping[str, TensorEntry]) -> TensorEntry:
    scale = parts.get("weight_scale")
    if scale is None:
        raise PackingError(f"{owner} lacks weight_scale")
    return scale


@dataclass(frozen=True, slots=True)
class WholeIntegers:
    """Numbers of int8 with scales."""

    blocks: Blocks
    title: str = "I8 with scales"

    def unpack(self, parts: Parts) -> Tensor:
        """Return W = (q - z) s."""
        scales, zeros = self._spread(parts["scale"], self._zeros(parts))
        return (_unsigned(parts["weight"]).float() - zeros) * scales

    def pack(self, weight: Tensor, parts: Parts) -> Parts:
        """Return numbers, scales and, where there are some, zero points."""
        scales, zeros = _EIGHT.fit(weight, self.blocks, parts["scale"], self._zeros(parts))
        codes = shaped(weight, self.unpack(parts), self._spread(scales, zeros), _EIGHT.round)
        made = {"weight": _signed(codes), "scale": scales}
        return {**made, "zero": _signed(zeros)} if "zero" in parts else made

    def _spread(self, scales: Tensor, zeros: Tensor) -> Scales:
        return self.blocks.spread(scales.float()), self.blocks.spread(zeros.float())

    def _zeros(self, parts: Parts) -> Tensor:
        if "zero" in parts:
            return _unsigned(parts["zero"])
        return torch.full(parts["scale"].shape, _EIGHT.middle, dtype=torch.uint8)


def _unsigned(numbers: Tensor) -> Tensor:
    return (numbers.int() + _EIGHT.middle).to(torch.uint8)


def _signed(codes: Tensor) -> Tensor:
    return (codes.int() - _EIGHT.middle).to(torch.int8)


@dataclass(frozen=True, slots=True)
class PackedIntegers:
    """Numbers of few bits in words, with scales."""

    integers: Integers
    shape: tuple[int, int]
    blocks: Blocks

    @property
    def title(self) -> str:
        """Bits and blocks."""
        size = "" if self.blocks.rows > 1 else f", groups of {self.blocks.columns}"
        return f"compressed-tensors {self.integers.bits}-bit{size}"

    def unpack(self, parts: Parts) -> Tensor:
        """Return W = (q - z) s."""
        scales, zeros = self._groups(parts).spread(parts["scale"], self._zeros(parts))
        return (unpack_words(parts["weight"], self.integers.bits, self.shape[1]).float() - zeros) * scales

    def pack(self, weight: Tensor, parts: Parts) -> Parts:
        """Return words, scales and, where there are some, zero points."""
        groups = self._groups(parts)
        scales, zeros = self.integers.fit(groups.ordered(weight), groups.blocks, parts["scale"], self._zeros(parts))
        codes = shaped(weight, self.unpack(parts), groups.spread(scales, zeros), self.integers.round)
        made = {"weight": pack_words(codes, self.integers.bits), "scale": scales}
        return {**made, "zero": pack_words(zeros.T, self.integers.bits).T} if "zero" in parts else made

    def _groups(self, parts: Parts) -> Groups:
        listed = parts.get("weight_g_idx")
        # An order of -1 stands for none.
        if listed is None or bool((listed < 0).all()):
            return Groups(self.blocks)
        return Groups.listed(self.shape[0], listed, parts["scale"].shape[-1])

    def _zeros(self, parts: Parts) -> Tensor:
        if "zero" in parts:
            return unpack_words(parts["zero"].T, self.integers.bits, self.shape[0]).T
        return torch.full(parts["scale"].shape, self.integers.middle, dtype=torch.uint8)
