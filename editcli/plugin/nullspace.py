"""Directions that keys of reference text hardly use: what the editors that write in a null space share.

They are the eigenvectors of the second moment C whose eigenvalue is small, and four rules say what is small. This
module never imports torch at import time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from editcli.errors import OptionError
from editcli.plugin.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from editcli.plugin.interfaces import Session, Site


@dataclass(frozen=True)
class NullSpaceOptions:
    """Which directions count as unused, and the weight of a small update in them; a base of an editor's options."""

    l2: float = option(10.0, "weight L2 of keeping the update small, against ||P k||^2 of an edit's key")
    l2_kind: Literal["absolute", "relative"] = option(
        "absolute", "relative: in units of the mean ||P k||^2 on reference text, which no model's scale changes"
    )
    nullspace_threshold: float = option(2e-2, "what counts as unused; its meaning is threshold_kind")
    threshold_kind: Literal["absolute", "relative", "median", "directions"] = option(
        "absolute",
        "absolute: eigenvalues of C below it; median: below this many times the median eigenvalue; directions: this "
        "share of the directions, the least used; relative: the smallest that hold this share of the trace",
    )

    def __post_init__(self) -> None:
        if not (self.l2 > 0 and self.nullspace_threshold > 0):
            raise ValueError("l2 and nullspace_threshold must be greater than 0")
        if self.threshold_kind == "directions" and self.nullspace_threshold >= 1:
            raise ValueError("nullspace_threshold must be below 1 where it is a share of the directions")


class NullSpace(NamedTuple):
    """The unused directions of one site: an orthonormal basis U of the range of P, and what C is along it."""

    values: Tensor
    """(r,) the eigenvalues e of C, ascending."""
    vectors: Tensor
    """(d_in, r), U, so that P = U U^T."""
    l2: float
    """The weight L2 as a number."""


def null_space(session: Session, site: Site, options: NullSpaceOptions, *, owner: str) -> NullSpace:
    """Return the directions of ``site`` that reference text hardly uses, and note how many they are.

    Raises :class:`OptionError` that names the option of the editor ``owner`` when they are none or all.
    """
    values, vectors = session.decomposition(site)
    chosen = unused(values, options)
    rank = int(chosen.sum())
    if not 0 < rank < len(values):
        what, change = ("no direction", "raise") if rank == 0 else ("every direction", "lower")
        raise OptionError(
            f"{owner}.nullspace_threshold={options.nullspace_threshold:g} leaves {what} of {site.module} to edits "
            f"(eigenvalues {float(values[0]):.3g} to {float(values[-1]):.3g}); {change} it or set "
            f"{owner}.threshold_kind=directions"
        )
    share = f"{rank} of {len(values)} directions ({rank / len(values):.1%})"
    session.reporter.note(f"{site.module}: edits may use {share}")
    # The mean of ||P k||^2 on reference text is trace(P C), the sum of the eigenvalues that P keeps.
    unit = float(values[chosen].sum()) if options.l2_kind == "relative" else 1.0
    return NullSpace(values[chosen].clamp_min(0), vectors[:, chosen], options.l2 * max(unit, 1e-30))


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
