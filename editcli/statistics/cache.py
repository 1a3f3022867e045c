"""Tensors on disk that cost time to compute, keyed by everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from editcli.errors import StatisticsError
from editcli.report import Reporter
from editcli.runs.files import read_safetensors, write_safetensors


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Return a hash of JSON values, which names what depends on them and on nothing else."""
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()


class Cache:
    """A folder of safetensors files; without a folder nothing is kept.

    A file's name is its key, and the file repeats it, so that one that was renamed serves nobody.
    """

    def __init__(self, folder: Path | None, reporter: Reporter):
        self.folder, self.reporter = folder, reporter

    def has(self, key: str) -> bool:
        """Tell whether something is kept under ``key``."""
        return self.folder is not None and self.path(key).is_file()

    def read(self, key: str) -> dict[str, Tensor] | None:
        """Return what is kept under ``key``, None when nothing is; raise :class:`StatisticsError` for a bad file."""
        if not self.has(key):
            return None
        tensors, metadata = load(self.path(key))
        if metadata.get("fingerprint") != key:
            raise StatisticsError(f"{self.path(key)} belongs to something else than its name says; delete it")
        return tensors

    def write(self, key: str, tensors: Mapping[str, Tensor], identity: Mapping[str, Any]) -> None:
        """Keep ``tensors`` under ``key``, with what it was made of; a folder that cannot be written is a warning."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_safetensors(self.path(key), tensors, {"fingerprint": key, "identity": json.dumps(dict(identity))})
        except OSError as error:
            # A cache that cannot be written costs time on the next run, nothing else.
            reason = error.strerror or error
            self.reporter.warn(f"{', '.join(tensors)} could not be cached in {self.folder}: {reason}")

    def path(self, key: str) -> Path:
        """Return the file of ``key``."""
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata; raise :class:`StatisticsError` for a damaged file."""
    try:
        return read_safetensors(path)
    except (SafetensorError, OSError) as error:
        raise StatisticsError(f"cannot read {path}: {error}; delete it, it will be computed again") from error
