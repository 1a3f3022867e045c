"""Write an edited model as a plain Hugging Face folder, and check what was written.

Only the bytes of the tensors that changed are new: a shard is copied as it is, without parsing it, and those bytes are
replaced in the copy. Every other file is a byte copy of the base's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from editcli.errors import ModelError
from editcli.models.gguf import GgufCheckpoint
from editcli.models.loading import refuse_unopenable
from editcli.plugin.interfaces import Site
from editcli.reporting import Reporter, Silent
from editcli.storage.beside import TEMPLATES
from editcli.storage.checkpoint import CHUNK, Checkpoint, TensorEntry, file_digest, read_raw_header
from editcli.storage.choice import is_weights
from editcli.storage.files import (
    StoredTensor,
    atomic,
    copy_file,
    copy_into,
    tensor_bytes,
    write_bytes,
    write_safetensors,
)
from editcli.storage.gguf import write_gguf
from editcli.storage.opening import BESIDE, TENSORS, check, is_own, open_regular
from editcli.storage.packing import Packed, Piece, Stored, pieces_of, value_of

if TYPE_CHECKING:
    from editcli.editing.session import ModelSession
    from editcli.records.state import RunFolder

CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Verified:
    """The planned tensors that differ from the base in the written folder, and those that do not."""

    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    """Planned tensors whose stored bytes equal the base's: the update was smaller than the dtype can hold."""


def side_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that are neither weights nor its model card, further chat templates included.

    Raises :class:`ModelError` for a link out of the folder: what it leads to would be copied, and perhaps published.
    """
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not is_weights(path) and path.name != CARD and not path.name.startswith(".")
    ]
    files += sorted(path for path in (folder / TEMPLATES).glob("*.jinja") if path.is_file())
    for path in files:
        if not is_own(path, folder):
            raise ModelError(f"{path} is a link to {path.resolve()}; if that belongs to the model, copy it there")
        check(path, BESIDE, folder=folder)
    return files


def side_files_of(base: Checkpoint) -> list[Path]:
    """Return the files that belong to a model beside its weights; a GGUF holds everything itself."""
    return [] if isinstance(base, GgufCheckpoint) else side_files(base.folder)


def needed_bytes(base: Checkpoint) -> int:
    """Return how many bytes the edited copy of a model takes."""
    weights = sum((base.folder / name).stat().st_size for name in base.files)
    return weights + sum(path.stat().st_size for path in side_files_of(base))


def write_model(base: Checkpoint, out: Path, tensors: Mapping[str, Stored]) -> None:
    """Write the base model to ``out`` with the weights of ``tensors`` replaced, each as the base stores it.

    Only the checkpoint that transformers loads is written, each tensor of it once, so that every program that opens the
    result finds the same weights.
    """
    for path in side_files_of(base):
        target = out / path.relative_to(base.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, target)
    pieces = {key: piece for name, stored in tensors.items() for key, piece in pieces_of(name, stored).items()}
    if isinstance(base, GgufCheckpoint):
        write_gguf(base.header, out / base.saved_files[0], pieces)
        return
    for name in base.files:
        _write_shard(base, name, out / name, {key: pieces[key] for key in pieces if base.pieces[key].file == name})
    if base.choice.index is not None:
        _write_index(base, base.choice.index, out)


def write_verified(
    base: Checkpoint,
    out: Path,
    tensors: Mapping[str, Stored],
    *,
    idle: bool = False,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> Verified:
    """Write a model as :func:`write_model` does, then check its bytes and that transformers opens it."""
    with (reporter or Silent()).phase("Saving", 3, "steps") as advance:
        write_model(base, out, tensors)
        advance(1)
        verified = verify(base.reopened(), out, tensors, idle=idle)
        advance(1)
        refuse_unopenable(out, trust_remote_code=trust_remote_code)
        advance(1)
    return verified


def remove_old(folder: RunFolder) -> None:
    """Remove an old run's files, its state last; the lock stays, since this process holds it."""
    state = (folder.lock, folder.state, folder.journal, folder.record)
    for path in [*folder.out.iterdir(), *folder.folder.iterdir()]:
        # A link is removed itself; what it leads to is not the run's.
        if path.is_dir() and not path.is_symlink() and path != folder.folder:
            shutil.rmtree(path)
        elif (path.is_file() or path.is_symlink()) and path not in state:
            path.unlink()
    for path in (folder.record, folder.state, folder.journal):
        path.unlink(missing_ok=True)


def to_stored(weight: Tensor, name: str, checkpoint: Checkpoint, site: Site) -> Tensor:
    """Return a (d_out, d_in) weight in the layout and dtype in which a checkpoint stores it under ``name``."""
    stored = site.stored(weight).detach().cpu().to(checkpoint.dtype(name)).contiguous()
    _refuse_shape(name, checkpoint.shape(name), stored)
    return stored


def stored_tensors(session: ModelSession, weights: Mapping[Site, Tensor]) -> dict[str, Stored]:
    """Return edited weights as they are stored, by their names in the checkpoint."""
    stored: dict[str, Stored] = {}
    for site, weight in weights.items():
        name, encoded = session.stored_name(site), session.encoded(site, weight)
        _refuse_shape(name, session.loaded.checkpoint.shape(name), value_of(encoded))
        stored[name] = encoded if isinstance(encoded, Packed) else encoded.cpu().contiguous()
    return stored


