"""ROME: rank-one model editing (Meng et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from editcli.plugin import InverseGramEditor, Problem, Session, Site, Update, option

if TYPE_CHECKING:
    from torch import Tensor


class Rome(InverseGramEditor):
    """Write facts into one layer exactly, disturbing what the layer does on reference text as little as possible.

    Among all updates that write the batch, D K = R, the one with the least E||D k||^2 on reference text is ::

        D = R (K^T Q K)^-1 K^T Q,    Q = C^-1        for one edit: R (C^-1 k)^T / (k^T C^-1 k)

    One edit is the paper's rank-one formula; several edits of a batch are written together, each exactly.

    The same k stands in numerator and denominator, as R-ROME (arXiv:2403.07175) asks for: ROME's released code takes
    the mean key over the prefixes for one and the bare prompt's for the other, and single edits then wreck the model.
    Only the residual is measured on the bare prompt, as for every editor here; R-ROME's is v - W k at the mean key.
    """

    name: ClassVar[str] = "rome"
    reference: ClassVar[str] = "arXiv:2202.05262"
    tempered_by: ClassVar[str] = "lower targets.clamp or raise rome.ridge"
    single_site: ClassVar[bool] = True
    remembers: bool = False
    suggests: ClassVar[Mapping[str, Mapping[str, Any]]] = {"nas": {"guard": 5.0}}

    @dataclass(frozen=True)
    class Options:
        """A remedy for too little reference text."""

        ridge: float = option(0.0, "share of each input's second moment to add, for a moment that is singular")

        def __post_init__(self) -> None:
            if self.ridge < 0:
                raise ValueError("ridge must not be negative")

    def initial_inverse(self, session: Session, site: Site) -> Tensor:
        return self.invert(session, site, session.second_moment(site), ridge=self.options.ridge)

    def solve(self, session: Session, problem: Problem) -> Update:
        return self.memory[problem.site.module].solve(problem.keys, problem.residual, exact=True)
