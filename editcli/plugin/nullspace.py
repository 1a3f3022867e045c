"""Directions that keys of reference text hardly use: what the editors that write in a null space share.

They are the eigenvectors of the second moment C whose eigenvalue is small, and four rules say what is small. This
module never imports torch at import time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editcli.errors import OptionError
from editcli.plugin.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NullSpaceOptions:
    """Which directions of the keys count as unused; the options of an editor derive from it."""

    nullspace_threshold: float = option(2e-2, "what counts as unused; its meaning is threshold_kind")
    threshold_kind: Literal["absolute", "relative", "median", "directions"] = option(
        "absolute",
        "absolute: eigenvalues of C below it; median: below this many times the median eigenvalue; directions: this "
        "share of the directions, the least used; relative: the smallest that hold this share of the trace",
    )

    def __post_init__(self) -> None:
        if not self.nullspace_threshold > 0:
            raise ValueError("nullspace_threshold must be greater than 0")
        if self.threshold_kind == "directions" and self.nullspace_threshold >= 1:
            raise ValueError("nullspace_threshold must be below 1 where it is a share of the directions")


def null_space(values: Tensor, options: NullSpaceOptions, *, owner: str, site: str) -> Tensor:
    """Return which of ``values``, the ascending eigenvalues of C, count as unused, (d_in,) bool.

    Raises :class:`OptionError` that names the option of the editor ``owner`` when no direction or every direction of
    the module ``site`` is unused.
    """
    chosen = unused(values, options)
    rank = int(chosen.sum())
    if 0 < rank < len(values):
        return chosen
    what, change = ("no direction", "raise") if rank == 0 else ("every direction", "lower")
    raise OptionError(
        f"{owner}.nullspace_threshold={options.nullspace_threshold:g} leaves {what} of {site} to edits (eigenvalues "
        f"{float(values[0]):.3g} to {float(values[-1]):.3g}); {change} it or set {owner}.threshold_kind=directions"
    )


def unused(values: Tensor, options: NullSpaceOptions) -> Tensor:
    """Return which of the ascending eigenvalues ``values`` count as unused, (d_in,) bool."""
    threshold, kind = options.nullspace_threshold, options.threshold_kind
    if kind == "absolute":
        return values < threshold
    if kind == "median":
        return values < threshold * values.median()
    if kind == "directions":
        import torch

        return torch.arange(len(values), device=values.device) < round(threshold * len(values))
    return values.clamp_min(0).cumsum(0) <= threshold * values.clamp_min(0).sum()
