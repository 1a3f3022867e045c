"""Directions that keys of reference text hardly use: what the editors that write in a null space share.

They are the eigenvectors of the second moment C whose eigenvalue is small, and four rules say what is small. This
module never imports torch at import time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from editcli.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

Threshold = Literal["absolute", "relative", "median", "directions"]
"""Kinds of threshold: an eigenvalue, a share of the trace, a multiple of the median, a share of the directions."""

THRESHOLD_HELP = (
    "absolute: eigenvalues of C below it; median: below this many times the median eigenvalue; directions: this share "
    "of the directions, the least used; relative: the smallest that hold this share of the trace"
)


def check_threshold(options: Any) -> None:
    """Raise ValueError unless ``nullspace_threshold`` and ``threshold_kind`` of an editor's options go together."""
    if not options.nullspace_threshold > 0:
        raise ValueError("nullspace_threshold must be greater than 0")
    if options.threshold_kind == "directions" and options.nullspace_threshold >= 1:
        raise ValueError("nullspace_threshold must be below 1 where it is a share of the directions")


def null_space(values: Tensor, options: Any, *, owner: str, site: str) -> Tensor:
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


def unused(values: Tensor, options: Any) -> Tensor:
    """Return which of the ascending eigenvalues ``values`` count as unused, (d_in,) bool.

    ``options`` has ``nullspace_threshold`` and ``threshold_kind``.
    """
    threshold, kind = options.nullspace_threshold, options.threshold_kind
    if kind == "absolute":
        return values < threshold
    if kind == "median":
        return values < threshold * values.median()
    if kind == "directions":
        import torch

        return torch.arange(len(values), device=values.device) < round(threshold * len(values))
    return values.clamp_min(0).cumsum(0) <= threshold * values.clamp_min(0).sum()
