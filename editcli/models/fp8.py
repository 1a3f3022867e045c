"""Checkpoints whose matrices are stored in eight-bit floats with scales, as DeepSeek, Qwen and others ship them.

A matrix q of type E4M3 lies beside its scales s, one for each block, row or tensor: W = q * s (DeepSeek-V3, 2412.19437,
section 3.3). A weight is read as that product and written as q and s again, in the same types and blocks, with
s = max |W| / 448 over each block. Everything else is copied byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editcli.errors import ModelError
from editcli.storage.checkpoint import Checkpoint, TensorEntry
from editcli.storage.choice import CONFIG
from editcli.storage.opening import CONFIG as CONFIG_KIND
from editcli.storage.opening import read_text
from editcli.storage.packing import Packed, Piece

METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors")
"""Values of ``quant_method`` whose checkpoints may store matrices in this way."""
STORED, SCALES = "F8_E4M3", ("weight_scale_inv", "weight_scale")
LARGEST = float(torch.finfo(torch.float8_e4m3fn).max)
_SCALE_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def quantisation_of(folder: Path) -> Mapping[str, Any]:
    """Return what a config says of quantised weights; empty where it says nothing or cannot be read."""
    try:
        fields = json.loads(read_text(folder / CONFIG, CONFIG_KIND, folder=folder))
    except (OSError, ValueError, RecursionError):
        # Building the model reads the config as well, and refuses it with its reason.
        return {}
    said = fields.get("quantization_config") if isinstance(fields, dict) else None
    return said if isinstance(said, dict) else {}


class Fp8Checkpoint(Checkpoint):
    """A folder of safetensors files in which some matrices are eight-bit floats with scales."""

    def __init__(self, folder: Path, names: Callable[[Checkpoint], Mapping[str, tuple[str, ...]]] | None = None):
        super().__init__(folder, names)

    @cached_property
    def pieces(self) -> Mapping[str, TensorEntry]:
        """All stored tensors, the scales among them."""
        return super().entries

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """The weights; a matrix with scales counts as float32, and its scales as a part of it."""
        packed = {name.rpartition(".")[0] for name in self.scales}
        logical = {}
        for name, entry in self.pieces.items():
            owner, _, part = name.rpartition(".")
            if name in self.scales:
                logical[name] = TensorEntry(name, entry.file, "F32", entry.shape, entry.start, entry.stop)
            elif owner not in packed or part == "bias":
                logical[name] = entry
        return logical

    @cached_property
    def scales(self) -> Mapping[str, str]:
        """The name of the scales of each matrix that has some."""
        owners = (name.rpartition(".")[0] for name, entry in self.pieces.items() if entry.dtype == STORED)
        found = ((f"{owner}.weight", f"{owner}.{part}") for owner in owners for part in SCALES)
        return {name: scale for name, scale in found if name in self.pieces and scale in self.pieces}

    def stored_as(self, name: str) -> str:
        """Return the type of a weight as the files call it."""
        return f"{STORED} with scales" if name in self.scales else super().stored_as(name)

    def read(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """Return one weight, multiplied by its scales."""
        if name not in self.entries:
            return super().read(name, device)
        if name not in self.scales:
            return self._piece(name, device)
        stored = self._piece(name, device).float()
        return stored * self._spread(self._piece(self.scales[name], device).float(), stored.shape, name)

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return all weights in ``dtype``, of which one at a time is in float32."""
        return {name: self.read(name).to(dtype) for name in self.entries}

    def encode(self, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor | Packed:
        """Return a weight as eight-bit floats and scales of the types and blocks that it has in the files."""
        if name not in self.scales:
            return super().encode(name, weight, dtype)
        scale = self.scales[name]
        kind, shape = self.pieces[scale].dtype, self.pieces[scale].shape
        numbers = weight.detach().float().cpu()
        units = self._largest(numbers.abs(), name, shape) / LARGEST
        units = torch.where(units > 0, units, torch.ones_like(units))
        if self._has_powers(scale):
            units = torch.exp2(torch.ceil(torch.log2(units)))
        units = units.to(_SCALE_TYPES[kind])
        spread = self._spread(units.float(), numbers.shape, name)
        stored = (numbers / spread).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        pieces = {name: Piece(STORED, stored), scale: Piece(kind, units.reshape(shape))}
        return Packed(pieces, stored.float() * spread)

    def recoded(self, name: str, dtype: torch.dtype | None = None) -> tuple[str, str] | None:
        """Refuse another type for a matrix with scales; return None, as it is written in its own."""
        if dtype is not None and name in self.scales:
            raise ModelError(
                f"{name} of {self.folder} is stored as {self.stored_as(name)}, which every engine expects there; leave "
                "out --save-dtype"
            )
        if name in self.scales:
            self._block(name, self.pieces[name].shape)
        elif name not in self.entries:
            return super().recoded(name, dtype)
        return None

    def stored_digest(self, name: str) -> str:
        """Return the sha256 of a weight's content, that of its scales included."""
        return self.digest_of_pieces(piece for part in self.parts(name) for piece in self._with_scales(part))

    def digest_of(self, names: Iterable[str]) -> str:
        """Return a sha256 over the named weights and their scales."""
        return self.digest_of_pieces(piece for name in names for piece in self._with_scales(name))

    def reopened(self) -> Fp8Checkpoint:
        """Return this checkpoint with everything that is known of its files forgotten."""
        return Fp8Checkpoint(self.folder, self._names_of)

    def copy_in(self, folder: Path) -> Fp8Checkpoint:
        """Return the edited copy of this checkpoint in another folder."""
        return Fp8Checkpoint(folder, self._names_of)

    def _with_scales(self, name: str) -> tuple[str, ...]:
        return (name, self.scales[name]) if name in self.scales else (name,)

    def _piece(self, name: str, device: str | torch.device) -> Tensor:
        return super().read(name, device)

    def _has_powers(self, scale: str) -> bool:
        """Tell whether all scales of a matrix are powers of two, as some engines need them."""
        mantissa, _ = torch.frexp(self._piece(scale, "cpu").float())
        return bool((mantissa == 0.5).all())

    @cached_property
    def _blocks_said(self) -> tuple[int, int] | None:
        """The sizes of blocks that the config names."""
        said = quantisation_of(self.folder).get("weight_block_size")
        if isinstance(said, list) and len(said) == 2 and all(isinstance(part, int) and part > 0 for part in said):
            return said[0], said[1]
        return None

    def _block(self, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the sizes of the blocks that have one scale each; ``shape`` is the matrix's."""
        scale = self.pieces[self.scales[name]]
        rows, columns = (*scale.shape, 1, 1)[:2] if scale.shape else (1, 1)
        said = self._blocks_said
        # The last block of a row or column may be a part of one.
        if said is not None and (-(-shape[0] // said[0]), -(-shape[1] // said[1])) == (rows, columns):
            return said
        if scale.dtype not in _SCALE_TYPES or shape[0] % rows or shape[1] % columns or len(scale.shape) > 2:
            raise ModelError(
                f"the scales {scale.name} of {self.folder} ({scale.dtype}, {' x '.join(map(str, scale.shape))}) do not "
                "fit their matrix in a way that editcli knows; edit the 16-bit original and convert the result"
            )
        return shape[0] // rows, shape[1] // columns

    def _spread(self, units: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
        """Return the scale of every number of a matrix."""
        rows, columns = self._block(name, tuple(shape))
        grid = units.reshape(-(-shape[0] // rows), -(-shape[1] // columns))
        return grid.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]

    def _largest(self, sizes: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the largest of the numbers of every block, in the shape of the scales."""
        rows, columns = self._block(name, tuple(sizes.shape))
        pad = (-sizes.shape[1] % columns, -sizes.shape[0] % rows)
        padded = torch.nn.functional.pad(sizes, (0, pad[0], 0, pad[1]))
        grid = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
        return grid.amax(dim=(1, 3)).reshape(shape)


def is_fp8(folder: Path) -> bool:
    """Tell whether a folder's config speaks of eight-bit floats and all that is packed in its files is of that kind."""
    if quantisation_of(folder).get("quant_method") not in METHODS:
        return False
    checkpoint = Fp8Checkpoint(folder)
    eight = {name for name, entry in checkpoint.pieces.items() if entry.dtype == STORED}
    return bool(eight) and eight == checkpoint.scales.keys()
