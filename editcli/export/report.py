"""The result of an export or a patch, as frozen data; :meth:`to_json` is the contract of ``--json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class FileReport:
    """One file that was written; ``name`` is its path inside the folder."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class SiteExport:
    """One edited matrix as its adapter renders it."""

    module: str
    layer: int
    shape: tuple[int, int]
    """(d_out, d_in)."""
    rank: int
    """Rank of the adapter's pair of matrices."""
    needed: int | None
    """The rank that loses nothing but rounding; None where it is higher than what was looked at."""
    relative_error: float
    """||(W_0 + B A) - W||_F / ||W - W_0||_F, W the run's float32 weight where it is known, else the saved one."""
    saved_error: float
    """The same with W as the saved folder holds it: what rounding to the folder's dtype did is counted here."""

    @property
    def exact(self) -> bool:
        """Whether nothing but rounding was lost."""
        return self.needed is not None and self.rank >= self.needed


@dataclass(frozen=True, slots=True)
class Measured:
    """Efficacies of base and adapter on edits of the run; ``run`` is what the run itself recorded for all of them."""

    edits: int
    of: int
    adapter: Mapping[str, float | None]
    run: Mapping[str, float | None] | None


@dataclass(frozen=True, slots=True)
class Pushed:
    """The place of a result on the hub."""

    repo: str
    revision: str
    commit: str
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """The outcome of one ``export``."""

    format: str
    run: str
    status: str
    """The status of the run: ``done``, or ``stopped`` by a guard."""
    out: str
    base: str
    """Name of the base."""
    files: tuple[FileReport, ...]
    tensors: tuple[str, ...]
    """The tensors that differ from the base, by stored name."""
    sites: tuple[SiteExport, ...] = ()
    """Of an adapter only."""
    efficacy: Measured | None = None
    pushed: Pushed | None = None

    @property
    def bytes(self) -> int:
        """Size of everything that was written."""
        return sum(file.bytes for file in self.files)

    @property
    def exact(self) -> bool:
        """Whether the result is the edited model, up to rounding."""
        return all(site.exact for site in self.sites)

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON object."""
        return {
            "format": self.format,
            "run": self.run,
            "status": self.status,
            "out": self.out,
            "base": self.base,
            "exact": self.exact,
            "bytes": self.bytes,
            "files": [asdict(file) for file in self.files],
            "tensors": list(self.tensors),
            "sites": [{**asdict(s), "shape": list(s.shape), "exact": s.exact} for s in self.sites],
            "efficacy": None if self.efficacy is None else asdict(self.efficacy),
            "pushed": None if self.pushed is None else asdict(self.pushed),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchReport:
    """The outcome of one ``apply-patch``."""

    base: str
    patch: str
    out: str
    files: tuple[FileReport, ...]
    tensors: tuple[str, ...]
    different: tuple[str, ...]
    """Files that are not byte for byte those of the run: the base has other files than the run's."""

    @property
    def bytes(self) -> int:
        """Size of everything that was written."""
        return sum(file.bytes for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON object."""
        return {
            "base": self.base,
            "patch": self.patch,
            "out": self.out,
            "bytes": self.bytes,
            "identical": not self.different,
            "different": list(self.different),
            "files": [asdict(file) for file in self.files],
            "tensors": list(self.tensors),
        }


def listed(folder: Path) -> tuple[FileReport, ...]:
    """Return every file below a folder with its size, by name; hidden ones are not part of a result."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return tuple(FileReport(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)
