"""A safetensors checkpoint on disk, tensor by tensor, without building a model.

Headers are read here rather than through the library because saving an edited model replaces exactly the bytes of the
tensors that changed: for that the byte range of each tensor is needed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from editcli.errors import FileError, ModelError
from editcli.formatting import shorten
from editcli.storage.choice import CONFIG, Choice, choose, left_out, listed
from editcli.storage.lines import no_constant
from editcli.storage.opening import INDEX, TENSORS, Kind, open_regular, read_text

if TYPE_CHECKING:
    from editcli.storage.packing import Stored

_MAX_HEADER = 100 << 20
_MAX_DIMENSIONS = 64
CHUNK = 1 << 18
"""Bytes read at a time: larger pieces get fresh memory from the system each time, which costs more than reading."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The place of one tensor: ``start`` and ``stop`` are byte offsets in the file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """The weights of a model on disk: read by name, and written as they were but for some.

    This class is a folder of safetensors files whose tensors are the weights themselves. Where a format packs weights
    in another way, a subclass says what a weight is called, how it is read and in which pieces it is stored. Raises
    :class:`ModelError` where there is no usable checkpoint.
    """

    def __init__(self, folder: Path | str, names: Callable[[Checkpoint], Mapping[str, tuple[str, ...]]] | None = None):
        """Take a folder; ``names`` tells under which name each parameter is stored, where transformers renames it."""
        self.folder, self._names_of = Path(folder), names

    @cached_property
    def renamed(self) -> Mapping[str, tuple[str, ...]]:
        """The stored name of each parameter, as far as transformers can build the model.

        Several for a parameter that it stacks, as it does the matrices of experts that are stored one by one.
        """
        return {} if self._names_of is None else self._names_of(self)

    @property
    def place(self) -> Path:
        """The path under which the model can be opened again."""
        return self.folder

    @property
    def described_by(self) -> str:
        """What tells the sizes of the model, for messages."""
        return CONFIG

    @property
    def description(self) -> str:
        """Where the sizes of the model are told, for messages."""
        return str(self.folder / CONFIG)

    @property
    def way_to_finer_types(self) -> str:
        """What to do where updates are smaller than the stored type can hold."""
        return "try --save-dtype float32"

    @property
    def saved_files(self) -> tuple[str, ...]:
        """The files of weights of an edited copy."""
        return self.files

    @cached_property
    def pieces(self) -> Mapping[str, TensorEntry]:
        """All tensors that an edited copy holds, by their names in the files."""
        return self.entries

    def reopened(self) -> Checkpoint:
        """Return this checkpoint with everything that is known of its files forgotten."""
        return Checkpoint(self.folder, self._names_of)

    def copy_in(self, folder: Path) -> Checkpoint:
        """Return the edited copy of this checkpoint in another folder."""
        return Checkpoint(folder, self._names_of)

    def encode(self, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> Stored:
        """Return a weight, in the model's layout, as this checkpoint stores it.

        ``dtype`` is the type to store; None is the checkpoint's own, or the nearest better one that can be written.
        """
        if name in self.entries:
            return weight.detach().to(dtype or self.dtype(name))
        from editcli.storage.packing import merged

        parts = zip(self.parts(name), weight, strict=True)
        return merged({part: self.encode(part, slice_, dtype) for part, slice_ in parts})

    def recoded(self, name: str, dtype: torch.dtype | None = None) -> tuple[str, str] | None:
        """Return the types of a weight now and once it is written where no other was asked for; None if they agree.

        Raises :class:`ModelError` where the weight cannot be written so.
        """
        kinds = [] if name in self.entries else [self.recoded(part, dtype) for part in self.parts(name)]
        return next((kind for kind in kinds if kind is not None), None)

    def stored_as(self, name: str) -> str:
        """Return what the files call the type of a weight."""
        return str(self.dtype(name)).removeprefix("torch.")

    def state(self, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """Return all weights in ``dtype``; None where transformers itself reads the files as they are."""
        return None

    def stored_digest(self, name: str) -> str:
        """Return the sha256 of a weight's content as it lies in the files."""
        return self.digest_of_pieces(self.parts(name))

    def digest_of_pieces(self, names: Iterable[str]) -> str:
        """Return the sha256 of the bytes of some pieces, in the order of their names."""
        digest = hashlib.sha256()
        for name in sorted(names):
            entry = self.pieces[name]
            with open_regular(self.folder / entry.file, TENSORS) as file:
                file.seek(entry.start)
                _feed(digest, file, entry.stop - entry.start)
        return digest.hexdigest()

    def is_like(self, other: Checkpoint) -> bool:
        """Tell whether another folder holds the same files, with the same index."""
        return self.files == other.files and self.choice.index == other.choice.index

    @cached_property
    def choice(self) -> Choice:
        """Which files transformers loads from the folder."""
        return choose(self.folder)

    @cached_property
    def files(self) -> tuple[str, ...]:
        """The safetensors files of the checkpoint, in the order in which they are read."""
        return self.choice.files

    @cached_property
    def stored(self) -> tuple[TensorEntry, ...]:
        """Every tensor of every file; a name may be there twice."""
        return tuple(entry for file in self.files for entry in read_header(self.folder / file).values())

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """The weights by name."""
        return self.loaded

    @cached_property
    def loaded(self) -> Mapping[str, TensorEntry]:
        """The tensors that are loaded, by name; of one that several files hold, the last one."""
        choice = self.choice
        strict = choice.index is not None and _loads_what_the_index_names()
        return {entry.name: entry for entry in self.stored if not strict or entry.name in choice.mapped}

    @cached_property
    def superseded(self) -> tuple[TensorEntry, ...]:
        """Tensors in the files that are not loaded: a later file replaces them."""
        return tuple(entry for entry in self.stored if self.pieces.get(entry.name) != entry)

    @property
    def is_indexed_exactly(self) -> bool:
        """Whether the index, if there is one, names every tensor with its file and nothing else."""
        choice = self.choice
        return choice.index is None or choice.mapped == {name: entry.file for name, entry in self.pieces.items()}

    def index_text(self) -> str:
        """Return the index that this checkpoint should have: the tensors that are loaded, with their files."""
        assert self.choice.index is not None, "a single file needs no index"
        index = json.loads(read_text(self.folder / self.choice.index, INDEX, folder=self.folder))
        mapped = {name: entry.file for name, entry in self.pieces.items()}
        total = sum(entry.stop - entry.start for entry in self.pieces.values())
        metadata = {**index["metadata"], "total_size": total}
        return json.dumps({**index, "metadata": metadata, "weight_map": mapped}, indent=2, sort_keys=True) + "\n"

    def remarks(self) -> tuple[str, ...]:
        """Return what is strange about the files and does not keep the model from loading, one sentence each."""
        return tuple(_remarks(self))

    def names(self) -> tuple[str, ...]:
        """Return all tensor names."""
        return tuple(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        parts = self.parts(name)
        return self.entries[name].shape if parts == (name,) else (len(parts), *self.entries[parts[0]].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's stored dtype."""
        return torch_dtype(self.entries[self.parts(name)[0]])

    def read(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """Return one weight as stored; experts that are stored one by one come stacked."""
        if name not in self.pieces:
            return torch.stack([self.read(part, device) for part in self.parts(name)])
        path = self.folder / self.pieces[name].file
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                return owned(file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"cannot read tensor {name} of {path}: {error}") from error

    def tensor_for(self, parameter: str) -> str:
        """Return the stored name of a model's parameter.

        A checkpoint saved from the bare backbone lacks the prefix of the causal model (``transformer.``), and the other
        way round; the name is then unique by its end. Whatever else transformers renames while it loads is found by
        having it load a checkpoint without content.
        """
        if parameter in self.entries:
            return parameter
        parts = parameter.split(".")
        for start in range(1, len(parts) - 1):
            shorter = ".".join(parts[start:])
            if shorter in self.entries:
                return shorter
        longer = [name for name in self.entries if name.endswith(f".{parameter}")]
        if len(longer) == 1:
            return longer[0]
        if parameter in self.renamed:
            parts = self.renamed[parameter]
            # A weight that is stored in several tensors goes by the model's name.
            return parts[0] if len(parts) == 1 else parameter
        raise ModelError(f"{self.folder} has no tensor for the parameter {parameter}")

    def weight_of(self, module: str) -> str:
        """Return the stored name of a module's weight; experts are named by the parameter that holds all of them."""
        try:
            return self.tensor_for(f"{module}.weight")
        except ModelError:
            if module not in self.entries and module not in self.renamed:
                raise
            return self.tensor_for(module)

    def holds(self, name: str) -> bool:
        """Tell whether a weight is stored, in one tensor or in several."""
        return name in self.entries or name in self.renamed

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors in which a weight is stored: its own, or those of experts in their order."""
        return (name,) if name in self.entries else self.renamed[name]

    def tensors_of(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the tensors in which weights are stored."""
        return tuple(part for name in names for part in self.parts(name))

    def fingerprint(self) -> str:
        """Return a sha256 over the config and every weight file's content."""
        digest = hashlib.sha256()
        for name in ("config.json", *self.files):
            path = self.folder / name
            if path.is_file():
                digest.update(name.encode() + b"\0" + file_digest(path).encode())
        return digest.hexdigest()

    def digest_of(self, names: Iterable[str]) -> str:
        """Return a sha256 over the named tensors' bytes."""
        digest = hashlib.sha256()
        for name in sorted(names):
            entry = self.entries[name]
            digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\0".encode())
            with open_regular(self.folder / entry.file, TENSORS) as file:
                file.seek(entry.start)
                _feed(digest, file, entry.stop - entry.start)
        return digest.hexdigest()


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """Return the torch dtype of a stored tensor."""
    if entry.dtype not in DTYPES:
        raise ModelError(f"tensor {entry.name} is stored as {entry.dtype}, which editcli cannot read")
    return DTYPES[entry.dtype]


@contextmanager
def opened_tensors(path: Path, *, folder: Path | None = None) -> Iterator[Any]:
    """Open a safetensors file with its library, which takes a name, once its type, size and header were checked.

    ``folder`` is the one out of which no link may lead. Raises :class:`ModelError` and :class:`FileError`.
    """
    read_header(path, folder=folder)
    with safe_open(path, framework="pt") as file:
        yield file


def read_header(path: Path, *, folder: Path | None = None) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file; raise :class:`ModelError` on a damaged or hostile header."""
    header, base, size = read_raw_header(path, folder=folder)
    entries = {}
    for name, fields in header.items():
        if name != "__metadata__":
            entries[name] = _entry(path, name, fields, base, size)
    refuse_overlaps(path, entries.values())
    _refuse_gaps(path, entries.values(), base)
    stop = max((entry.stop for entry in entries.values()), default=base)
    if stop != size:
        raise ModelError(f"{path} is damaged: {size - stop:,} bytes follow its last tensor; copy the file again")
    return entries


def read_raw_header(path: Path, *, folder: Path | None = None) -> tuple[dict[str, Any], int, int]:
    """Return a safetensors file's header, the offset where its data starts, and the file's size."""
    try:
        with open_regular(path, TENSORS, folder=folder) as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER, size - 8):
                raise ModelError(f"{path} is damaged: its header claims {length:,} bytes; download or copy it again")
            # Decode first: json.loads on bytes would also accept UTF-16, which other safetensors readers reject.
            text = file.read(length).decode("utf-8")
        header = json.loads(text, object_pairs_hook=_unrepeated, parse_constant=no_constant)
    except FileError:
        raise
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except (struct.error, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path} is not a safetensors file: its header is no object")
    metadata = header.get("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise ModelError(f"{path} is not a safetensors file: its metadata are not texts")
    return header, 8 + length, size


def file_digest(path: Path, kind: Kind = TENSORS, *, folder: Path | None = None) -> str:
    """Return the sha256 of a regular file; raise :class:`FileError` for any other."""
    digest = hashlib.sha256()
    with open_regular(path, kind, folder=folder) as file:
        _feed(digest, file, None)
    return digest.hexdigest()


def _feed(digest: Any, file: Any, remaining: int | None) -> None:
    while remaining is None or remaining > 0:
        data = file.read(CHUNK if remaining is None else min(CHUNK, remaining))
        if not data:
            return
        digest.update(data)
        remaining = None if remaining is None else remaining - len(data)


def _entry(path: Path, name: str, fields: Any, base: int, size: int) -> TensorEntry:
    damaged = f"{path} is damaged: the header entry of {shorten(repr(name))}"
    try:
        start, stop = (base + _whole(offset) for offset in fields["data_offsets"])
        shape = tuple(_whole(length) for length in fields["shape"])
        entry = TensorEntry(name, path.name, str(fields["dtype"]), shape, start, stop)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{damaged} cannot be read; copy the file again") from error
    if len(shape) > _MAX_DIMENSIONS:
        raise ModelError(f"{damaged} has {len(shape):,} dimensions; copy the file again")
    if not base <= entry.start <= entry.stop <= size:
        raise ModelError(f"{path} is truncated: {shorten(name)} lies beyond its {size:,} bytes; copy it again")
    known = DTYPES.get(entry.dtype)
    if known is not None and math.prod(shape) * known.itemsize != stop - start:
        raise ModelError(f"{damaged} gives it a shape that its bytes do not fill; copy the file again")
    return entry


def _whole(value: Any) -> int:
    """Return a whole number that is not negative; a text or a fraction would be one only to Python."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{shorten(repr(value))} is not a size")
    return value


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; a name that is there twice would mean one tensor to us and another to the next reader."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name is in its header twice")
    return entries


def refuse_overlaps(path: Path, entries: Iterable[TensorEntry]) -> None:
    """Raise where two tensors share bytes: editing one would change the other."""
    for one, other in itertools.pairwise(_in_order(entries)):
        if other.start < one.stop:
            names = f"{shorten(one.name)} and {shorten(other.name)}"
            raise ModelError(f"{path} is damaged: {names} share bytes; copy the file again")


def _refuse_gaps(path: Path, entries: Iterable[TensorEntry], base: int) -> None:
    """Raise where bytes from ``base`` on belong to no tensor, which the format forbids."""
    ordered = _in_order(entries)
    if ordered and ordered[0].start != base:
        raise ModelError(f"{path} is damaged: bytes before its first tensor belong to none; copy the file again")
    for one, other in itertools.pairwise(ordered):
        if other.start > one.stop:
            names = f"{shorten(one.name)} and {shorten(other.name)}"
            raise ModelError(f"{path} is damaged: bytes between {names} belong to no tensor; copy the file again")


def _in_order(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """Return the tensors that have any bytes, as they lie in the file."""
    return sorted((entry for entry in entries if entry.stop > entry.start), key=lambda entry: entry.start)


def _loads_what_the_index_names() -> bool:
    """Tell whether the installed transformers takes from shards only what their index names, as 4.x does.

    From 5.0 on everything in the shards is loaded, and the index only says which files they are.
    """
    return int(version("transformers").split(".")[0]) < 5


def _remarks(checkpoint: Checkpoint) -> Iterator[str]:
    choice, folder = checkpoint.choice, checkpoint.folder
    others = left_out(folder, choice)
    if others:
        yield f"neither read nor copied, as transformers does not load it from {folder}: {listed(others)}"
    for (file, used), names in sorted(_copies(checkpoint).items()):
        yield f"stored twice in {folder}, in {file} and in {used}, which is what transformers loads: {listed(names)}"
    present = {entry.name for entry in checkpoint.stored}
    unnamed = tuple(sorted(present - choice.mapped.keys())) if choice.index else ()
    if unnamed:
        yield f"{choice.index} of {folder} does not name {listed(unnamed)}, which its shards hold"
    lost = tuple(sorted(choice.mapped.keys() - present))
    if lost:
        yield f"{choice.index} of {folder} names {listed(lost)}, which its shards do not hold"


def _copies(checkpoint: Checkpoint) -> Mapping[tuple[str, str], tuple[str, ...]]:
    """Return the tensors that are stored twice, by the file that holds the spare copy and the file that counts."""
    copies: dict[tuple[str, str], tuple[str, ...]] = {}
    for entry in checkpoint.superseded:
        used = checkpoint.pieces.get(entry.name)
        if used is not None:
            key = (entry.file, used.file)
            copies[key] = (*copies.get(key, ()), entry.name)
    return copies


def owned(tensor: Tensor) -> Tensor:
    """Return a tensor just read from a file in memory of its own, aligned as torch aligns what it allocates.

    On the CPU, safetensors maps files. Kernels may round differently on memory that is not aligned, so that results
    would depend on the length of a file's header, and a file replaced in place would change under its readers.
    """
    return tensor.clone() if tensor.device.type == torch.device("cpu").type else tensor
