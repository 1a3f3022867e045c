"""Models that bitsandbytes quantised: LLM.int8, and NF4 or FP4, also with doubly quantised scales.

Int8 (LLM.int8, 2208.07339, section 2): W = q * s / 127 with one s = max |W| for each row.

NF4 and FP4 (QLoRA, 2305.14314, section 3): the numbers of a matrix in the order of their rows fall into blocks of 64,
W = t[q] * s with one s = max |W| for each block and a table t of sixteen numbers that the file holds; two q share a
byte, the first in its upper half. Doubly quantised scales are s = T[p] * S + c with a table T of 256 numbers, one S for
each 256 blocks and a constant c, which stays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from editcli.models.packed.blocks import Blocks, Scales, least_loss
from editcli.models.packed.layout import Matrix, PackingError, Parts, Reader, beside, require
from editcli.models.packed.shaping import shaped
from editcli.storage.checkpoint import TensorEntry

_WEIGHT = "weight"
STATE = "quant_state.bitsandbytes__"
_WHOLE = 127.0
_TABLE, _NESTED_TABLE = 16, 256


class BitsAndBytes:
    """Matrices of int8, NF4 or FP4 numbers, as transformers saves a model that bitsandbytes holds."""

    name = "bitsandbytes"

    def knows(self, said: Mapping[str, Any]) -> bool:
        """Tell it by the method; the files say which of the types it is."""
        return said.get("quant_method") == "bitsandbytes"

    def matrices(self, said: Mapping[str, Any], entries: Mapping[str, TensorEntry], read: Reader) -> Iterator[Matrix]:
        """Yield the matrices that have scales."""
        for owner, parts in _modules(entries).items():
            weight = parts.get(_WEIGHT)
            if weight is not None and weight.dtype == "I8":
                yield _eight_bits(owner, parts, weight)
            elif weight is not None and weight.dtype == "U8":
                yield _four_bits(owner, parts, weight, read)


def _modules(entries: Mapping[str, TensorEntry]) -> Mapping[str, Mapping[str, TensorEntry]]:
    """Return the tensors of each module; a part of four bits is called ``weight.absmax``, one of eight bits ``SCB``."""
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        owner, dot, part = name.rpartition(f".{_WEIGHT}.")
        owner, part = (owner, f"{_WEIGHT}.{part}") if dot else (name.rpartition(".")[0], name.rpartition(".")[2])
        modules.setdefault(owner, {})[part] = entry
    return modules


def _eight_bits(owner: str, parts: Mapping[str, TensorEntry], weight: TensorEntry) -> Matrix:
    if len(weight.shape) != 2:
        raise PackingError(f"{weight.name} has {len(weight.shape)} dimensions and not two")
    require(owner, parts, {"SCB": (("F32", "F16", "BF16"), weight.shape[:1])})
    pieces = {"weight": weight.name, "scale": parts["SCB"].name}
    layout = RowsOfInt8((weight.shape[0], weight.shape[1]))
    return Matrix(weight.name, weight.shape, layout, pieces, beside(parts, pieces))


def _four_bits(owner: str, parts: Mapping[str, TensorEntry], weight: TensorEntry, read: Reader) -> Matrix:
    named = next((part for part in parts if part.startswith(f"weight.{STATE}")), None)
    if named is None:
        raise PackingError(f"{weight.name} lacks {weight.name}.{STATE}nf4, which tells its shape")
    state = _State.of(parts[named].name, bytes(read(parts[named].name).tolist()))
    count = math.prod(state.shape)
    blocks = -(-count // state.block)
    if math.prod(weight.shape) != -(-count // 2):
        raise PackingError(f"{weight.name} holds {math.prod(weight.shape):,} bytes where {-(-count // 2):,} would fit")
    nested = state.nested is not None
    needs = {"absmax": (("U8",) if nested else ("F32",), (blocks,)), "quant_map": (("F32",), (_TABLE,))}
    if state.nested is not None:
        needs["nested_absmax"] = (("F32",), (-(-blocks // state.nested),))
        needs["nested_quant_map"] = (("F32",), (_NESTED_TABLE,))
    require(owner, parts, {f"weight.{part}": need for part, need in needs.items()})
    pieces = {"weight": weight.name, "scale": parts["weight.absmax"].name}
    pieces |= {"nested": parts["weight.nested_absmax"].name} if nested else {}
    more = {role.removeprefix("weight."): name for role, name in beside(parts, pieces).items()}
    return Matrix(weight.name, state.shape, TableOf16(state), pieces, more)


@dataclass(frozen=True, slots=True)
class RowsOfInt8:
    """Whole numbers and the largest size of each row."""

    shape: tuple[int, int]
    title: str = "bitsandbytes int8"

    def unpack(self, parts: Parts) -> Tensor:
        """Return W = q s / 127."""
        return parts["weight"].float() * (parts["scale"].float() / _WHOLE).unsqueeze(1)

    def pack(self, weight: Tensor, parts: Parts) -> Parts:
        """Return rounded rows, with s = max |W| of each where the size before loses more."""
        before = parts["scale"]

        def fitting(part: Tensor) -> Iterator[Scales]:
            yield (part.abs().amax(1).to(before.dtype).float(),)

        (scales,) = least_loss(weight, fitting, (before.float(),), _in_127_steps)
        spread = scales.unsqueeze(1).expand(weight.shape)
        stored = shaped(weight, self.unpack(parts), (spread,), _in_127_steps)
        return {"weight": stored, "scale": scales.to(before.dtype)}


def _in_127_steps(part: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
    step = (scales[0] / _WHOLE).unsqueeze(1)
    stored = (part / torch.where(step > 0, step, 1)).round_().clamp_(-_WHOLE, _WHOLE).to(torch.int8)
    return stored, stored.float() * step


@dataclass(frozen=True, slots=True)
class _State:
    """What a file says of one matrix of four bits."""

    kind: str
    shape: tuple[int, ...]
    block: int
    nested: int | None
    offset: float

    @classmethod
    def of(cls, name: str, text: bytes) -> _State:
        """Read it from its JSON; raises :class:`PackingError`."""
        try:
            said = json.loads(text)
            shape, block, nested = said["shape"], said["blocksize"], said.get("nested_blocksize")
            sizes = [*shape, block, *([] if nested is None else [nested])]
            if not all(type(size) is int and 0 < size < 1 << 40 for size in sizes) or len(shape) != 2:
                raise ValueError("its sizes are none")
            offset = float(said.get("nested_offset", 0.0))
            return cls(str(said["quant_type"]), (shape[0], shape[1]), block, nested, offset)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PackingError(f"{name} does not describe a matrix ({error})") from error


@dataclass(frozen=True, slots=True)
class TableOf16:
    """Numbers of a table, one scale for each block of them."""

    state: _State

    @property
    def title(self) -> str:
        """The table and the sizes of blocks."""
        twice = "" if self.state.nested is None else ", scales quantised"
        return f"bitsandbytes {self.state.kind}, blocks of {self.state.block}{twice}"

    def unpack(self, parts: Parts) -> Tensor:
        """Return W = t[q] s."""
        codes = self._codes(parts["weight"])
        values = parts["quant_map"].float()[codes.int()].reshape(self.state.shape)
        return values * self._spread(self._scales(parts))

    def pack(self, weight: Tensor, parts: Parts) -> Parts:
        """Return the nearest numbers of the table, with s = max |W| of a block where the scale before loses more."""
        table, blocks = _Table(parts["quant_map"].float()), self._split(weight.reshape(-1))
        before = self._scales(parts)

        def fitting(part: Tensor) -> Iterator[Scales]:
            yield (part.abs().amax(1) / table.largest,)

        (scales,) = least_loss(blocks, fitting, (before,), table.rounded)
        stored = self._packed_scales(scales, parts)
        # Rounded with the scales that a reader gets, so that what was lost in quantising them is made up for.
        spread = self._spread(self._scales({**parts, **stored}))
        codes = shaped(weight, self.unpack(parts), (spread,), table.rounded).reshape(-1)
        old = self._codes(parts["weight"])
        # A table may hold a number twice, such as zero with either sign.
        codes = torch.where(table.values[old.int()] == table.values[codes.int()], old, codes)
        padded = torch.nn.functional.pad(codes, (0, len(codes) % 2))
        return {"weight": (padded[0::2] << 4 | padded[1::2]).reshape(parts["weight"].shape), **stored}

    def _codes(self, stored: Tensor) -> Tensor:
        pairs = stored.reshape(-1)
        return torch.stack((pairs >> 4, pairs & 0xF), 1).reshape(-1)[: math.prod(self.state.shape)]

    def _split(self, values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, -len(values) % self.state.block)).reshape(-1, self.state.block)

    def _spread(self, scales: Tensor) -> Tensor:
        """Return the scale of every number."""
        count = math.prod(self.state.shape)
        return scales.repeat_interleave(self.state.block)[:count].reshape(self.state.shape)

    def _scales(self, parts: Parts) -> Tensor:
        """Return the scale of every block."""
        if self.state.nested is None:
            return parts["scale"].float()
        values = parts["nested_quant_map"].float()[parts["scale"].int()]
        spread = parts["nested"].float().repeat_interleave(self.state.nested)[: len(values)]
        return values * spread + self.state.offset

    def _packed_scales(self, scales: Tensor, parts: Parts) -> dict[str, Tensor]:
        if self.state.nested is None:
            return {"scale": scales}
        table, outer = _Table(parts["nested_quant_map"].float()), parts["nested"].float()
        blocks = Blocks((1, len(scales)), 1, self.state.nested)
        shifted = blocks.split((scales - self.state.offset).unsqueeze(0))

        def fitting(part: Tensor) -> Iterator[Scales]:
            yield (part.abs().amax(1) / table.largest,)

        (above,) = least_loss(shifted, fitting, (outer,), table.rounded)
        return {"scale": blocks.join(table.rounded(shifted, (above,))[0]).reshape(-1), "nested": above}


class _Table:
    """Numbers that codes stand for, and the code of the nearest one."""

    def __init__(self, values: Tensor):
        self.values, self.largest = values, float(values.abs().max())
        ordered, self._codes = torch.sort(values)
        self._between = (ordered[1:] + ordered[:-1]) / 2

    def rounded(self, part: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        """Return codes and numbers of some blocks."""
        spread = scales[0].unsqueeze(1)
        places = torch.bucketize(part / torch.where(spread != 0, spread, 1), self._between)
        codes = self._codes[places]
        return codes.to(torch.uint8), self.values[codes] * spread
