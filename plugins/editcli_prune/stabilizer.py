"""PRUNE: restrain the largest singular values of the total change (Ma et al., 2024)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from editcli.plugin import Dense, Problem, Session, Site, Stabilizer, Update, option

if TYPE_CHECKING:
    from torch import Tensor

    from editcli.plugin import Spectrum


class Prune(Stabilizer):
    """Compress the singular values of W - W_0 that exceed the largest singular value of W_0, once, at read-out.

    For each such value ``s <- log(s) - log(s_max) + s_max``; everything else stays. It acts on the accumulated change.
    The paper's released code adds the result to weights that are edited already; here it replaces the change. With
    ``when=batch`` each update is changed so that the weight which it leads to is compressed already, and later batches
    are solved on that weight; ``feedback`` gives the next batch what this one lost (arXiv 2605.26670, Algorithm 1).
    """

    name: ClassVar[str] = "prune"
    reference: ClassVar[str] = "arXiv:2405.16821"
    acts_on: ClassVar[Collection[str]] = {"updates", "weights"}

    @dataclass(frozen=True)
    class Options:
        """How often the change is compressed."""

        when: Literal["end", "batch"] = option("end", "end: once, when the model is saved; batch: with every batch")
        feedback: bool = option(False, "with when=batch: give the next batch what this one lost (error feedback)")

        def __post_init__(self) -> None:
            if self.feedback and self.when != "batch":
                raise ValueError("feedback gives a loss to the next batch, so it needs when=batch")

    def __init__(self, options: object = None):
        super().__init__(options)
        self.feeds_back = self.remembers = self.options.feedback
        self._restrained: dict[str, int] = {}

    def stabilize_update(self, session: Session, site: Site, update: Update, problem: Problem | None) -> Update:
        if self.options.when != "batch":
            return update
        weight = session.weight(site).double()
        target = weight + update.dense().double()
        pruned = self._pruned(session, site, target)
        return update if pruned is target else Dense(pruned - weight)

    def stabilize_weight(self, session: Session, site: Site, weight: Tensor) -> Tensor:
        return self._pruned(session, site, weight) if self.options.when == "end" else weight

    def _pruned(self, session: Session, site: Site, weight: Tensor) -> Tensor:
        """Return ``weight`` with its change restrained; the same tensor where nothing exceeds the limit."""
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
