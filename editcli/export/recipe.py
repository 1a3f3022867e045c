"""Everything that decides what ``export`` and ``apply-patch`` do, checked when it is made; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from editcli.errors import OptionError, near_miss

LORA, PATCH, FULL = "lora", "patch", "full"
FORMATS = (LORA, PATCH, FULL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRecipe:
    """What to make of which run; raises :class:`OptionError` when it makes no sense."""

    run: str
    format: str = LORA
    out: str = ""
    """The folder to write; empty means ``<run>-<format>`` in the working folder."""
    rank: int | None = None
    """Largest rank of an adapter's pair of matrices; None chooses what loses nothing, up to a share of the matrix."""
    base: str | None = None
    """Where the base is now, if it is not where the run found it."""
    evaluate: bool = True
    """Whether to measure an adapter on the edits of the run."""
    sample: int = 100
    """How many of the edits to measure."""
    seed: int = 0
    device: str = "auto"
    device_map: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    push: str | None = None
    """A repository of the hub to send the result to."""
    private: bool = False
    revision: str | None = None
    """The branch to send it to; needed where the repository exists already."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            known = ", ".join(FORMATS)
            raise OptionError(f"--format must be one of {known}, not {self.format!r}{near_miss(self.format, FORMATS)}")
        if self.rank is not None and self.format != LORA:
            raise OptionError(f"--rank is the rank of an adapter; a {self.format} has none: leave it out")
        if self.rank is not None and self.rank < 1:
            raise OptionError("--rank must be at least 1")
        if self.sample < 1:
            raise OptionError("--sample must be at least 1")
        if self.push is None and (self.private or self.revision is not None):
            raise OptionError("--private and --revision say how to --push; add --push REPO")
        if not self.out:
            # A frozen dataclass has no other way to compute one field from another.
            object.__setattr__(self, "out", f"{Path(self.run).absolute().name}-{self.format}")

    @property
    def folder(self) -> Path:
        """The folder to write."""
        return Path(self.out)


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchRecipe:
    """Which patch to apply to which base."""

    base: str
    """A folder or a hub id."""
    patch: str
    """A folder or a hub id."""
    out: str = ""
    """The folder to write; empty means ``<patch>-applied`` in the working folder."""
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.out:
            # As above.
            object.__setattr__(self, "out", f"{Path(self.patch).absolute().name}-applied")

    @property
    def folder(self) -> Path:
        """The folder to write."""
        return Path(self.out)
