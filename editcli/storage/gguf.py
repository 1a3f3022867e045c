"""The header of a GGUF file, read in bounded memory, and the writing of a copy in which some tensors are others.

A GGUF holds metadata, the list of its tensors, and their data, each in blocks of a type of its own. The libraries that
read it trust its counts and lengths: they build one object for every element of every array. So everything is checked
here, against the size of the file and against the most that a real model has, before a library opens the file.
The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from editcli.errors import ModelError
from editcli.formatting import shorten
from editcli.storage.checkpoint import CHUNK, TensorEntry, refuse_overlaps
from editcli.storage.files import atomic, copy_into, tensor_bytes
from editcli.storage.opening import GGUF, open_regular
from editcli.storage.packing import Piece

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SUFFIX = ".gguf"

MAX_FIELDS, MAX_TENSORS, MAX_ELEMENTS = 1 << 16, 1 << 17, 1 << 21
"""Metadata fields, tensors, and elements of all arrays. A vocabulary of 262,144 tokens has 1.3 million elements."""
MAX_HEADER, MAX_TEXT, MAX_NAME = 256 << 20, 4 << 20, 1 << 10
"""Bytes of the whole header, of a text, and of a name."""
_MAX_DIMENSIONS = 4
_ALIGNMENT = 32

_SCALARS: Mapping[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Block:
    """A type of tensors: ``size`` bytes hold ``length`` numbers of one row."""

    kind: str
    number: int
    length: int
    size: int

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """Return how many bytes a tensor takes; its rows are whole blocks."""
        return math.prod(shape) // self.length * self.size


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A checked header; offsets count from the start of the file."""

    path: Path
    size: int
    fields: Mapping[str, Any]
    """Numbers and texts of the metadata by key; of an array, its length."""
    tensors: Mapping[str, TensorEntry]
    """Every tensor in the order of the list, its shape with the rows first and its block type as ``dtype``."""
    listed: int
    """Where the list of tensors begins: up to there are the metadata."""
    alignment: int

    @property
    def architecture(self) -> str:
        """Return the name that llama.cpp has for the model's architecture."""
        return str(self.fields["general.architecture"])

    @property
    def layers(self) -> int:
        """Return the number of decoder blocks."""
        return int(self.fields[f"{self.architecture}.block_count"])


def read_gguf(path: Path) -> GgufHeader:
    """Return the header of a GGUF file; raise :class:`ModelError` unless all that it says can be true."""
    with open_regular(path, GGUF) as file:
        return _Parser(file, path).header()


def blocks() -> Mapping[str, Block]:
    """Return all block types by name, as the package ``gguf`` knows them; :class:`ModelError` without it."""
    constants = gguf_library().constants
    sizes = constants.GGML_QUANT_SIZES.items()
    return {kind.name: Block(kind.name, int(kind), length, size) for kind, (length, size) in sizes}


