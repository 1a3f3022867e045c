"""A patch: the tensors that a run changed, as stored, and what must be true of the base that they belong to.

Applying it to that base gives the edited folder byte for byte. Nothing but the changed tensors is in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from editcli.errors import FileError, ModelError
from editcli.export.source import Edited
from editcli.records.decoding import Count, UnreadableError, encode, read_json
from editcli.records.record import RunRecord
from editcli.runs.output import side_files_of
from editcli.storage.checkpoint import DTYPES, Checkpoint, file_digest, opened_tensors, read_header
from editcli.storage.conversion import convert
from editcli.storage.files import tensor_digest, write_json, write_safetensors

FORMAT = 1
MAX_HEADER = 100 << 20
"""Bytes of a header that any reader of safetensors takes."""
MANIFEST, WEIGHTS = "manifest.json", "patch.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchedTensor:
    """One changed tensor; hashes are sha256 over its bytes as they lie in the file."""

    name: str
    shape: tuple[Count, ...]
    dtype: str
    base_dtype: str
    base_sha256: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchBase:
    """Name, revision, commit and fingerprint of the base."""

    name: str
    revision: str | None
    commit: str | None
    fingerprint: str

    def __str__(self) -> str:
        revision = self.commit or self.revision
        return f"{self.name} at {revision}" if revision else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchFile:
    """The file with the tensors."""

    file: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of ``manifest.json``."""

    format: int = FORMAT
    editcli: str
    """The version that made it."""
    base: PatchBase
    patch: PatchFile
    tensors: tuple[PatchedTensor, ...]
    files: Mapping[str, str]
    """Every file of the edited model with its sha256."""
    recipe: Mapping[str, Any]
    """The recipe of the run."""


def write_patch(folder: Path, edited: Edited, record: RunRecord) -> None:
    """Write the changed tensors and the manifest; ``record`` is the portable record of the run."""
    before, after, base = edited.before, edited.run.after, record.provenance.base
    tensors = {name: after.read(name) for name in edited.changed}
    digest = write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    manifest = Manifest(
        editcli=version("editcli"),
        base=PatchBase(name=base.name, revision=base.revision, commit=base.commit, fingerprint=base.fingerprint),
        patch=PatchFile(file=WEIGHTS, sha256=digest),
        tensors=tuple(
            PatchedTensor(
                name=name,
                shape=tuple(tensor.shape),
                dtype=after.entries[name].dtype,
                base_dtype=before.entries[name].dtype,
                base_sha256=tensor_digest(before.read(name)),
                sha256=tensor_digest(tensor),
            )
            for name, tensor in tensors.items()
        ),
        files=model_files(after),
        recipe=record.recipe,
    )
    write_json(folder / MANIFEST, encode(manifest))


def model_files(checkpoint: Checkpoint) -> dict[str, str]:
    """Return every file of a model folder but its card and our records, with its sha256, by its path in the folder."""
    paths = {path.relative_to(checkpoint.folder).as_posix(): path for path in side_files_of(checkpoint)}
    paths |= {name: checkpoint.folder / name for name in checkpoint.choice.names}
    return {name: file_digest(path) for name, path in sorted(paths.items())}


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest; raise :class:`ModelError` when it is missing, damaged or of another format."""
    path = folder / MANIFEST
    try:
        value = read_json(path, folder=folder)
        made = value if isinstance(value, dict) else {}
        if made.get("format", FORMAT) != FORMAT:
            raise ModelError(
                f"{path} has format {made['format']!r}, this editcli reads format {FORMAT}; use the version that "
                f"made it ({made.get('editcli')})"
            )
        return convert(value, Manifest)
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder} is no patch: it has no {MANIFEST}; pass a folder of 'editcli export --format patch'"
        ) from error
    except FileError as error:
        raise ModelError(f"{error}, or download the patch again") from error
    except UnreadableError as error:
        raise ModelError(f"{path} cannot be read ({error}); download or copy the patch again") from error


def read_tensors(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Return the tensors of a patch; raise :class:`ModelError` when they are not what the manifest says."""
    path = folder / WEIGHTS
    damaged = f"{path} is not what {MANIFEST} says; download or copy the patch again"
    try:
        _refuse_headless(path, folder, damaged)
        # Before it is hashed: a file without content may be of any size.
        if path.stat().st_size > _largest(manifest) or file_digest(path, folder=folder) != manifest.patch.sha256:
            raise ModelError(damaged)
        with opened_tensors(path, folder=folder) as file:
            tensors = {one.name: file.get_tensor(one.name) for one in manifest.tensors}
    except (SafetensorError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ModelError(f"{path} cannot be read ({reason}); download or copy the patch again") from error
    if not all(_is(tensors[one.name], one) for one in manifest.tensors):
        raise ModelError(damaged)
    return tensors


def _refuse_headless(path: Path, folder: Path, damaged: str) -> None:
    """Raise :class:`ModelError` for a file without a usable header before all of it is hashed."""
    try:
        read_header(path, folder=folder)
    except ModelError as error:
        raise ModelError(damaged) from error


def refuse_other_base(base: Checkpoint, name: str, manifest: Manifest) -> None:
    """Raise :class:`ModelError` unless every tensor that the patch replaces is the one that it was made for."""
    for tensor in manifest.tensors:
        entry = base.entries.get(tensor.name)
        if entry is None or (entry.dtype, entry.shape) != (tensor.base_dtype, tensor.shape):
            has = "has no such tensor" if entry is None else f"has {entry.dtype} {list(entry.shape)} there"
            raise ModelError(
                f"the patch changes {tensor.name}, {tensor.base_dtype} {list(tensor.shape)}, but {name} {has}; "
                f"apply it to {manifest.base}"
            )
        if tensor_digest(base.read(tensor.name)) != tensor.base_sha256:
            raise ModelError(
                f"{tensor.name} of {name} is not the one that the patch was made for: this is another model or another "
                f"revision of it; apply it to {manifest.base}"
            )


def _largest(manifest: Manifest) -> int:
    """Return how large the file of a patch can be: its tensors and a header."""
    known = (one for one in manifest.tensors if one.dtype in DTYPES)
    return MAX_HEADER + sum(math.prod(one.shape) * DTYPES[one.dtype].itemsize for one in known)


def _is(tensor: Tensor, said: PatchedTensor) -> bool:
    kind = (DTYPES.get(said.dtype), said.shape, said.sha256)
    return (tensor.dtype, tuple(tensor.shape), tensor_digest(tensor)) == kind
