"""NAS: norm-anchor scaling of target values (2026)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from editcli.plugin import (
    EditRequest,
    NumericalError,
    OptionError,
    SavedState,
    Session,
    Stabilizer,
    State,
    Values,
    option,
)

if TYPE_CHECKING:
    from torch import Tensor

BY_HAND = "set by hand"
BATCH = 32
"""Pilots of the first batch, the fewest that an anchor rests on; later batches are multiples of it."""
PRECISION = 0.01
"""Standard error, as a share of the anchor, at which no more pilots are needed."""


@dataclass(frozen=True)
class _Saved:
    """What a snapshot holds."""

    anchor: float
    pilots: int
    source: str
    error: float | None = None
    layers: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """The same figures by layer, where each has an anchor of its own."""

    def __post_init__(self) -> None:
        if not (self.anchor > 0 and self.pilots >= 0 and (self.error is None or self.error >= 0)):
            raise ValueError("anchor must be greater than 0, and error and pilots must not be negative")
        if not all((figures.get("anchor") or 0.0) > 0 for figures in self.layers.values()):
            raise ValueError("every layer's anchor must be greater than 0")


class Nas(Stabilizer):
    """Give every edit's contribution the norm that contributions have on the unedited model.

    Each written value v = m + delta grows the weight a little, a grown weight makes the next m longer, and so the
    norms of a long stream run away. With the anchor a, the mean of ||m + delta|| over pilot edits on the unedited
    model::

        v <- a v / ||v||            v <- m, the edit is dropped, when ||v|| > guard a

    The anchor is one number, measured once at the last edited layer and never again; with ``targets.per_layer`` each
    layer has one. Pilots are measured
    in batches, in an order that their content decides, until the standard error of their trimmed mean is below
    :data:`PRECISION`.
    """

    name: ClassVar[str] = "nas"
    reference: ClassVar[str] = "arXiv:2602.02543"
    acts_on: ClassVar[Collection[str]] = {"values"}

    @dataclass(frozen=True)
    class Options:
        """How the anchor is found and what is too far from it."""

        guard: float = option(2.0, "drop an edit whose contribution is longer than this many anchors")
        pilots: int = option(1000, "measure the anchor on at most this many edits")
        trim: float = option(0.05, "share of the longest pilot contributions to leave out")
        anchor: float | None = option(None, "the anchor itself, instead of measuring it")

        def __post_init__(self) -> None:
            if not (self.guard > 0 and self.pilots > 0 and 0 <= self.trim < 1):
                raise ValueError("guard and pilots must be greater than 0, and trim at least 0 and less than 1")
            if self.anchor is not None and not self.anchor > 0:
                raise ValueError("anchor must be greater than 0")

    anchor: float
    pilots: int = 0
    """Number of pilots that served."""
    error: float = 0.0
    """Standard error of the anchor; infinite after a single pilot."""
    source: str = BY_HAND
    layers: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    """With ``targets.per_layer`` the anchor, its error and the number of pilots of each layer, by module name."""

    def prepare(self, session: Session) -> None:
        if self.options.anchor is not None:
            self.anchor = self.options.anchor
            return
        requests, self.source = session.pilots(self.options.pilots)
        if not requests:
            raise OptionError("nas has no edits to measure its anchor on; set nas.anchor to a number")
        digests = "".join(request.digest for request in requests)
        parts = {
            "pilots": hashlib.sha256(digests.encode()).hexdigest(),
            "trim": self.options.trim,
            "batch": BATCH,
            "precision": PRECISION,
        }
        for stage in session.stages:
            measure = partial(self._measure, requests, stage)
            anchor, error, pilots = stage.calibrated(self.name, parts, measure).tolist()
            self.anchor, self.error, self.pilots = anchor, error, int(pilots)
            if len(session.stages) > 1:
                self.layers = {**self.layers, stage.sites[-1].module: self._figures()}

    def _measure(self, requests: Sequence[EditRequest], session: Session) -> Tensor:
        """Return (anchor, its standard error, how many pilots served), (3,) float64."""
        import torch

        norms = torch.empty(0, dtype=torch.float64)
        mean, error, size = 0.0, float("inf"), BATCH
        while len(norms) < len(requests) and not error < PRECISION * mean:
            left = requests[len(norms) :]
            # A remainder that is too small for a batch of its own joins this one.
            batch = left if len(left) < size + BATCH else left[:size]
            values = session.values(batch, prefixed=False)
            norms = torch.cat([norms, values.contribution.double().norm(dim=0).cpu()])
            mean, error = trimmed_mean(norms, self.options.trim)
            size = _missing(len(norms), error / mean) if mean else BATCH
        # A NaN sorts last and may be trimmed away; only one that reaches the mean matters.
        if not 0 < mean < float("inf"):
            raise NumericalError(f"the anchor of nas came out as {mean}", site=session.sites[-1].module)
        return torch.tensor([mean, error, len(norms)], dtype=torch.float64)

    def stabilize_values(self, session: Session, values: Values) -> Values:
        contribution, anchor = values.contribution, self._anchor(session)
        norms = contribution.double().norm(dim=0)
        # Comparing this way round drops a NaN too; a contribution of norm zero has no direction to scale along.
        usable = (norms <= self.options.guard * anchor) & (norms > 0)
        scaled = contribution * (anchor / norms).to(contribution.dtype)
        lost = {column: self._reason(float(norms[column]), anchor) for column in (~usable).nonzero().flatten().tolist()}
        return values.with_contribution(scaled).drop(lost)

    def _anchor(self, session: Session) -> float:
        """Return the anchor of the layer where a stage's values are."""
        return self.layers[session.sites[-1].module]["anchor"] if self.layers else self.anchor

    def _reason(self, norm: float, anchor: float) -> str:
        if norm > self.options.guard * anchor:
            limit = f"more than nas.guard={self.options.guard:g} times the anchor {anchor:.3g}"
            return f"its contribution has norm {norm:.3g}, {limit}"
        return f"its contribution has norm {norm:.3g}, which has no direction to keep"

    def state(self) -> State:
        """Return ``anchor``, its standard ``error``, the number of ``pilots`` and ``source``, and ``layers`` if any."""
        layers = {"layers": dict(self.layers)} if self.layers else {}
        return State(json={**self._figures(), "source": self.source, **layers})

    def load_state(self, session: Session, state: State) -> None:
        saved = SavedState(self.name, state)
        if "anchor" in saved:
            saved = SavedState(self.name, State(json=_earlier(saved)))
        figures = saved.fields(_Saved)
        self.anchor, self.error = figures.anchor, math.inf if figures.error is None else figures.error
        self.pilots, self.source = figures.pilots, figures.source
        self.layers = dict(figures.layers)
        stages = [stage.sites[-1].module for stage in session.stages] if self.layers else []
        if any(module not in self.layers for module in stages):
            raise saved.refusal("the anchor of a layer is missing")

    def _figures(self) -> dict[str, Any]:
        return {"anchor": self.anchor, "error": self._error, "pilots": self.pilots}

    @property
    def _error(self) -> float | None:
        """The standard error; None for an infinite one, which JSON cannot hold."""
        return self.error if math.isfinite(self.error) else None

    def record(self) -> dict[str, Any]:
        error = self._error if self.pilots else None
        layers = {"layers": dict(self.layers)} if self.layers else {}
        whole = {"anchor": self.anchor, "standard_error": error, "pilots": self.pilots, "source": self.source}
        return {**whole, **layers}


