"""Each law is recognised in a curve that it made, and its figures are the curve's own."""

from __future__ import annotations

import math

import pytest

from editcli.health.growth import LAWS, explained, fit_growth

EDITS = tuple(range(100, 2100, 100))
CURVES = {
    "exponential": lambda n: 0.9 * math.exp(n / 700),
    "linear": lambda n: 1 + n / 500,
    "power": lambda n: 0.3 * n**0.3,
    "square root": lambda n: math.sqrt(1 + n / 100),
}


@pytest.mark.parametrize("law", LAWS)
def test_a_curve_is_recognised(law: str):
    growth = fit_growth(EDITS, [CURVES[law](n) for n in EDITS])
    assert growth is not None
    assert growth.law == law
    assert growth.r2[law] == pytest.approx(1, abs=1e-12)
    assert all(share < 0.9999 for name, share in growth.r2.items() if name != law)


def test_figures_of_an_exponential_are_its_own():
    growth = fit_growth(EDITS, [CURVES["exponential"](n) for n in EDITS])
    assert growth is not None
    assert growth.slope == pytest.approx(1 / 700)
    assert growth.doubling == pytest.approx(700 * math.log(2))
    assert growth.log_r2 == pytest.approx(1)


def test_exponent_of_a_power_is_its_own():
    growth = fit_growth(EDITS, [CURVES["power"](n) for n in EDITS])
    assert growth is not None
    assert growth.exponent == pytest.approx(0.3)


def test_what_shrinks_does_not_double():
    growth = fit_growth(EDITS, [2 - n / 4000 for n in EDITS])
    assert growth is not None
    assert growth.doubling is None
    assert growth.slope < 0


@pytest.mark.parametrize(
    ("edits", "ratios"),
    [((), ()), ((1, 2, 3), (1.0, 2.0, 3.0)), ((1, 2, 3, 4), (1.0,) * 4), ((1, 2, 3, 4), (1.0, 2.0, math.nan, 3.0))],
)
def test_what_no_line_can_be_drawn_through_is_not_fitted(edits: tuple[int, ...], ratios: tuple[float, ...]):
    assert fit_growth(edits, ratios) is None


def test_share_explained_of_a_small_case():
    # Variance 2 about the mean 2, residuals 0, 1 and 0.
    assert explained([1, 2, 3], [1, 3, 3]) == pytest.approx(1 - 1 / 2)
    assert explained([1, 2, 3], [2, 2, 2]) == 0
