"""Ratios of norms, with one meaning at norm 0 everywhere."""

from __future__ import annotations


def ratio(part: float, whole: float) -> float | None:
    """Return ``part / whole``; None for a whole of 0.

    Inserted blocks have matrices of zeros. Against zeros there is no growth and no drift, whatever was written:
    tables show that no figure is known, guards do not look at it, and the norms themselves say how large the weight is.
    """
    return part / whole if whole else None


def jump(before: float | None, after: float | None) -> float | None:
    """Return by how much a ratio changed, |``after`` - ``before``|; None where either is not known."""
    return None if before is None or after is None else abs(after - before)