def _earlier(saved: SavedState) -> dict[str, Any]:
    """Return the state that earlier versions saved as tensors, the text as UTF-8 bytes."""
    # Runs that began before the error was measured have none; after a single pilot it was infinite.
    error = saved.state.tensors.get("error")
    finite = error is not None and bool(error.isfinite().all())
    return {
        "anchor": float(saved.tensor("anchor", ())),
        "pilots": saved.count("pilots"),
        "source": bytes(saved.tensor("source", (None,), types=("uint8",)).tolist()).decode("utf-8", "replace"),
        "error": float(saved.tensor("error", ())) if finite else None,
    }


def _missing(count: int, error: float) -> int:
    """Return how many more pilots bring the relative ``error`` of ``count`` down to :data:`PRECISION`.

    An error falls with the root of the count. Many at once cost less than a few at a time, but the first error is
    itself uncertain, so that no batch is larger than three times what is measured.
    """
    ratio = error / PRECISION
    needed = count * (ratio**2 - 1) if math.isfinite(ratio) else BATCH
    return BATCH * max(1, min(math.ceil(needed / BATCH), 3 * count // BATCH))


def trimmed_mean(norms: Tensor, trim: float) -> tuple[float, float]:
    """Return the mean of ``norms`` (n,) without the share ``trim`` of the longest, and its standard error.

    The error is that of Tukey and McLaughlin (Sankhya A 25, 1963) for a sample trimmed on one side: with the m
    shortest of n kept and the others set to the longest of these, it is their deviation times sqrt(n) / m.
    """
    ordered = norms.sort().values
    count = max(1, round(len(ordered) * (1 - trim)))
    mean = float(ordered[:count].mean())
    ordered[count:] = ordered[count - 1]
    return mean, float(ordered.std()) * math.sqrt(len(ordered)) / count if len(ordered) > 1 else math.inf
