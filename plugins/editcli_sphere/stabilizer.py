"""SPHERE: keep updates out of the directions along which the rows of the weight concentrate (2025)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from editcli.plugin import Problem, SavedState, Session, Site, Stabilizer, State, Update, option, ratio

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-8
"""Added to the norm of each row, as in the paper's code."""


@dataclass(frozen=True)
class _Fields:
    """What a snapshot holds beside the bases."""

    batches: int

    def __post_init__(self) -> None:
        if self.batches < 0:
            raise ValueError("batches must not be negative")


class Sphere(Stabilizer):
    """Damp what an update writes along the principal directions of the weight's rows.

    With the rows of the current weight brought to length 1, W^ (d_out, d_in), and U (d_in, r) the leading eigenvectors
    of W^^T W^ / d_out ::

        D <- D (I - alpha U U^T),    r = 1 + #{j : the j leading eigenvalues hold at most eta of the trace}

    so that the rows of the edited weight stay as evenly spread over the unit sphere as they were. An update in factors,
    D = A B^T, is filtered in factors. REVIVE differs in four points: it filters both sides, wholly, without bringing
    rows to one length, and by default along the directions of the base weight.
    """

    name: ClassVar[str] = "sphere"
    reference: ClassVar[str] = "arXiv:2510.01172"
    mixes_inputs: ClassVar[bool] = True
    acts_on: ClassVar[Collection[str]] = {"updates"}
    remembers: bool = True

    @dataclass(frozen=True)
    class Options:
        """How many directions are damped, how much, and how often they are found again."""

        eta: float = option(0.5, "share of the rows' variance whose directions are damped")
        alpha: float = option(0.5, "share of an update along these directions that is removed")
        every: int = option(1, "batches from one decomposition of the current weight to the next")

        def __post_init__(self) -> None:
            if not (0 < self.eta < 1 and 0 < self.alpha <= 1 and self.every > 0):
                raise ValueError("eta must lie between 0 and 1, alpha be at most 1 and both, and every, above 0")

    def __init__(self, options: object = None):
        super().__init__(options)
        self.bases: dict[str, Tensor] = {}
        """U of each site by module name, (d_in, r) float64."""
        self.batches = 0
        self._removed: dict[str, float] = {}

    def prepare(self, session: Session) -> None:
        self.batches = 0
        self._decompose(session)

    def stabilize_update(self, session: Session, site: Site, update: Update, problem: Problem | None) -> Update:
        basis = self.bases[site.module]

        def damp(factor: Tensor) -> Tensor:
            directions = basis.to(factor)
            return factor - self.options.alpha * (directions @ (directions.T @ factor))

        damped = update.mapped(inner=damp)
        left = ratio(damped.norm(), update.norm())
        self._removed[site.module] = 0.0 if left is None else 1 - left
        return damped

    def remember(self, session: Session, problems: Sequence[Problem], updates: Mapping[Site, Update]) -> None:
        self.batches += 1
        if self.batches % self.options.every == 0:
            self._decompose(session)

    def state(self) -> State:
        """Return U of each site as ``<module>.basis``, and the number of ``batches``."""
        return State({f"{module}.basis": basis for module, basis in self.bases.items()}, {"batches": self.batches})

    def load_state(self, session: Session, state: State) -> None:
        from editcli.plugin import double

        saved = SavedState(self.name, state)
        for site in session.sites:
            basis = saved.tensor(f"{site.module}.basis", (session.weight(site).shape[1], None))
            self.bases[site.module] = double(basis, session.device)
        self.batches = saved.fields(_Fields).batches

    def record(self) -> dict[str, Any]:
        """Return, per site, r and the share by which the last update became shorter."""
        return {"sites": {m: {"r": u.shape[1], "removed": self._removed.get(m, 0.0)} for m, u in self.bases.items()}}

    def _decompose(self, session: Session) -> None:
        with session.reporter.phase("Decomposing weights", len(session.sites), "sites") as advance:
            for site in session.sites:
                self.bases[site.module] = principal(session.weight(site), self.options.eta)
                advance(1)


def principal(weight: Tensor, eta: float) -> Tensor:
    """Return the leading eigenvectors of W^^T W^, (d_in, r) float64, for ``weight`` W, (d_out, d_in).

    The smaller of the two Gram matrices is decomposed: W^ W^^T = V diag(e) V^T has the same eigenvalues e, and the
    eigenvectors sought are W^^T V, brought to length 1. A direction without variance is none, so r may be less.
    """
    import torch

    from editcli.plugin import double

    weight = double(weight, weight.device)
    rows = weight / (weight.norm(dim=1, keepdim=True) + TINY)
    wide = rows.shape[0] < rows.shape[1]
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    count = 1 + int((values.cumsum(0) <= eta * values.sum()).sum())
    leading = vectors[:, : min(count, int((values > values[0] * 1e-12).sum()))]
    # The filter removes a share exactly only as far as its basis is orthonormal.
    return torch.linalg.qr(rows.T @ leading if wide else leading).Q
