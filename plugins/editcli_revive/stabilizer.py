"""REVIVE: keep updates out of the dominant singular subspace (2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from editcli.linalg.ratios import ratio
from editcli.plugin.interfaces import Problem, Session, Site, Stabilizer, Update
from editcli.plugin.options import option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Protected:
    """The singular directions of one site that no update may touch: orthonormal (d_out, k) and (d_in, k)."""

    left: Tensor
    right: Tensor


class Revive(Stabilizer):
    """Remove from every update what acts on the leading singular directions of the weight.

    With W_0 = U diag(sigma) V^T and k the least number of leading sigma whose sum is tau of the total ::

        D <- (I - U_k U_k^T) D (I - V_k V_k^T)

    so that the k leading singular triplets of the weight stay exact however many edits follow. An update in factors,
    D = A B^T, is filtered in factors. The projectors are used rather than a double sum over the compact decomposition,
    which would also delete what lies in the weight's null space.
    """

    name: ClassVar[str] = "revive"
    reference: ClassVar[str] = "arXiv:2601.11042"

    @dataclass(frozen=True)
    class Options:
        """How much is protected, and of which weight."""

        tau: float = option(0.1, "share of the sum of singular values that is protected")
        basis: Literal["original", "current"] = option(
            "original", "protect the base weight's directions, or those of the weight before each batch"
        )

        def __post_init__(self) -> None:
            if not 0 < self.tau < 1:
                raise ValueError("tau must be greater than 0 and less than 1")

    def __init__(self, options: object = None):
        super().__init__(options)
        self._protected: dict[str, Protected] = {}
        self._figures: dict[str, dict[str, float]] = {}

    def prepare(self, session: Session) -> None:
        if self.options.basis == "current":
            return
        with session.reporter.phase("Decomposing weights", len(session.sites), "sites") as advance:
            for site in session.sites:
                self._protected[site.module] = self._protect(session.baseline(site), session)
                advance(1)

    def stabilize_update(self, update: Update, problem: Problem, session: Session) -> Update:
        kept = self._basis(problem.site, session)
        left, right = _without(update.left, kept.left), _without(update.right, kept.right)
        self._figures[problem.site.module] = {
            "k": kept.left.shape[1],
            "removed_left": _share(update.left, left),
            "removed_right": _share(update.right, right),
        }
        return Update(left, right)

    def record(self) -> dict[str, Any]:
        """Return, per site, k and the shares of ||A|| and ||B|| that were removed from the last update D = A B^T."""
        return {"sites": self._figures}

    def _basis(self, site: Site, session: Session) -> Protected:
        if self.options.basis == "current":
            return self._protect(session.weight(site), session)
        return self._protected[site.module]

    def _protect(self, weight: Tensor, session: Session) -> Protected:
        import torch

        from editcli.linalg.spectra import spectrum

        found = spectrum(weight, tau=self.options.tau, device=session.device)
        k = found.k(self.options.tau)
        # The filter is a projection only to the accuracy to which its basis is orthonormal.
        left, right = (torch.linalg.qr(side[:, :k].double()).Q for side in (found.left, found.right))
        return Protected(left, right)


def _without(factor: Tensor, basis: Tensor) -> Tensor:
    """Return ``factor`` with its components along the orthonormal ``basis`` removed, in the precision of the factor."""
    basis = basis.to(factor)
    kept = factor - basis @ (basis.T @ factor)
    # A second pass removes what rounding left of a component much larger than the rest.
    return kept - basis @ (basis.T @ kept)


def _share(before: Tensor, after: Tensor) -> float:
    return ratio(float((before - after).norm()), float(before.norm())) or 0.0
