"""Checkpoints whose matrices are stored in eight-bit floats with scales, as DeepSeek, Qwen and others ship them.

A matrix q of type E4M3 lies beside its scales s, one for each block, row or tensor: W = q * s (DeepSeek-V3, 2412.19437,
section 3.3). A weight is read as that product and written as q and s again, in the same types and blocks, with
s = max |W| / 448 over each block unless the scale before loses less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from editcli.models.packed.blocks import Blocks, Scales, least_loss
from editcli.models.packed.layout import Matrix, PackingError, Parts, Reader, beside, blocks_of, siblings
from editcli.models.packed.shaping import shaped
from editcli.storage.checkpoint import TensorEntry

STORED, SCALES = "F8_E4M3", ("weight_scale_inv", "weight_scale")
_E4M3 = torch.float8_e4m3fn
LARGEST = float(torch.finfo(torch.float8_e4m3fn).max)


@dataclass(frozen=True, slots=True)
class EightBitFloats:
    """E4M3 numbers and one scale for each block."""

    blocks: Blocks
    title: str = f"{STORED} with scales"

    def unpack(self, parts: Parts) -> Tensor:
        """Return numbers times scales."""
        return parts["weight"].float() * self.blocks.spread(parts["scale"].float())

    def pack(self, weight: Tensor, parts: Parts) -> Parts:
        """Return numbers and scales; where all scales were powers of two, as some engines need them, they stay such."""
        before = parts["scale"]
        powers = bool((torch.frexp(before.float())[0] == 0.5).all())

        def fitting(part: Tensor) -> Iterator[Scales]:
            units = part.abs().amax(1) / LARGEST
            units = torch.where(units > 0, units, torch.ones_like(units))
            yield ((torch.exp2(torch.ceil(torch.log2(units))) if powers else units).to(before.dtype).float(),)

        (scales,) = least_loss(self.blocks.split(weight), fitting, (before.float().reshape(-1),), _rounded)
        numbers = shaped(weight, self.unpack(parts), (self.blocks.spread(scales),), _rounded)
        return {"weight": numbers.to(_E4M3), "scale": scales.to(before.dtype).reshape(before.shape)}


def _rounded(part: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
    spread = scales[0].unsqueeze(1)
    stored = (part / spread).clamp(-LARGEST, LARGEST).to(_E4M3).float()
    return stored, stored * spread


class Fp8:
    """Eight-bit floats as transformers' own quantiser and fbgemm store them."""

    name = "FP8"

    def knows(self, said: Mapping[str, Any]) -> bool:
        """Tell it by the method."""
        return said.get("quant_method") in ("fp8", "fbgemm_fp8")

    def matrices(self, said: Mapping[str, Any], entries: Mapping[str, TensorEntry], read: Reader) -> Iterator[Matrix]:
        """Yield every matrix of E4M3 numbers; one without scales is an error."""
        for parts in siblings(entries).values():
            for entry in parts.values():
                if entry.dtype == STORED:
                    yield eight_bit_floats(parts, entry, [said.get("weight_block_size")])


def eight_bit_floats(parts: Mapping[str, TensorEntry], entry: TensorEntry, said: Sequence[Any]) -> Matrix:
    """Return the matrix of one module; ``said`` are sizes of blocks that the config names."""
    scale = next((parts[part] for part in SCALES if part in parts), None)
    if scale is None or not entry.name.endswith(".weight"):
        raise PackingError(f"{entry.name} is {STORED} and has no {' or '.join(SCALES)}")
    if len(entry.shape) != 2:
        raise PackingError(f"{entry.name} has {len(entry.shape)} dimensions and not two")
    layout = EightBitFloats(blocks_of((entry.shape[0], entry.shape[1]), scale, said))
    pieces = {"weight": entry.name, "scale": scale.name}
    return Matrix(entry.name, entry.shape, layout, pieces, beside(parts, pieces))
