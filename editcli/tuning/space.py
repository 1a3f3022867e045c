"""The search space of ``tune``: layers and settings, in one table; never imports torch or Optuna.

Bounds are derived from the preset that the search starts from, so that its own point always lies inside, and one
table serves absolute and relative settings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SOURCE = "(bundled probes)"
"""Stands where an edits file is named when the edits are made from bundled probes."""

Point = Mapping[str, float]
"""One candidate: a value for every bound, by its name."""

LAST, COUNT = "layers.last", "layers.count"
"""Names of the bounds that choose layers: the last one, and how many in a row end there."""
DEPTH_SHARE = 0.15
"""How far the last layer may move from the preset's, as a share of the depth."""
MOST_LAYERS = 5
"""Layers in a row, unless the preset has more. The published sites are five or six in a row."""
DIGITS = 4
"""Digits of a searched value: more would only make the table hard to read."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """One row of the table: an option of a component, and the range in which it is searched.

    The scale is logarithmic, unless the preset's value is 0: then the range goes from 0 to ``high`` on a linear one.
    """

    component: str
    option: str
    low: float
    high: float
    scaled: bool = False
    """True where ``low``, ``high`` and ``first`` are multiples of the preset's value."""
    when: tuple[str, str] | None = None
    """Another option of the component and the value that it must have for this row to hold."""
    first: tuple[float, ...] = ()
    """Values that are tried right after the preset's, all else as in the preset."""

    @property
    def name(self) -> str:
        """The option as the command line writes it."""
        return f"{self.component}.{self.option}"


TABLE: tuple[Dimension, ...] = (
    # The published rates are 0.1 and 0.5, in coordinates whose scale differs more than tenfold between models.
    Dimension("targets", "lr", 0.02, 2.0, when=("lr_kind", "absolute"), first=(0.5, 0.1)),
    Dimension("targets", "lr", 0.25, 4.0, scaled=True, when=("lr_kind", "relative"), first=(2.0,)),
    # From half of what is usual to what EasyEdit's configurations allow.
    Dimension("targets", "clamp", 0.3, 4.0),
    # At the published 0.5 the decay hardly counts: ||h|| is in the tens or hundreds and divides it by its square.
    Dimension("targets", "v_weight_decay", 0.05, 50.0, when=("decay_kind", "absolute")),
    Dimension("targets", "v_weight_decay", 0.005, 0.5, when=("decay_kind", "relative")),
    Dimension("memit", "mom2_update_weight", 0.01, 10.0, scaled=True),
    Dimension("rlsedit", "mom2_update_weight", 0.01, 10.0, scaled=True),
    Dimension("rlsedit", "lambda_reg", 0.01, 100.0, scaled=True),
    Dimension("alphaedit", "nullspace_threshold", 0.1, 10.0, scaled=True, when=("threshold_kind", "absolute")),
    Dimension("alphaedit", "nullspace_threshold", 0.1, 10.0, scaled=True, when=("threshold_kind", "relative")),
    Dimension("alphaedit", "nullspace_threshold", 0.1, 10.0, scaled=True, when=("threshold_kind", "median")),
    # Here the threshold is itself a share of the directions.
    Dimension("alphaedit", "nullspace_threshold", 0.2, 0.95, when=("threshold_kind", "directions")),
    Dimension("alphaedit", "l2", 0.1, 100.0, scaled=True),
    Dimension("ft", "lr", 0.1, 10.0, scaled=True),
    Dimension("ultraedit", "lr", 0.1, 30.0, scaled=True),
)
"""The searched settings besides layers. A row holds for the editor in use, and for the optimisation of targets."""