def gguf_library() -> Any:
    """Return the package ``gguf``; raise :class:`ModelError` where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError("reading a GGUF file needs the package gguf: pip install 'editcli[gguf]'") from error
    return gguf


class _Parser:
    """Reads one header from its beginning to its end."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.position = self.elements = 0
        self.kinds = {block.number: block for block in blocks().values()}

    def header(self) -> GgufHeader:
        """Return the whole header."""
        tensors, fields = self._begin()
        known = dict(self._fields(fields))
        alignment = known.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self._damaged(f"its alignment is {shorten(repr(alignment))}")
        self._refuse_unusable(known, tensors)
        listed = self.position
        raw = [self._entry() for _ in range(tensors)]
        base = aligned(self.position, alignment)
        entries: dict[str, TensorEntry] = {}
        for name, block, shape, offset in raw:
            if name in entries:
                raise self._damaged(f"it has two tensors of the name {shorten(name)}")
            entries[name] = self._placed(name, block, shape, offset, base=base, alignment=alignment)
        refuse_overlaps(self.path, entries.values())
        return GgufHeader(self.path, self.size, known, entries, listed, alignment)

    def _begin(self) -> tuple[int, int]:
        """Return the numbers of tensors and of fields."""
        if self.size < 24 or self.file.read(4) != MAGIC:
            raise ModelError(f"{self.path} is not a GGUF file; check the path, or download it again")
        self.position = 4
        version = self._number("I")
        if version not in VERSIONS:
            if int.from_bytes(struct.pack("<I", version), "big") in VERSIONS:
                raise ModelError(f"{self.path} is a big-endian GGUF, which editcli does not read; convert it")
            raise ModelError(f"{self.path} is a GGUF of version {version}; editcli reads 2 and 3, convert it again")
        tensors, fields = self._number("Q"), self._number("Q")
        if tensors > MAX_TENSORS or fields > MAX_FIELDS:
            raise self._damaged(f"its header claims {tensors:,} tensors and {fields:,} fields")
        return tensors, fields

    def _fields(self, count: int) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for _ in range(count):
            key = self._text(MAX_NAME)
            if key in seen:
                raise self._damaged(f"the field {shorten(key)} is in its header twice")
            seen.add(key)
            yield key, self._value(self._number("I"))

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text(MAX_TEXT)
        if kind != _ARRAY:
            return self._number(self._scalar(kind))
        inner, length = self._number("I"), self._number("Q")
        self.elements += length
        if self.elements > MAX_ELEMENTS:
            raise self._damaged(f"its header claims arrays of {self.elements:,} elements")
        if inner == _TEXT:
            for _ in range(length):
                self._take(self._number("Q"), MAX_TEXT)
        else:
            self._take(length * struct.calcsize(f"<{self._scalar(inner)}"), MAX_HEADER)
        return length

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self._damaged(f"its header has a value of the unknown type {kind}")
        return _SCALARS[kind]

    def _entry(self) -> tuple[str, Block, tuple[int, ...], int]:
        name, dimensions = self._text(MAX_NAME), self._number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"the tensor {shorten(name)} has {dimensions:,} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        number, offset = self._number("I"), self._number("Q")
        if number not in self.kinds:
            raise ModelError(
                f"the tensor {shorten(name)} of {self.path} is of the type {number}, which the installed gguf does not "
                "know; install a newer one, or copy the file again"
            )
        return name, self.kinds[number], shape, offset

    def _placed(
        self, name: str, block: Block, shape: tuple[int, ...], offset: int, *, base: int, alignment: int
    ) -> TensorEntry:
        if not all(shape) or shape[-1] % block.length:
            sizes = " x ".join(map(str, shape))
            raise self._damaged(f"the tensor {shorten(name)} is {sizes}, which {block.kind} cannot be")
        start, stop = base + offset, base + offset + block.bytes_of(shape)
        if offset % alignment:
            raise self._damaged(f"the tensor {shorten(name)} lies beside its place")
        if stop > self.size:
            raise ModelError(
                f"{self.path} is truncated: {shorten(name)} lies beyond its {self.size:,} bytes; copy it again"
            )
        return TensorEntry(name, self.path.name, block.kind, shape, start, stop)

    def _refuse_unusable(self, fields: Mapping[str, Any], tensors: int) -> None:
        name = fields.get("general.architecture")
        if not isinstance(name, str) or not name:
            raise ModelError(f"{self.path} does not name the architecture of its model; is it a language model?")
        if isinstance(parts := fields.get("split.count"), int) and parts > 1:
            raise ModelError(
                f"{self.path} is one of {parts:,} parts of a model; join them with llama.cpp's 'llama-gguf-split "
                "--merge' and pass the whole file"
            )
        layers = fields.get(f"{name}.block_count")
        if not isinstance(layers, int) or not 0 < layers <= tensors:
            said = "no number of layers" if layers is None else f"{shorten(repr(layers))} layers"
            raise self._damaged(f"it claims {said} and has {tensors:,} tensors")

    def _number(self, kind: str) -> Any:
        form = f"<{kind}"
        return struct.unpack(form, self._take(struct.calcsize(form), MAX_HEADER))[0]

    def _text(self, limit: int) -> str:
        try:
            return self._take(self._number("Q"), limit).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("a text of its header is no UTF-8") from error

    def _take(self, count: int, limit: int) -> bytes:
        """Read ``count`` bytes, of which there may be ``limit``."""
        if count > self.size - self.position:
            raise ModelError(f"{self.path} is truncated: its header ends beyond its {self.size:,} bytes; copy it again")
        self.position += count
        if count > limit or self.position > MAX_HEADER:
            raise self._damaged(f"a text or its whole header is longer than {min(limit, MAX_HEADER):,} bytes")
        data = self.file.read(count)
        if len(data) != count:
            raise ModelError(f"{self.path} became shorter while it was read; try again")
        return data

    def _damaged(self, what: str) -> ModelError:
        return ModelError(f"{self.path} is damaged: {what}; download or copy it again")


