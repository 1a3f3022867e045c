"""A weight in the pieces in which a file stores it, where those are not simply its numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from editcli.storage.checkpoint import DTYPES
from editcli.storage.files import tensor_bytes, tensor_digest

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a file: ``data`` holds its bytes, and ``kind`` is the file's name of their type."""

    kind: str
    data: Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight that is stored in a type of its own, such as blocks of low precision or numbers with scales."""

    pieces: Mapping[str, Piece]
    """What is stored, by the names in the file."""
    value: Tensor
    """The numbers that a reader of the pieces gets, in the model's layout."""


Stored = Tensor | Packed
"""A weight as it is stored: a plain tensor under the weight's name, or several pieces."""


def pieces_of(name: str, stored: Stored) -> Mapping[str, Piece]:
    """Return the pieces of a weight by their names in the file."""
    return stored.pieces if isinstance(stored, Packed) else {name: Piece(_NAMES[stored.dtype], stored)}


def value_of(stored: Stored) -> Tensor:
    """Return the numbers that a reader of the file gets."""
    return stored.value if isinstance(stored, Packed) else stored


def merged(parts: Mapping[str, Stored]) -> Packed:
    """Return the weight that a reader stacks from parts that are stored one by one."""
    pieces = {key: piece for name, part in parts.items() for key, piece in pieces_of(name, part).items()}
    return Packed(pieces, torch.stack([value_of(part) for part in parts.values()]))


def stored_digest(stored: Stored) -> str:
    """Return the sha256 of a weight's content as it lies in the file, of several pieces in the order of their names."""
    if not isinstance(stored, Packed):
        return tensor_digest(stored)
    digest = hashlib.sha256()
    for name in sorted(stored.pieces):
        digest.update(tensor_bytes(stored.pieces[name].data))
    return digest.hexdigest()
