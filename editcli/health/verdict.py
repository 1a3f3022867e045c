"""Say of an edited matrix whether it is fine, drifting or collapsing, by thresholds the user can change.

The defaults are our rules of thumb: 1.25 is where a stream of edits begins to show in a weight's norm, and by 2.5
the streams that we measured had lost most of their earlier edits. For updates at a right angle to the weight,
drift^2 = ratio^2 - 1, which gives the thresholds on drift.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editcli.errors import OptionError
from editcli.plugin.options import build, option

if TYPE_CHECKING:
    from editcli.records.journal import BatchRecord

FINE, DRIFTING, COLLAPSING = "fine", "drifting", "collapsing"
ORDER = (FINE, DRIFTING, COLLAPSING)
"""Verdicts, the best first."""

_NAMES = {"ratio": "R_n", "drift": "drift", "spectral": "spectral growth", "rank": "effective rank share"}


@dataclass(frozen=True)
class Thresholds:
    """Where a site stops being fine. A ratio below 1/threshold counts as one above it."""

    drifting_ratio: float = option(1.25, "||W_n|| / ||W_0|| from which a site is drifting")
    collapsing_ratio: float = option(2.5, "||W_n|| / ||W_0|| from which a site is collapsing")
    drifting_drift: float = option(0.75, "||W_n - W_0|| / ||W_0|| from which a site is drifting")
    collapsing_drift: float = option(2.25, "||W_n - W_0|| / ||W_0|| from which a site is collapsing")
    drifting_spectral: float = option(2.0, "growth of the spectral norm from which a site is drifting")
    collapsing_spectral: float = option(5.0, "growth of the spectral norm from which a site is collapsing")
    drifting_rank: float = option(0.9, "effective rank, as a share of the base's, below which a site is drifting")
    collapsing_rank: float = option(0.5, "effective rank, as a share of the base's, below which a site is collapsing")

    def __post_init__(self) -> None:
        for name in ("ratio", "drift", "spectral"):
            if not 0 < getattr(self, f"drifting_{name}") <= getattr(self, f"collapsing_{name}"):
                raise ValueError(f"drifting_{name} must be above 0 and not above collapsing_{name}")
        if not 0 <= self.collapsing_rank <= self.drifting_rank:
            raise ValueError("collapsing_rank must be at least 0 and not above drifting_rank")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One verdict with the figures that decided it; ``word`` is None where there was nothing to compare with."""

    word: str | None
    reasons: tuple[str, ...] = ()


UNKNOWN = Verdict(None)
"""There was nothing to compare with."""


def parse_thresholds(assignments: Iterable[str]) -> Thresholds:
    """Read ``NAME=VALUE`` texts; raise :class:`~editcli.errors.OptionError` naming the near miss."""
    settings = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"cannot read threshold {text!r}: write NAME=VALUE, for instance collapsing_ratio=3")
        settings[name.strip().replace("-", "_")] = value.strip()
    return build(Thresholds, settings, owner="threshold")


def judge(
    thresholds: Thresholds,
    *,
    ratio: float | None = None,
    drift: float | None = None,
    spectral: float | None = None,
    rank: float | None = None,
) -> Verdict:
    """Judge one site; ``spectral`` and ``rank`` are relative to the base's, figures that are not known are None."""
    findings = list(_findings(thresholds, {"ratio": ratio, "drift": drift, "spectral": spectral, "rank": rank}))
    if not findings:
        return UNKNOWN
    word = worst(grade for grade, _ in findings)
    return Verdict(word, tuple(reason for grade, reason in findings if grade == word and grade != FINE))


def since(batches: Sequence[BatchRecord], module: str, thresholds: Thresholds) -> BatchRecord | None:
    """Return the batch from which on a site is no longer fine by its R_n and drift; None when it is, or unknown."""
    first = None
    for batch in reversed(batches):
        site = batch.site(module)
        if site is None or judge(thresholds, ratio=site.ratio, drift=site.drift).word in (None, FINE):
            break
        first = batch
    return first


def worst(words: Iterable[str | None]) -> str | None:
    """Return the worst verdict; None when none was given."""
    known = [word for word in words if word is not None]
    return max(known, key=ORDER.index) if known else None


def _findings(thresholds: Thresholds, figures: dict[str, float | None]) -> Iterator[tuple[str, str]]:
    """Yield a verdict and its reason for every figure that is known."""
    for name, value in figures.items():
        if value is None:
            continue
        if not math.isfinite(value):
            yield COLLAPSING, f"{_NAMES[name]} is not finite"
            continue
        limits = [float(getattr(thresholds, f"{word}_{name}")) for word in (DRIFTING, COLLAPSING)]
        passed = sum(_is_beyond(name, value, limit) for limit in limits)
        limit = limits[passed - 1]
        is_loss = name in ("ratio", "spectral") and value < 1
        yield ORDER[passed], f"{_NAMES[name]} {value:.3g} (limit {1 / limit if is_loss else limit:g})"


def _is_beyond(name: str, value: float, limit: float) -> bool:
    """Say whether a figure is past a threshold: of a rank less is worse, of a norm a loss is as bad as a gain."""
    if name == "rank":
        return value < limit
    if name == "drift":
        return value >= limit
    return value <= 0 or max(value, 1 / value) >= limit
