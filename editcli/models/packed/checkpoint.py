"""A folder of safetensors files in which some weights are packed: read as float32, written as they were stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editcli.errors import ModelError
from editcli.models.packed.layout import Format, Matrix, PackingError, Parts
from editcli.storage.checkpoint import Checkpoint, TensorEntry
from editcli.storage.packing import Packed, Piece

WAY_OUT = "edit the 16-bit original and quantise the result"
_LOGICAL = "F32"


class PackedCheckpoint(Checkpoint):
    """The weights of a quantised model: a packed one counts as float32, and its pieces as parts of it."""

    def __init__(
        self,
        folder: Path,
        names: Callable[[Checkpoint], Mapping[str, tuple[str, ...]]] | None = None,
        *,
        form: Format,
        said: Mapping[str, Any],
    ):
        """Take a folder, its format and the ``quantization_config`` of its model."""
        super().__init__(folder, names)
        self.form, self.said = form, said

    @property
    def way_to_finer_types(self) -> str:
        """Leave the format, as every packed weight is written in its own."""
        return WAY_OUT

    @cached_property
    def pieces(self) -> Mapping[str, TensorEntry]:
        """All stored tensors, parts of weights among them."""
        return self.loaded

    @cached_property
    def matrices(self) -> Mapping[str, Matrix]:
        """The packed weights by name; raises :class:`ModelError` where pieces are missing or do not fit."""
        with self._in_one_sentence():
            matrices = {one.name: one for one in self.form.matrices(self.said, self.pieces, self._piece)}
        if not matrices:
            raise ModelError(
                f"the config of {self.folder} says that its weights are quantised ({self.form.name}), but no tensor in "
                "its files is; remove quantization_config from config.json, or download the model again"
            )
        return matrices

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """The weights; the place of a packed one is that of its first piece."""
        parts = {name for one in self.matrices.values() for name in (*one.pieces.values(), *one.beside.values())}
        logical = {name: entry for name, entry in self.pieces.items() if name not in parts}
        for name, one in self.matrices.items():
            first = self.pieces[next(iter(one.pieces.values()))]
            logical[name] = TensorEntry(name, first.file, _LOGICAL, one.shape, first.start, first.stop)
        return logical

    def stored_as(self, name: str) -> str:
        """Return the type of a weight as the files call it, or what its layout is called."""
        return self.matrices[name].layout.title if name in self.matrices else super().stored_as(name)

    def read(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """Return one weight, a packed one as float32."""
        one = self.matrices.get(name)
        if one is None:
            return self._piece(name, device)
        with self._in_one_sentence(name):
            return one.layout.unpack(self._parts(one)).to(device)

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return all weights in ``dtype``, of which one at a time is in float32."""
        return {name: self.read(name).to(dtype) for name in self.entries}

    def encode(self, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor | Packed:
        """Return a weight packed again, in pieces of the types and shapes that it has in the files."""
        one = self.matrices.get(name)
        if one is None:
            return super().encode(name, weight, dtype)
        before, weight = self._parts(one), weight.detach().float().cpu()
        with self._in_one_sentence(name):
            value = one.layout.unpack(before)
            after: Parts = {role: before[role] for role in one.pieces}
            # Of hundreds of experts, an edit reaches a few; to pack the others again would take minutes.
            if not torch.equal(value, weight):
                after = one.layout.pack(weight, before)
                value = one.layout.unpack({**before, **after})
        pieces = {}
        for role, part in after.items():
            assert (part.dtype, part.shape) == (before[role].dtype, before[role].shape), "engines read these"
            stored = one.pieces[role]
            pieces[stored] = Piece(self.pieces[stored].dtype, part.contiguous())
        return Packed(pieces, value)

    def recoded(self, name: str, dtype: torch.dtype | None = None) -> tuple[str, str] | None:
        """Refuse another type for a packed weight; return None, as it is written in its own."""
        if dtype is not None and name in self.matrices:
            raise ModelError(
                f"{name} of {self.folder} is stored as {self.stored_as(name)}, which every engine expects there; leave "
                "out --save-dtype"
            )
        return None if name in self.entries else super().recoded(name, dtype)

    def stored_digest(self, name: str) -> str:
        """Return the sha256 of a weight's content, of several pieces in the order of their names."""
        return self.digest_of_pieces(piece for part in self.parts(name) for piece in self._stored_names(part))

    def digest_of(self, names: Iterable[str]) -> str:
        """Return a sha256 over the pieces of the named weights."""
        return self.digest_of_pieces(piece for name in names for piece in self._stored_names(name))

    def is_like(self, other: Checkpoint) -> bool:
        """Tell whether another folder holds the same files and packs its weights in the same way."""
        return isinstance(other, PackedCheckpoint) and other.form == self.form and super().is_like(other)

    def reopened(self) -> PackedCheckpoint:
        """Return this checkpoint with everything that is known of its files forgotten."""
        return self.copy_in(self.folder)

    def copy_in(self, folder: Path) -> PackedCheckpoint:
        """Return the edited copy of this checkpoint in another folder."""
        return PackedCheckpoint(folder, self._names_of, form=self.form, said=self.said)

    def _piece(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        return super().read(name, device)

    def _parts(self, one: Matrix) -> Parts:
        return {role: self._piece(name) for role, name in (*one.pieces.items(), *one.beside.items())}

    def _stored_names(self, name: str) -> tuple[str, ...]:
        return tuple(self.matrices[name].pieces.values()) if name in self.matrices else (name,)

    @contextmanager
    def _in_one_sentence(self, name: str = "") -> Iterator[None]:
        what = f"{name} of {self.folder}" if name else str(self.folder)
        try:
            yield
        except PackingError as error:
            raise ModelError(
                f"{what} cannot be read as {self.form.name}: {error}; download the model again, or {WAY_OUT}"
            ) from error
