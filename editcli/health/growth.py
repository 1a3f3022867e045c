"""Which law a norm ratio follows along a stream: exponential, linear, a power, or the square root of a random walk.

Every law is fitted by least squares where it is a straight line, and judged where all can be compared: by the share of
R_n's own variance that it explains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression

LARGEST = 1e100
"""R_n beyond which no law is fitted: squares of it would not be finite."""

_Function = Callable[[float], float]


def _same(value: float) -> float:
    return value


def _square(value: float) -> float:
    return value * value


def _exp(value: float) -> float:
    """Return e^value; a line that leaves the range of R_n far behind predicts the largest one."""
    return math.exp(min(value, math.log(LARGEST)))


def _root(value: float) -> float:
    return math.sqrt(max(value, 0.0))


LAWS: Mapping[str, tuple[_Function, _Function, _Function]] = {
    "exponential": (_same, math.log, _exp),
    "linear": (_same, _same, _same),
    "power": (math.log, math.log, _exp),
    "square root": (_same, _square, _root),
}
"""For each law how edits and R_n are changed into a straight line, and back: ln R = a + b n, R = a + b n,
ln R = a + b ln n, and R^2 = a + b n, which is what updates do that have nothing to do with each other."""

_LEAST = 4
"""Fewer points than that fit every law."""


@dataclass(frozen=True, slots=True)
class Growth:
    """The growth of a norm ratio."""

    slope: float
    """Of ln R_n against edits, per edit."""
    log_r2: float
    """Share of the variance of ln R_n that this straight line explains."""
    doubling: float | None
    """Edits in which R_n doubles by that line; None where it does not grow."""
    exponent: float
    """p of the power law R_n ~ n^p."""
    r2: Mapping[str, float]
    """Share of the variance of R_n that each law of :data:`LAWS` explains."""

    @property
    def law(self) -> str:
        """The law that explains most."""
        return max(self.r2, key=lambda name: self.r2[name])


def fit_growth(edits: Sequence[int], ratios: Sequence[float]) -> Growth | None:
    """Fit every law to R_n by number of edits; None for too few points, or where R_n is constant or not a number."""
    usable = all(count > 0 for count in edits) and all(1 / LARGEST < ratio < LARGEST for ratio in ratios)
    if not usable or len(edits) < _LEAST or min(ratios) == max(ratios):
        return None
    lines = {name: _fit(edits, ratios, *law) for name, law in LAWS.items()}
    slope, intercept = lines["exponential"][:2]
    logs = [math.log(ratio) for ratio in ratios]
    return Growth(
        slope=slope,
        log_r2=explained(logs, [intercept + slope * count for count in edits]),
        doubling=math.log(2) / slope if slope > 0 else None,
        exponent=lines["power"][0],
        r2={name: explained(ratios, predicted) for name, (_, _, predicted) in lines.items()},
    )


def explained(measured: Sequence[float], predicted: Sequence[float]) -> float:
    """Return r^2, the share of the variance of ``measured`` that ``predicted`` explains; it may be negative."""
    mean = fmean(measured)
    total = sum((value - mean) ** 2 for value in measured)
    return 1 - sum((value - guess) ** 2 for value, guess in zip(measured, predicted, strict=True)) / total


def _fit(
    edits: Sequence[int], ratios: Sequence[float], across: _Function, up: _Function, back: _Function
) -> tuple[float, float, list[float]]:
    """Return slope and intercept of the straight line, and the ratios that it predicts."""
    line = linear_regression([across(count) for count in edits], [up(ratio) for ratio in ratios])
    predicted = [back(line.intercept + line.slope * across(count)) for count in edits]
    return line.slope, line.intercept, predicted
