"""How far each edited weight moves along the base's leading singular directions, after every batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from editcli.plugin import Diagnostic, Session, Site, Update, option

if TYPE_CHECKING:
    from torch import Tensor

    from editcli.plugin import Directions


class RelativeChange(Diagnostic):
    """Watch |u_i^T (W_n - W_0) v_i| / sigma_i, the mean over the base's leading singular directions.

    That is sqrt(n) |c_i| / sigma_i where each of n edits adds a step c_i of random sign along direction i. A share of 1
    says that edits have written as much along these directions as the base had there. R_n sees a change only where it
    does not cancel against the rest of the weight; drift sees every direction alike.
    """

    name: ClassVar[str] = "directions"
    reference: ClassVar[str] = "arXiv:2606.00570"

    @dataclass(frozen=True)
    class Options:
        """How many directions to watch."""

        count: int = option(16, "leading singular directions of the base to watch; 0 watches none")

        def __post_init__(self) -> None:
            if self.count < 0:
                raise ValueError("count must be at least 0")

    def __init__(self, options: Any = None):
        super().__init__(options)
        self._bases: dict[Site, tuple[Directions, Tensor]] = {}

    def observe(self, session: Session, updates: Mapping[Site, Update]) -> dict[str, float]:
        if not self.options.count:
            return {}
        changes = {site: self._change(session, site) for site in session.sites}
        return {f"relative_change/layer {site.layer}": value for site, value in changes.items() if value is not None}

    def _change(self, session: Session, site: Site) -> float | None:
        from editcli.plugin import along, leading_directions, relative_change  # They import torch.

        if site not in self._bases:
            base = session.baseline(site)
            directions = leading_directions(base, count=self.options.count, device=session.device)
            self._bases[site] = directions, along(directions, base)
        directions, before = self._bases[site]
        return relative_change(directions, before, along(directions, session.weight(site)))
