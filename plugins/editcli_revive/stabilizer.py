"""REVIVE: keep updates out of the dominant singular subspace (2026)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from editcli.plugin import LowRank, Problem, Session, Site, Stabilizer, Update, option, ratio

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

    It has no error feedback: the filter is a linear projection, and would take again what it took from the last batch.
    """

    name: ClassVar[str] = "revive"
    reference: ClassVar[str] = "arXiv:2601.11042"
    mixes_inputs: ClassVar[bool] = True
    acts_on: ClassVar[Collection[str]] = {"updates"}

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
                self._protected[site.module] = self._protect(session, session.baseline(site))
                advance(1)

    def stabilize_update(self, session: Session, site: Site, update: Update, problem: Problem | None) -> Update:
        protected = self._basis(session, site)
        outer, inner = partial(_without, basis=protected.left), partial(_without, basis=protected.right)
        filtered = update.mapped(outer, inner)
        self._figures[site.module] = {"k": protected.left.shape[1], **_removed(update, filtered)}
        return filtered

    def record(self) -> dict[str, Any]:
        """Return, per site, k and the shares of ||A|| and ||B|| that were removed from the last update D = A B^T."""
        return {"sites": self._figures}

    def _basis(self, session: Session, site: Site) -> Protected:
        if self.options.basis == "current":
            return self._protect(session, session.weight(site))
        return self._protected[site.module]

    def _protect(self, session: Session, weight: Tensor) -> Protected:
        import torch

        from editcli.plugin import spectrum

        leading = spectrum(weight, tau=self.options.tau, device=session.device)
        k = leading.k(self.options.tau)
        # The filter is a projection only to the accuracy to which its basis is orthonormal.
        left, right = (torch.linalg.qr(side[:, :k].double()).Q for side in (leading.left, leading.right))
        return Protected(left, right)


def _without(factor: Tensor, basis: Tensor) -> Tensor:
    """Return ``factor`` with its components along the orthonormal ``basis`` removed, in the precision of the factor."""
    basis = basis.to(factor)
    once = factor - basis @ (basis.T @ factor)
    # A second pass removes what rounding left of a component much larger than the rest.
    return once - basis @ (basis.T @ once)


def _removed(before: Update, after: Update) -> dict[str, float]:
    """Return the share of each factor that was removed; of a matrix without factors, its share for both sides."""
    if isinstance(before, LowRank) and isinstance(after, LowRank):
        sides = ((before.left, after.left), (before.right, after.right))
    else:
        sides = ((before.dense(), after.dense()),) * 2
    return {f"removed_{name}": _share(*side) for name, side in zip(("left", "right"), sides, strict=True)}


def _share(before: Tensor, after: Tensor) -> float:
    return ratio(float((before - after).norm()), float(before.norm())) or 0.0
