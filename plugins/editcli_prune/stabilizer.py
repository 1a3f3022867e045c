"""PRUNE: restrain the largest singular values of the total change (Ma et al., 2024)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar

from editcli.plugin import Session, Site, Stabilizer

if TYPE_CHECKING:
    from torch import Tensor

    from editcli.plugin import Spectrum


class Prune(Stabilizer):
    """Compress the singular values of W - W_0 that exceed the largest singular value of W_0, once, at read-out.

    For each such value ``s <- log(s) - log(s_max) + s_max``; everything else stays. It acts on the accumulated change,
    not on each batch. The paper's released code adds the result to weights that are edited already; here it replaces
    the change.
    """

    name: ClassVar[str] = "prune"
    reference: ClassVar[str] = "arXiv:2405.16821"
    acts_on: ClassVar[Collection[str]] = {"weights"}

    def __init__(self, options: object = None):
        super().__init__(options)
        self._restrained: dict[str, int] = {}

    def stabilize_weight(self, session: Session, site: Site, weight: Tensor) -> Tensor:
        from editcli.plugin import spectral_norm

        base = session.baseline(site).to(weight.device).double()
        change = weight.double() - base
        limit, _ = spectral_norm(base, device=session.device)
        if limit == 0:
            # Against a base of zeros every change is too large, and there is nothing to restrain it to.
            return weight
        leading = _leading(change, limit, session)
        above = int((leading.values > limit).sum())
        self._restrained[site.module] = above
        if above == 0:
            return weight
        values = leading.values[:above].to(change)
        left, right = leading.left[:, :above].to(change), leading.right[:, :above].to(change)
        excess = values - ((values / limit).log() + limit)
        return (base + change - left * excess @ right.T).to(weight.dtype)

    def record(self) -> dict[str, Any]:
        """Return how many singular values were restrained per site."""
        return {"restrained": self._restrained}


def _leading(change: Tensor, limit: float, session: Session) -> Spectrum:
    """Decompose ``change`` far enough to hold every singular value above ``limit`` with its vectors."""
    from editcli.plugin import spectrum

    size, count = min(change.shape), 8
    while True:
        leading = spectrum(change, vectors=min(count, size), device=session.device)
        above = int((leading.values > limit).sum())
        whole = above < len(leading.values) or len(leading.values) == size
        if whole and above <= leading.left.shape[1]:
            return leading
        count = max(2 * count, above)
