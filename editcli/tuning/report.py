"""The result of a search, as frozen data; :meth:`TuneReport.to_json` is the contract of ``tune --json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from editcli.tuning.objective import Figures
from editcli.tuning.space import Bound
from editcli.tuning.study import TIE, Record


@dataclass(frozen=True, slots=True)
class Split:
    """The edits that the trials write, and those held out for the comparison at the end."""

    trial: int
    held_out: int
    batch: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """The preset that the search started from and the best trial, on edits that the search never saw."""

    guess: Figures
    best: Figures
    guess_score: float
    best_score: float

    @property
    def confirmed(self) -> bool:
        """Whether the best trial is no worse than the guess here too."""
        return self.best_score > self.guess_score - TIE

    def to_json(self) -> dict[str, Any]:
        """Return both sides, each with its score."""
        return {
            "guess": {"score": self.guess_score, **self.guess.to_json()},
            "best": {"score": self.best_score, **self.best.to_json()},
        }


@dataclass(frozen=True, slots=True)
class TuneReport:
    """The outcome of one ``tune``; ``trials`` holds those of earlier, interrupted calls too."""

    status: str
    """``done`` or ``interrupted``."""
    model: str
    editor: str
    stabilizers: tuple[str, ...]
    edits: str
    split: Split
    kl_price: float
    base: Figures
    """Of the unedited model on the edits of the trials."""
    started_from: Mapping[str, Any]
    """Name, label and layers of the preset that is the guess."""
    bounds: tuple[Bound, ...]
    trials: tuple[Record, ...]
    guess: Record | None
    best: Record | None
    held_out: Comparison | None
    """None where nothing was held out, or the search was interrupted before."""
    chosen: Record | None
    """The trial whose settings were written: the best, or the guess where held-out edits do not confirm the best."""
    preset: str | None
    """The preset file that was written; None while no trial is done."""
    seconds: float
    out: str

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON object."""
        return {
            "status": self.status,
            "model": self.model,
            "editor": self.editor,
            "stabilizers": list(self.stabilizers),
            "edits": {"file": self.edits, **asdict(self.split)},
            "kl_price": self.kl_price,
            "base": self.base.to_json(),
            "started_from": dict(self.started_from),
            "space": {bound.name: [bound.low, bound.high] for bound in self.bounds},
            "trials": [trial.to_json() for trial in self.trials],
            "guess": None if self.guess is None else self.guess.to_json(),
            "best": None if self.best is None else self.best.to_json(),
            "chosen": None if self.chosen is None else self.chosen.number,
            "held_out": None if self.held_out is None else self.held_out.to_json(),
            "preset": self.preset,
            "seconds": round(self.seconds, 1),
            "out": self.out,
        }
