"""Spectra of the edited weights, after every n-th batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from editcli.plugin import Diagnostic, SavedState, Session, Site, State, Update, option, ratio


@dataclass(frozen=True)
class _Saved:
    """What a snapshot holds."""

    batches: int

    def __post_init__(self) -> None:
        if self.batches < 0:
            raise ValueError("batches must not be negative")


class Spectra(Diagnostic):
    """Watch how the spectrum of each edited weight changes against the base's.

    Growth of the spectral norm says that a few directions take over, a falling effective rank that the others lose
    their share. Decomposing a weight is slow, so nothing is computed unless ``every`` is set (``--diagnose-every``).
    """

    name: ClassVar[str] = "spectra"
    reference: ClassVar[str] = "Roy and Vetterli (2007), effective rank"
    remembers: bool = True

    @dataclass(frozen=True)
    class Options:
        """How often to look."""

        every: int = option(0, "look after every so many batches; 0 is never")

        def __post_init__(self) -> None:
            if self.every < 0:
                raise ValueError("every must be at least 0")

    def __init__(self, options: Any = None):
        super().__init__(options)
        self._batches = 0
        self._bases: dict[Site, tuple[float, float]] = {}

    def observe(self, session: Session, updates: Mapping[Site, Update]) -> dict[str, float]:
        self._batches += 1
        if not self.options.every or self._batches % self.options.every:
            return {}
        figures: dict[str, float] = {}
        for site in session.sites:
            growth, share = self._shares(session, site)
            known = {"spectral_growth": growth, "effective_rank_share": share}
            figures |= {f"{name}/layer {site.layer}": value for name, value in known.items() if value is not None}
        return figures

    def state(self) -> State:
        """Return the number of ``batches`` so far, so that a resumed stream is measured when an unbroken one is."""
        return State(json={"batches": self._batches})

    def load_state(self, session: Session, state: State) -> None:
        saved = SavedState(self.name, state)
        # Earlier versions saved the number as a tensor.
        self._batches = saved.count("batches") if "batches" in saved else saved.fields(_Saved).batches

    def _shares(self, session: Session, site: Site) -> tuple[float | None, float | None]:
        """Return sigma_1 and the effective rank of the weight, relative to the base's; None for a base of zeros."""
        from editcli.plugin import spectrum  # Imports torch, which listing plugins must not.

        if site not in self._bases:
            base = spectrum(session.baseline(site), device=session.device)
            self._bases[site] = base.spectral, base.effective_rank
        current = spectrum(session.weight(site), device=session.device)
        spectral, rank = self._bases[site]
        return ratio(current.spectral, spectral), ratio(current.effective_rank, rank)
