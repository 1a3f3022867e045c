"""The user's cache: files that only save time, in a folder that need not be there or be writable."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from platformdirs import user_cache_path
from torch import Tensor

from editcli.report import Reporter
from editcli.runs.files import write_safetensors


def moments_folder() -> Path:
    """Return where second moments and what is computed of them are cached."""
    return user_cache_path("editcli") / "second-moments"


class CacheFolder:
    """A folder of cached tensors. That it cannot be written is mentioned once; the work goes on without it."""

    def __init__(self, folder: Path, reporter: Reporter):
        self.folder, self._reporter = folder, reporter
        self._mentioned = False

    def path(self, name: str) -> Path:
        """Return where a file of the cache is, or would be."""
        return self.folder / name

    def holds(self, name: str) -> bool:
        """Tell whether a file is there; one in a folder that may not be looked into is not."""
        return os.path.isfile(self.path(name))

    def store(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
        """Write a file, or say once why that cannot be done; return whether it is there now."""
        try:
            self._make()
            write_safetensors(self.path(name), dict(tensors), metadata)
        except OSError as error:
            if not self._mentioned:
                self._mentioned = True
                self._reporter.warn(
                    f"the cache {self.folder} cannot be written ({error.strerror or error}), so the next run computes "
                    "again what this one did; set XDG_CACHE_HOME to a folder that can be written"
                )
            return False
        return True

    def is_writable(self) -> bool:
        """Tell whether files can be stored; makes the folder."""
        try:
            self._make()
        except OSError:
            return False
        return os.access(self.folder, os.W_OK | os.X_OK)

    def _make(self) -> None:
        if self.folder.parts[:1] == ("~",):
            # An account without a home folder: nobody wants a folder of that name where the command was called.
            raise FileNotFoundError(errno.ENOENT, "there is no home folder")
        self.folder.mkdir(parents=True, exist_ok=True)
