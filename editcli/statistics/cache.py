"""Tensors on disk that cost time to compute, keyed by everything that they depend on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from editcli.errors import FileError, ModelError, StatisticsError
from editcli.reporting import Reporter
from editcli.storage.files import read_safetensors, write_safetensors
from editcli.storage.folders import may_write


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Return a hash of JSON values, which names what depends on them and on nothing else."""
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()


class Cache:
    """A folder of safetensors files; without a folder nothing is kept.

    A file's name is its key, and the file repeats it, so that a renamed file is refused. A folder that cannot be
    written is one warning; the work continues without a cache.
    """

    def __init__(self, folder: Path | None, reporter: Reporter):
        self.folder, self.reporter = folder, reporter
        self._mentioned = False

    def has(self, key: str) -> bool:
        """Tell whether something is kept under ``key``; nothing is in a folder that may not be looked into."""
        return self.folder is not None and os.path.isfile(self.path(key))

    def read(self, key: str) -> dict[str, Tensor] | None:
        """Return what is kept under ``key``, None when nothing is; raise :class:`StatisticsError` for a bad file."""
        if not self.has(key):
            return None
        tensors, metadata = load(self.path(key))
        if metadata.get("fingerprint") != key:
            raise StatisticsError(f"{self.path(key)} belongs to something else than its name says; delete it")
        return tensors

    def write(self, key: str, tensors: Mapping[str, Tensor], identity: Mapping[str, Any]) -> bool:
        """Keep ``tensors`` under ``key``, with what it was made of; return whether they are there now."""
        if self.folder is None:
            return False
        try:
            self._make(self.folder)
            write_safetensors(self.path(key), tensors, {"fingerprint": key, "identity": json.dumps(dict(identity))})
        except OSError as error:
            if not self._mentioned:
                self._mentioned = True
                self.reporter.warn(
                    f"the cache {self.folder} cannot be written ({error.strerror or error}), so the next run computes "
                    "again what this one did; set XDG_CACHE_HOME to a folder that can be written"
                )
            return False
        return True

    def is_writable(self) -> bool:
        """Tell whether something can be kept; makes the folder."""
        if self.folder is None:
            return False
        try:
            self._make(self.folder)
        except OSError:
            return False
        return may_write(self.folder)

    def _make(self, folder: Path) -> None:
        if folder.parts[:1] == ("~",):
            # An account without a home folder: do not make a folder of that name in the working folder.
            raise FileNotFoundError(errno.ENOENT, "there is no home folder")
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        """Return the file of ``key``."""
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata; raise :class:`StatisticsError` for a damaged file."""
    try:
        return read_safetensors(path)
    except FileError as error:
        raise StatisticsError(str(error)) from error
    except (SafetensorError, ModelError, OSError) as error:
        raise StatisticsError(f"cannot read {path}: {error}; delete it, it will be computed again") from error
