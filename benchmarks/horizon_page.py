"""What docs/benchmarks.md says about long streams on a real model; :mod:`benchmarks.horizon` measures them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.markdown import table

RETAINED = {
    "efficacy accuracy": "efficacy_accuracy",
    "efficacy success": "efficacy_success",
    "generalization success": "generalization_success",
    "specificity success": "specificity_success",
}
"""Headings, and retained figures of a curve."""


def section(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe what every stack retained."""
    horizon = result["result"]
    curves: Mapping[str, Mapping[str, Any]] = horizon["stacks"]
    common = shared_options(curves.values())
    yield from ("## The long horizon, on a real model", "")
    yield f"`python -m benchmarks.horizon`, {horizon['limit']:,} edits in batches of {horizon['batch_size']} on"
    yield f"{horizon['model']}, every stack with {' and '.join(f'`{one}`' for one in common) or 'the preset alone'}."
    yield ""
    edits = sorted({point["edits"] for curve in curves.values() for point in curve["points"]})
    after = " / ".join(f"{count:,}" for count in edits)
    yield f"Retained figures after {after} edits. R_n, the divergence on unrelated text (nats, median) and the"
    yield "accuracy of the first and the last quarter of the edits are those at the end. *clamped*: targets that ended"
    yield "at `targets.clamp`."
    yield ""
    rows = [(title(curve, common), *cells(curve)) for curve in curves.values()]
    heading = ("stack", *RETAINED, "CP@60", "first / last quarter", "R_n", "divergence", "clamped")
    yield from table(heading, rows)


def shared_options(curves: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the options that every stack with options has."""
    sets = [curve["options"] for curve in curves if curve["options"]]
    return [option for option in (sets[0] if sets else []) if all(option in others for others in sets)]


def title(curve: Mapping[str, Any], common: Sequence[str]) -> str:
    """Return a stack's name with the options that are its own."""
    return " ".join([curve["stack"], *(option for option in curve["options"] if option not in common)])


def cells(curve: Mapping[str, Any]) -> Iterator[str]:
    """Yield the cells of a stack's row."""
    points = curve["points"]
    for name in RETAINED.values():
        yield " / ".join(number(point["figures"].get(name)) for point in points)
    yield " / ".join("-" if edits is None else f"{edits:,}" for edits in curve["collapse"].values())
    cohorts = curve["cohorts"].get("efficacy_accuracy")
    yield f"{number(cohorts[0])} / {number(cohorts[-1])}" if cohorts else "n/a"
    yield number(points[-1]["ratio"] if points else None)
    yield number(curve["divergence"][-1] if curve["divergence"] else None, digits=3)
    targets = curve["targets"]
    yield f"{targets['clamped'] / targets['optimised']:.0%}" if targets.get("optimised") else ""


def number(value: float | None, *, digits: int = 2) -> str:
    """Return a figure as text."""
    return "n/a" if value is None else f"{value:.{digits}f}"