def aligned(position: int, alignment: int) -> int:
    """Return the next multiple of ``alignment``."""
    return -(-position // alignment) * alignment


def write_gguf(base: GgufHeader, target: Path, tensors: Mapping[str, Piece]) -> None:
    """Write a copy of a GGUF, atomically, with the tensors in ``tensors`` instead of those of their names.

    Everything else is copied byte for byte. Where a tensor is of another type than before, the list of tensors says so
    and where the later ones lie then.
    """
    with atomic(target) as file:
        if all(piece.kind == base.tensors[name].dtype for name, piece in tensors.items()):
            copy_into(file, base.path)
            for name, piece in tensors.items():
                file.seek(base.tensors[name].start)
                file.write(tensor_bytes(piece.data))
            file.seek(0, os.SEEK_END)
            return
        with open_regular(base.path, GGUF) as source:
            _rewrite(base, source, file, tensors)


def _rewrite(base: GgufHeader, source: BinaryIO, file: IO[bytes], tensors: Mapping[str, Piece]) -> None:
    _copy(source, file, 0, base.listed)
    kinds = {name: tensors[name].kind if name in tensors else entry.dtype for name, entry in base.tensors.items()}
    known, offset, offsets = blocks(), 0, dict[str, int]()
    places = sorted(base.tensors.values(), key=lambda entry: entry.start)
    for entry in places:
        offsets[entry.name] = offset
        offset = aligned(offset + known[kinds[entry.name]].bytes_of(entry.shape), base.alignment)
    for name, entry in base.tensors.items():
        file.write(_listing(entry, known[kinds[name]], offsets[name]))
    for entry in places:
        file.write(bytes(aligned(file.tell(), base.alignment) - file.tell()))
        if entry.name in tensors:
            file.write(tensor_bytes(tensors[entry.name].data))
        else:
            _copy(source, file, entry.start, entry.stop)
    file.write(bytes(aligned(file.tell(), base.alignment) - file.tell()))


def _listing(entry: TensorEntry, block: Block, offset: int) -> bytes:
    name = entry.name.encode()
    sizes = struct.pack(f"<{len(entry.shape)}Q", *reversed(entry.shape))
    head = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(entry.shape))
    return head + sizes + struct.pack("<IQ", block.number, offset)


def _copy(source: BinaryIO, file: IO[bytes], start: int, stop: int) -> None:
    source.seek(start)
    remaining = stop - start
    while remaining:
        data = source.read(min(CHUNK, remaining))
        if not data:
            raise OSError(f"{source.name} ends before its byte {stop:,}")
        file.write(data)
        remaining -= len(data)


def same_metadata(one: GgufHeader, other: GgufHeader) -> bool:
    """Tell whether two files have the same metadata, byte for byte."""
    if one.listed != other.listed:
        return False
    with open_regular(one.path, GGUF) as a, open_regular(other.path, GGUF) as b:
        return a.read(one.listed) == b.read(other.listed)


def lists(one: GgufHeader) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Return the names and shapes of all tensors, in the order of their list."""
    return [(name, entry.shape) for name, entry in one.tensors.items()]
