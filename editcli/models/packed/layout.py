"""What a format of few bits is: which tensors of a file make a weight, its numbers, and how they are stored again.

A :class:`Format` looks at a config and at the names of the tensors, and names the weights that it has packed. Each of
them is a :class:`Matrix`, and the :class:`Layout` of the matrix is its arithmetic: numbers from pieces, and pieces from
numbers. A layout reads no file and asks no library, so that a format works without the package that quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from editcli.models.packed.blocks import Blocks
from editcli.storage.checkpoint import TensorEntry

Parts = Mapping[str, Tensor]
"""The pieces of one matrix by their roles in its layout."""
Reader = Callable[[str], Tensor]
"""Reads one tensor of a file by its name."""


FLOATS = ("F32", "F16", "BF16")
"""Types in which scales are stored."""


class PackingError(ValueError):
    """What keeps a weight or a model from being read or written, as the end of a sentence that names it."""


class Layout(Protocol):
    """How one matrix is stored."""

    @property
    def title(self) -> str:
        """What to call it beside the types of plain tensors."""
        ...

    def unpack(self, parts: Parts) -> Tensor:
        """Return the float32 numbers that a reader of the pieces gets; raise :class:`PackingError` if it cannot."""
        ...

    def pack(self, weight: Tensor, parts: Parts) -> Parts:
        """Return the pieces that store ``weight``, float32, in the types and shapes of those that stored it before.

        Numbers that the pieces before held exactly stay as they were stored.
        """
        ...


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight that is stored in pieces."""

    name: str
    """The name of the weight, as the file would call it if it were stored plainly."""
    shape: tuple[int, ...]
    layout: Layout
    pieces: Mapping[str, str]
    """The stored tensors that change with the weight, by their roles."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """The stored tensors that belong to it and stay as they are."""


class Format(Protocol):
    """One way of quantising whole models."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    def knows(self, said: Mapping[str, Any]) -> bool:
        """Tell whether ``said``, the ``quantization_config`` of a model, is of this format.

        Raises :class:`PackingError` for a variant of the format that cannot be written again.
        """
        ...

    def matrices(self, said: Mapping[str, Any], entries: Mapping[str, TensorEntry], read: Reader) -> Iterator[Matrix]:
        """Yield the packed weights of a file; raise :class:`PackingError` where pieces are missing or do not fit.

        ``read`` is for small pieces that tell shapes.
        """
        ...


def siblings(entries: Mapping[str, TensorEntry]) -> Mapping[str, Mapping[str, TensorEntry]]:
    """Return the tensors of each module by the last part of their names."""
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        owner, _, part = name.rpartition(".")
        modules.setdefault(owner, {})[part] = entry
    return modules


def beside(parts: Mapping[str, TensorEntry], pieces: Mapping[str, str]) -> dict[str, str]:
    """Return the other tensors of a packed module, which belong to its weight; a bias is a weight of its own."""
    taken = set(pieces.values())
    return {role: one.name for role, one in parts.items() if role != "bias" and one.name not in taken}


Needs = Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]
"""Types that will do and the shape, by the last part of a tensor's name."""


def require(owner: str, parts: Mapping[str, TensorEntry], needs: Needs) -> None:
    """Raise :class:`PackingError` unless a module has these tensors."""
    for part, (kinds, shape) in needs.items():
        entry = parts.get(part)
        if entry is None:
            raise PackingError(f"{owner} lacks {part}")
        if entry.dtype not in kinds or entry.shape != shape:
            raise PackingError(
                f"{owner}.{part} is {entry.dtype} {by(entry.shape)} where {kinds[0]} {by(shape)} would fit"
            )


def by(shape: tuple[int, ...]) -> str:
    """Write a shape."""
    return " x ".join(map(str, shape)) or "single"


def blocks_of(shape: tuple[int, int], scale: TensorEntry, said: Iterable[Any] = ()) -> Blocks:
    """Return the blocks that have one scale each; raise :class:`PackingError` where the scales do not tell them.

    ``said`` are sizes of blocks, (rows, columns), that a config names: blocks at the edges may be parts of one. Where
    none of them fits, as many equal blocks as there are scales make up the matrix.
    """
    rows, columns = (*scale.shape, 1, 1)[:2] if scale.shape else (1, 1)
    if scale.dtype in FLOATS and len(scale.shape) <= 2 and rows and columns:
        for sizes in filter(_are_sizes, said):
            blocks = Blocks(shape, *sizes)
            if blocks.grid == (rows, columns):
                return blocks
        if not shape[0] % rows and not shape[1] % columns:
            return Blocks(shape, shape[0] // rows, shape[1] // columns)
    raise PackingError(
        f"the scales {scale.name} ({scale.dtype}, {by(scale.shape)}) do not fit their matrix ({by(shape)}) in a way "
        "that editcli knows"
    )


def _are_sizes(said: Any) -> bool:
    return isinstance(said, list) and len(said) == 2 and all(type(part) is int and part > 0 for part in said)
