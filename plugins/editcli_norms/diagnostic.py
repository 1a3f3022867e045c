"""Norms of a batch's updates, from their factors where they have some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from editcli.plugin import Diagnostic, LowRank, Session, Site, Update, option, ratio

if TYPE_CHECKING:
    from torch import Tensor


class Norms(Diagnostic):
    """Watch what each batch adds: its norm against the base's weight, and in how many directions it points.

    With D = left right^T the singular values of D are those of an (n, n) matrix, so W is not touched. An effective
    rank near 1 says that all edits of the batch push the same way, which is how a stream begins to collapse. R_n and
    drift themselves are in every journal line.
    """

    name: ClassVar[str] = "norms"
    reference: ClassVar[str] = "Roy and Vetterli (2007), effective rank"

    @dataclass(frozen=True)
    class Options:
        """When to skip the expensive figures."""

        most: int = option(512, "skip the effective rank of updates whose factors have more columns than this")

    def __init__(self, options: Any = None):
        super().__init__(options)
        self._bases: dict[Site, float] = {}

    def observe(self, session: Session, updates: Mapping[Site, Update]) -> dict[str, float]:
        figures: dict[str, float] = {}
        for site, update in updates.items():
            # The base's weight may have to be read from its file, which is too slow for every batch.
            if site not in self._bases:
                self._bases[site] = float(session.baseline(site).norm())
            share = ratio(update.norm(), self._bases[site])
            if share is not None:
                figures[f"update_norm_share/layer {site.layer}"] = share
            if _columns(update) <= self.options.most:
                figures[f"update_rank/layer {site.layer}"] = effective_rank(update)
        return figures


def effective_rank(update: Update) -> float:
    """Return exp(entropy of sigma / sum sigma) of an update's singular values sigma; 0 for an update of zeros."""
    values = _singular_values(update)
    total = float(values.sum())
    if total <= 0:
        return 0.0
    shares = values[values > 0] / total
    return float((-(shares * shares.log()).sum()).exp())


def _columns(update: Update) -> int:
    """Return the size of the matrix whose singular values are those of the update."""
    return update.left.shape[1] if isinstance(update, LowRank) else min(update.dense().shape)


def _singular_values(update: Update) -> Tensor:
    import torch  # The update decides the device; only the decompositions need the module.

    if not isinstance(update, LowRank):
        return torch.linalg.svdvals(update.dense().double())
    left = torch.linalg.qr(update.left, mode="r").R
    right = torch.linalg.qr(update.right, mode="r").R
    return torch.linalg.svdvals((left @ right.T).double())