_DEFAULTS: Mapping[str, str] = {"targets.lr_kind": "absolute", "targets.decay_kind": "absolute"}
"""Values of options that a row asks for where the component has no such option."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A range to search, with the preset's value inside."""

    name: str
    low: float
    high: float
    start: float
    """The preset's value."""
    integer: bool = False
    log: bool = True
    """Whether ratios count, not differences; a range that begins at 0 has none."""
    first: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """Layers and settings to try; ``settings`` are laid over those of the preset and of the user."""

    layers: tuple[int, ...]
    settings: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Space:
    """The whole search space, around the starting point of the search."""

    bounds: tuple[Bound, ...]
    layers: tuple[int, ...]
    """The preset's layers."""

    @property
    def start(self) -> dict[str, float]:
        """The preset's own point: the guess that the search has to beat."""
        return {bound.name: bound.start for bound in self.bounds}

    def first_points(self) -> Iterator[dict[str, float]]:
        """Yield the points to try before the search draws any: the preset, then one setting changed at a time."""
        yield self.start
        for bound in self.bounds:
            for value in bound.first:
                if value != bound.start:
                    yield {**self.start, bound.name: value}

    def candidate(self, point: Point) -> Candidate:
        """Return the layers and settings of a point; those of :attr:`start` are exactly the preset's."""
        layers = self.layers
        if LAST in point:
            last, count = int(point[LAST]), int(point.get(COUNT, 1))
            if (last, count) != (self.layers[-1], len(self.layers)):
                layers = tuple(range(max(last + 1 - count, 0), last + 1))
        settings: dict[str, dict[str, Any]] = {}
        for bound in self.bounds:
            component, _, option = bound.name.partition(".")
            if component != "layers":
                value = point[bound.name]
                settings.setdefault(component, {})[option] = value if value == bound.start else _rounded(value)
        return Candidate(layers, settings)

    def all_layers(self) -> tuple[int, ...]:
        """Return every layer that some candidate writes."""
        named = {bound.name: bound for bound in self.bounds}
        if LAST not in named:
            return self.layers
        last, count = named[LAST], named.get(COUNT)
        lowest = max(int(last.low) + 1 - int(count.high if count else 1), 0)
        return tuple(sorted({*self.layers, *range(lowest, int(last.high) + 1)}))


def build_space(
    effective: Mapping[str, Mapping[str, Any]],
    *,
    layers: Sequence[int],
    depth: int,
    fixed: Collection[str] = (),
    single_site: bool = False,
    table: Sequence[Dimension] = TABLE,
) -> Space:
    """Return the space around settings in force, ``{component: {option: value}}``.

    ``fixed`` names what is not searched: ``component.option``, or ``layers``. A row whose component is not among
    ``effective`` does not hold, nor does a scaled one whose value is 0.
    """
    bounds = [] if "layers" in fixed else list(_layer_bounds(layers, depth, single_site=single_site))
    for row in table:
        section = effective.get(row.component, {})
        if row.name not in fixed and row.option in section and _holds(row, section):
            bounds += _bound(row, section[row.option])
    return Space(tuple(bounds), tuple(layers))


def _layer_bounds(layers: Sequence[int], depth: int, *, single_site: bool) -> Iterator[Bound]:
    reach = max(1, round(DEPTH_SHARE * depth))
    last = layers[-1]
    yield Bound(LAST, max(last - reach, 0), max(min(last + reach, depth - 2), last), last, integer=True)
    if not single_site:
        yield Bound(COUNT, 1, max(MOST_LAYERS, len(layers)), len(layers), integer=True)


def _holds(row: Dimension, section: Mapping[str, Any]) -> bool:
    if row.when is None:
        return True
    option, value = row.when
    return section.get(option, _DEFAULTS.get(f"{row.component}.{option}")) == value


def _bound(row: Dimension, value: float | None) -> Iterator[Bound]:
    if value is None or value < 0 or (value == 0 and row.scaled):
        return
    if value == 0:
        yield Bound(row.name, 0.0, row.high, 0.0, log=False)
        return
    unit = value if row.scaled else 1.0
    low, high = min(row.low * unit, value), max(row.high * unit, value)
    yield Bound(row.name, low, high, float(value), first=tuple(_rounded(one * unit) for one in row.first))


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
