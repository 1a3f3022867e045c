"""Guards: conditions that stop a stream before the offending batch is written.

A condition is ``NAME>NUMBER`` or ``NAME<NUMBER`` over the figures of a batch: ``ratio``, ``drift`` and ``jump`` (the
worst site), ``efficacy`` (of the batch just edited) and ``retained`` (of all edits so far). ``nonfinite`` is always on.
An editor may set a limit on ``jump``, the change of R_n = ||W_n|| / ||W_0|| by one batch, which holds unless the user
sets another: AlphaEdit sets 0.5 where its null space is less than half of the directions. A batch beyond it has
destroyed the layer, whatever its own edits score; streams that keep their edits change R_n by less than 0.1 in a batch
of a hundred.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editcli.errors import GuardError, OptionError, near_miss

if TYPE_CHECKING:
    from torch import Tensor

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
SITE_FIGURES = ("ratio", "drift", "jump")
BATCH_FIGURES = ("efficacy", "retained")
NONFINITE = "nonfinite"
_CONDITION = re.compile(r"^\s*([A-Za-z_]+)\s*(>=|<=|>|<)\s*([-+.\deE]+)\s*$", re.ASCII)


@dataclass(frozen=True, slots=True)
class Guard:
    """One condition; a figure for which it holds stops the run."""

    figure: str
    relation: str
    limit: float

    def __str__(self) -> str:
        return f"{self.figure}{self.relation}{self.limit:g}"

    def check(self, figure: str, value: float, *, where: str, remedy: str = "") -> None:
        """Raise :class:`GuardError` when ``value`` of ``figure`` meets the condition, or is NaN.

        ``remedy`` names the settings that make a batch change a weight less; it belongs to ``jump`` alone.
        """
        if math.isnan(value):
            raise GuardError(f"stopped by {NONFINITE}: {figure} is not a number {where}; the last good state is kept")
        if figure == self.figure and _OPERATORS[self.relation](value, self.limit):
            sentence = f"stopped by {self}: {figure} would be {value:.4g} {where}; the last good state is kept"
            raise GuardError(sentence + (_JUMPED.format(remedy=remedy or _TEMPER) if figure == "jump" else ""))


_TEMPER = "choose editor settings that write less"
_JUMPED = "; one batch may not change R_n by so much: {remedy}, or allow it with --stop-if 'jump>NUMBER'"


def parse_guards(conditions: Sequence[str]) -> tuple[Guard, ...]:
    """Read conditions such as ``ratio>2.5``; raise :class:`OptionError` on an unreadable one."""
    return tuple(_parse(text) for text in conditions if text.strip() != NONFINITE)


def with_default(guards: Sequence[Guard], largest_jump: float | None) -> tuple[Guard, ...]:
    """Return ``guards`` and, unless one of them watches ``jump``, the editor's limit."""
    if largest_jump is None or any(guard.figure == "jump" for guard in guards):
        return tuple(guards)
    return (*guards, Guard("jump", ">", largest_jump))


def _parse(text: str) -> Guard:
    match = _CONDITION.match(text)
    if match is None:
        raise OptionError(f"cannot read --stop-if {text!r}: write NAME>NUMBER or NAME<NUMBER, for instance ratio>2.5")
    figure, relation, number = match.groups()
    known = (*SITE_FIGURES, *BATCH_FIGURES)
    if figure not in known:
        raise OptionError(f"--stop-if {text!r} names an unknown figure{near_miss(figure, known)}")
    try:
        limit = float(number)
    except ValueError as error:
        raise OptionError(f"--stop-if {text!r}: {number!r} is not a number") from error
    if not math.isfinite(limit):
        raise OptionError(f"--stop-if {text!r}: the limit must be finite")
    return Guard(figure, relation, limit)


def refuse_nonfinite(what: str, tensors: Iterable[Tensor], *, where: str) -> None:
    """Raise :class:`GuardError` when a tensor holds a number that is not finite."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise GuardError(f"stopped by {NONFINITE}: {what} is not finite {where}; the last good state is kept")


def needs_retained(guards: Sequence[Guard]) -> bool:
    """Tell whether a guard watches retained efficacy, which must then be measured after every batch."""
    return any(guard.figure == "retained" for guard in guards)
