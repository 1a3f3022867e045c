"""Write files so that a reader sees the old content or the new, never a part: temporary name, fsync, replace."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import jsonlines
import torch
from torch import Tensor

from editcli.formatting import finite
from editcli.storage.checkpoint import CHUNK, DTYPES, TensorEntry, opened_tensors, owned
from editcli.storage.locks import locked
from editcli.storage.opening import TENSORS, open_regular

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PREFIX, _SUFFIX = ".", ".tmp"
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_CLONE = 0x40049409
"""Linux's ioctl FICLONE: let a file share all blocks of another."""


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside ``path`` for writing; on success it is synced and takes the name, on failure it vanishes.

    What a process that was killed in here left of the same file is removed by the next that writes it.
    """
    if path.exists() and not path.is_file():
        # A rename would put a file in the place of a device such as /dev/null.
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    _clear_abandoned(path)
    handle, temporary = _temporary(path)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a model folder should be as readable as what the user makes by hand.
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _temporary(path: Path) -> tuple[int, Path]:
    """Make a file beside ``path`` and lock it, so that no process takes it for abandoned while this one writes it."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f"{_PREFIX}{path.name}.", suffix=_SUFFIX, dir=path.parent)
        # Between its making and its lock, another process may have locked and removed it.
        if locked(handle) is not False and os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)


def _clear_abandoned(path: Path) -> None:
    """Remove unfinished files of ``path`` that no living process holds; where nothing can be locked, leave them."""
    for left in path.parent.glob(f"{_PREFIX}{glob.escape(path.name)}.*{_SUFFIX}"):
        try:
            handle = os.open(left, os.O_RDWR | _NO_LINK)
        except OSError:
            # Another process has removed it, or this process may not open it.
            continue
        try:
            if locked(handle):
                left.unlink(missing_ok=True)
        finally:
            os.close(handle)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content atomically; see :func:`copy_into` for how."""
    with atomic(target) as file:
        copy_into(file, source)


def copy_into(file: IO[bytes], source: Path) -> None:
    """Write the content of ``source`` to an empty file, in the cheapest way that keeps the two apart.

    A file system that can (btrfs, XFS, bcachefs) shares the blocks until either file is written to; elsewhere the
    kernel copies. Never a hard link: a trainer or converter that later wrote into the edited model's folder in place
    would write into the base model as well, and in the hub's cache that may serve the whole machine.
    """
    with open_regular(source, TENSORS) as original:
        if not (_cloned(original, file) or _copied_by_the_kernel(original, file)):
            original.seek(0)
            file.seek(0)
            shutil.copyfileobj(original, file, CHUNK)
    file.seek(0, os.SEEK_END)


def _cloned(original: IO[bytes], file: IO[bytes]) -> bool:
    """Have ``file`` share the blocks of ``original``; say whether the file system did."""
    if sys.platform != "linux":
        return False
    from fcntl import ioctl

    try:
        ioctl(file.fileno(), _CLONE, original.fileno())
    except OSError:
        return False
    return True


def _copied_by_the_kernel(original: IO[bytes], file: IO[bytes]) -> bool:
    """Copy without a detour through this process; say whether the system did."""
    copy, left = getattr(os, "copy_file_range", None), os.fstat(original.fileno()).st_size
    try:
        while copy is not None and left > 0:
            done = copy(original.fileno(), file.fileno(), left)
            left -= done
            if done == 0:
                return False
    except OSError:
        # Not between these file systems, or the disk is full: copying by hand works, or says so.
        return False
    return copy is not None


def is_leftover(path: Path) -> bool:
    """Tell whether a file is what a process that was killed inside :func:`atomic` leaves behind."""
    return path.name.startswith(_PREFIX) and path.name.endswith(_SUFFIX)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes atomically."""
    with atomic(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically; a number that is not finite becomes null, as in ``--json``."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # The name of a file need not be text; JSON escapes what is none.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """Write one JSON value a line, atomically and one in memory at a time; null for a number that is not finite."""
    with atomic(path) as file, jsonlines.Writer(file) as writer:
        writer.write_all(map(finite, records))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that lies in a safetensors file, to be copied byte for byte, whatever its dtype."""

    path: Path
    entry: TensorEntry

    def pieces(self) -> Iterator[bytes]:
        """Yield the tensor's bytes, a piece in memory at a time."""
        remaining = self.entry.stop - self.entry.start
        with open_regular(self.path, TENSORS) as file:
            file.seek(self.entry.start)
            while remaining > 0:
                data = file.read(min(CHUNK, remaining))
                if not data:
                    raise OSError(f"{self.path} ends within {self.entry.name}")
                yield data
                remaining -= len(data)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor | StoredTensor], metadata: Mapping[str, str]) -> str:
    """Write tensors atomically, one after the other, so that no second copy of them is held; return the sha256."""
    layouts = {name: _layout(tensor) for name, tensor in tensors.items()}
    # Wide types first, as the format's own writer does, so that every tensor is aligned in the file.
    names = sorted(tensors, key=lambda name: (-layouts[name].width, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in names:
        layout = layouts[name]
        stop = position + layout.size
        fields = {"dtype": layout.dtype, "shape": list(layout.shape), "data_offsets": [position, stop]}
        header[name], position = fields, stop
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with atomic(path) as file:
        for part in (struct.pack("<Q", len(text)), text):
            digest.update(part)
            file.write(part)
        for name in names:
            for data in _pieces(tensors[name]):
                digest.update(data)
                file.write(data)
    return digest.hexdigest()


class _Layout(NamedTuple):
    """The size of a tensor in a file: bytes in all, and for one number."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    width: float


def _layout(tensor: Tensor | StoredTensor) -> _Layout:
    if isinstance(tensor, StoredTensor):
        entry = tensor.entry
        size = entry.stop - entry.start
        return _Layout(entry.dtype, entry.shape, size, size / max(1, math.prod(entry.shape)))
    width = tensor.element_size()
    return _Layout(_NAMES[tensor.dtype], tuple(tensor.shape), tensor.numel() * width, width)


def _pieces(tensor: Tensor | StoredTensor) -> Iterable[bytes | memoryview]:
    return tensor.pieces() if isinstance(tensor, StoredTensor) else (tensor_bytes(tensor),)


def read_safetensors(path: Path, *, folder: Path | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors and metadata; the tensors own their memory, aligned as torch aligns its own.

    Raises as :func:`~editcli.storage.checkpoint.opened_tensors` does.
    """
    with opened_tensors(path, folder=folder) as file:
        return {name: owned(file.get_tensor(name)) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def read_metadata(path: Path, *, folder: Path | None = None) -> dict[str, str]:
    """Return a safetensors file's metadata alone; raises as :func:`read_safetensors` does."""
    with opened_tensors(path, folder=folder) as file:
        return dict(file.metadata() or {})


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's content as bytes; a contiguous one on the CPU is not copied."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_digest(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's content as it lies in a file."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def tensors_digest(named: Iterable[tuple[str, Tensor]], *, salt: str = "") -> str:
    """Return a sha256 over ``salt`` and the names, dtypes, shapes and contents of tensors, in the order given."""
    digest = hashlib.sha256(salt.encode())
    for name, tensor in named:
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _umask() -> int:
    """Return the process's umask; reading it means setting it, so it is put back at once."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
