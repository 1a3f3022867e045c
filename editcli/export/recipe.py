"""Everything that decides what ``export`` and ``apply-patch`` do, checked when it is made; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from editcli.errors import OptionError
from editcli.settings.recipe import LoadingSettings, Recipe
from editcli.settings.setting import like, setting

LORA, PATCH, FULL = "lora", "patch", "full"
FORMATS = (LORA, PATCH, FULL)
WHAT, MEASURE, HUB = "What", "Measure", "Hub"
"""Sections of ``--help``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRecipe(LoadingSettings):
    """The settings of an export; raises :class:`OptionError` when it makes no sense."""

    run: str
    format: str = setting(
        LORA,
        "lora: a PEFT adapter; patch: the changed tensors, for apply-patch; full: the model without the run's state.",
        section=WHAT,
        flags=("-f",),
        env=False,
        choices=FORMATS,
    )
    rank: int | None = setting(
        None,
        "Largest rank of the adapter, per matrix.  [default: what loses nothing, up to half a matrix's size]",
        section=WHAT,
        env=False,
        metavar="R",
        least=1,
    )
    base: str | None = setting(
        None, "The base, if it is not where the run recorded it.", section=WHAT, env=False, value="model"
    )
    evaluate: bool = like(Recipe, "evaluate", section=MEASURE, help="Evaluate the adapter on the run's edits.")
    sample: int = setting(100, "Evaluate N edits.", section=MEASURE, least=1)
    seed: int = like(LoadingSettings, "seed", section=MEASURE)
    out: str = setting("", "A new folder.  [default: <run>-<format>]", section="Output", env=False, value="folder")
    push: str | None = setting(
        None, "Send the result to a new repository of the hub.", section=HUB, env=False, metavar="REPO"
    )
    private: bool = setting(False, "Let only its owner see the new repository.", section=HUB, env=False)
    revision: str | None = setting(
        None, "Branch to push to; needed where the repository exists already.", section=HUB, env=False, metavar="BRANCH"
    )

    def __post_init__(self) -> None:
        LoadingSettings.__post_init__(self)
        if self.rank is not None and self.format != LORA:
            raise OptionError(f"--rank is the rank of an adapter; a {self.format} has none: leave it out")
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
    """The settings of ``apply-patch``: the patch and its base."""

    base: str
    """A folder or a hub id."""
    patch: str
    """A folder or a hub id."""
    out: str = setting("", "A new folder.  [default: <patch>-applied]", section="Output", env=False, value="folder")
    trust_remote_code: bool = like(LoadingSettings, "trust_remote_code")

    def __post_init__(self) -> None:
        if not self.out:
            # As above.
            object.__setattr__(self, "out", f"{Path(self.patch).absolute().name}-applied")

    @property
    def folder(self) -> Path:
        """The folder to write."""
        return Path(self.out)
