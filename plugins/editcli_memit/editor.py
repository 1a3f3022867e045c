"""MEMIT: mass-editing memory in a transformer (Meng et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from editcli.plugin import InverseGramEditor, Session, Site, option

if TYPE_CHECKING:
    from torch import Tensor


class Memit(InverseGramEditor):
    """Write a batch of facts into several layers, each by one least-squares update.

    With the residual R, the keys K and the second moment C of keys on reference text, the paper's update is ::

        D = R K^T (w C + K K^T)^-1  =  R (I + K^T Q K)^-1 K^T Q,    Q = (w C)^-1

    The weight w of the reference text (``mom2_update_weight``, the paper's lambda) holds what the layer does already
    against the new facts. With ``remember`` the keys of past batches join K K^T, so that later batches leave earlier
    facts in place ("MEMIT_seq" elsewhere).
    """

    name: ClassVar[str] = "memit"
    reference: ClassVar[str] = "arXiv:2210.07229"
    tempered_by: ClassVar[str] = "raise memit.mom2_update_weight"

    @dataclass(frozen=True)
    class Options:
        """How strongly the old is kept against the new."""

        mom2_update_weight: float = option(15000.0, "weight w of the reference text against the edits")
        remember: bool = option(False, "keep what earlier batches wrote: past keys join the penalty")
        ridge: float = option(0.0, "share of each input's second moment to add, for a moment that is singular")

        def __post_init__(self) -> None:
            if not (self.mom2_update_weight > 0 and self.ridge >= 0):
                raise ValueError("mom2_update_weight must be greater than 0 and ridge must not be negative")

    def __init__(self, options: object = None):
        super().__init__(options)
        self.remembers = self.options.remember

    def initial_inverse(self, session: Session, site: Site) -> Tensor:
        gram = self.options.mom2_update_weight * session.second_moment(site)
        return self.invert(session, site, gram, ridge=self.options.ridge)
