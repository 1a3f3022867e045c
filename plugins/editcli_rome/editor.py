"""ROME: rank-one model editing (Meng et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from editcli.plugin.editors import InverseGramEditor
from editcli.plugin.interfaces import Problem, Session, Site, Update
from editcli.plugin.options import option

if TYPE_CHECKING:
    from editcli.plugin.leastsquares import InverseGram


class Rome(InverseGramEditor):
    """Write facts into one layer exactly, disturbing what the layer does on reference text as little as possible.

    Among all updates that write the batch, D K = R, the one with the least E||D k||^2 on reference text is ::

        D = R (K^T C K)^-1 K^T C,    C = Cov^-1        for one edit: R (C k)^T / (k^T C k)

    One edit is the paper's rank-one formula; several edits of a batch are written together, each exactly.
    """

    name: ClassVar[str] = "rome"
    reference: ClassVar[str] = "arXiv:2202.05262"
    tempered_by: ClassVar[str] = "lower targets.clamp or raise rome.ridge"
    single_site: ClassVar[bool] = True
    suggests: ClassVar[Mapping[str, Mapping[str, Any]]] = {"nas": {"guard": 5.0}}

    @dataclass(frozen=True)
    class Options:
        """What to do about too little reference text."""

        ridge: float = option(0.0, "share of each input's second moment to add, for a moment that is singular")

        def __post_init__(self) -> None:
            if self.ridge < 0:
                raise ValueError("ridge must not be negative")

    @property
    def remembers(self) -> bool:
        return False

    def prior(self, session: Session, site: Site) -> InverseGram:
        from editcli.plugin.leastsquares import InverseGram

        gram = session.second_moment(site)
        return InverseGram.inverting(
            gram, site=site.module, device=session.device, reporter=session.reporter, ridge=self.options.ridge
        )

    def solve(self, problem: Problem) -> Update:
        return self.memory[problem.site.module].solve(problem.keys, problem.residual, hard=True)