def _refuse_shape(name: str, shape: tuple[int, ...], stored: Tensor) -> None:
    if tuple(stored.shape) != shape:
        raise ModelError(f"{name} is stored as {shape}, but the edited weight is {tuple(stored.shape)}")


def verify(base: Checkpoint, out: Path, planned: Mapping[str, Stored], *, idle: bool = False) -> Verified:
    """Reopen ``out`` and compare every tensor with the base; :class:`ModelError` on a difference not planned.

    Unless ``idle``, some planned tensor must differ from the base.
    """
    written = base.copy_in(out)
    if not base.is_like(written):
        raise ModelError(f"transformers would load other files from {out} than were written; empty it and save again")
    if set(written.pieces) != set(base.pieces):
        raise ModelError(f"the model saved in {out} lacks tensors of the base; the disk may be faulty, save again")
    expected = {name: pieces_of(name, stored) for name, stored in planned.items()}
    pieces = {key: piece for group in expected.values() for key, piece in group.items()}
    differing = set()
    for name, entry in base.pieces.items():
        same = same_bytes(base.folder, entry, out, written.pieces[name])
        if name in pieces:
            if not _holds(out, written.pieces[name], pieces[name]):
                raise ModelError(f"{name} in {out} is not what was written; the disk may be faulty, save again")
        elif not same:
            raise ModelError(f"{name} in {out} differs from the base though it was not edited; save again")
        if not same:
            differing.add(name)
    _refuse_other_files(base, out)
    changed = tuple(name for name in _named(base, expected) if differing & expected[name].keys())
    if not changed and not idle:
        raise ModelError(
            "nothing changed: every edited weight equals the base's once it is stored, because the updates are smaller "
            f"than its type can hold or every edit was given up (see the rejected edits); {base.way_to_finer_types}"
        )
    return Verified(
        changed=tuple(part for name in changed for part in _changed_parts(base, name, differing)),
        unchanged=tuple(name for name in _named(base, expected) if name not in changed),
    )


def _named(base: Checkpoint, names: Mapping[str, object]) -> tuple[str, ...]:
    """Return the names of weights in the order of the files; those that are stored in several tensors come last."""
    return (*(name for name in base.entries if name in names), *(name for name in names if name not in base.entries))


def _changed_parts(base: Checkpoint, name: str, differing: set[str]) -> tuple[str, ...]:
    """Return the tensors of a weight that differ: experts that no edit reached stay as they were."""
    return (name,) if name in base.entries else tuple(part for part in base.parts(name) if part in differing)


def _holds(folder: Path, entry: TensorEntry, piece: Piece) -> bool:
    """Tell whether a tensor in a file is what was to be written there."""
    if entry.dtype != piece.kind:
        return False
    remaining = tensor_bytes(piece.data)
    if len(remaining) != entry.stop - entry.start:
        return False
    with open_regular(folder / entry.file, TENSORS) as file:
        file.seek(entry.start)
        while remaining:
            if file.read(min(CHUNK, len(remaining))) != remaining[:CHUNK]:
                return False
            remaining = remaining[CHUNK:]
    return True


def _refuse_other_files(base: Checkpoint, out: Path) -> None:
    """Raise :class:`ModelError` unless config, tokenizer, templates and code are those of the base."""
    for path in side_files_of(base):
        copy = out / path.relative_to(base.folder)
        if not copy.is_file() or file_digest(copy) != file_digest(path):
            raise ModelError(f"{copy} is not a copy of the base's; the disk may be faulty, save again")


def _write_index(base: Checkpoint, name: str, out: Path) -> None:
    """Copy an index that is right; write a new one where it names what is not there, or not all that is."""
    if base.is_indexed_exactly:
        copy_file(base.folder / name, out / name)
    else:
        write_bytes(out / name, base.index_text().encode())


def _write_shard(base: Checkpoint, name: str, target: Path, pieces: Mapping[str, Piece]) -> None:
    source = base.folder / name
    spare = any(entry.file == name for entry in base.superseded)
    if spare or any(piece.kind != base.pieces[key].dtype for key, piece in pieces.items()):
        here = {key: entry for key, entry in base.pieces.items() if entry.file == name and key not in pieces}
        copied = {key: StoredTensor(source, entry) for key, entry in here.items()}
        metadata = read_raw_header(source)[0].get("__metadata__", {"format": "pt"})
        write_safetensors(target, {**copied, **{key: piece.data for key, piece in pieces.items()}}, metadata)
        return
    with atomic(target) as file:
        copy_into(file, source)
        for key, piece in pieces.items():
            file.seek(base.pieces[key].start)
            file.write(tensor_bytes(piece.data))
        file.seek(0, os.SEEK_END)


def same_bytes(first: Path, one: TensorEntry, second: Path, other: TensorEntry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open_regular(first / one.file, TENSORS) as a, open_regular(second / other.file, TENSORS) as b:
        a.seek(one.start)
        b.seek(other.start)
        remaining = one.stop - one.start
        while remaining > 0:
            size = min(CHUNK, remaining)
            if a.read(size) != b.read(size):
                return False
            remaining -= size
    return True
