"""The base of the editors that share one solve: a subclass says only what C is at the start.

See :mod:`editcli.plugin.leastsquares` for the formulas. This module never imports torch at import time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from editcli.errors import StateError
from editcli.plugin.interfaces import Editor, Problem, Session, Site, Update
from editcli.requests.schema import EditRequest

if TYPE_CHECKING:
    from torch import Tensor

    from editcli.plugin.leastsquares import InverseGram


class InverseGramEditor(Editor):
    """An editor whose update is D = R (I + K^T C K)^-1 K^T C, with one C per site.

    Implement :meth:`prior`, C at the start. Set :attr:`remembers` to have later updates keep what earlier ones wrote.
    """

    def __init__(self, options: object = None):
        super().__init__(options)
        self.memory: dict[str, InverseGram] = {}
        """C of each site by module name."""

    @abstractmethod
    def prior(self, session: Session, site: Site) -> InverseGram:
        """Return C of ``site`` on the unedited model."""

    @property
    def remembers(self) -> bool:
        """Whether C is down-dated by the keys of every batch; only then is it part of the run's state."""
        return True

    def prepare(self, session: Session) -> None:
        sites = session.sites[-1:] if self.single_site else session.sites
        with session.reporter.phase(f"preparing {self.name}", len(sites), "sites") as advance:
            for site in sites:
                self.memory[site.module] = self.prior(session, site)
                advance(1)

    def solve(self, problem: Problem) -> Update:
        return self.memory[problem.site.module].solve(problem.keys, problem.residual)

    def remember(self, session: Session, requests: Sequence[EditRequest], problems: Sequence[Problem]) -> None:
        if self.remembers:
            for problem in problems:
                self.advance(problem.site, problem.keys)

    def advance(self, site: Site, keys: Tensor) -> None:
        """Down-date the C of ``site`` by ``keys`` (d_in, n)."""
        self.memory[site.module] = self.memory[site.module].downdated(keys)

    def state_dict(self) -> dict[str, Tensor]:
        """Return C of each site as ``<module>.inverse_gram``, nothing for an editor that does not remember."""
        if not self.remembers:
            return {}
        return {f"{module}.inverse_gram": gram.matrix for module, gram in self.memory.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], session: Session) -> None:
        """Take C back bit by bit; an editor that does not remember is prepared again from the statistics."""
        from editcli.plugin.leastsquares import InverseGram

        if not self.remembers:
            self.prepare(session)
            return
        for site in session.sites:
            matrix = state.get(f"{site.module}.inverse_gram")
            if matrix is None:
                raise StateError(f"the saved state of {self.name} has nothing for {site.module}; start a new run")
            self.memory[site.module] = InverseGram(matrix.to(session.device), site.module, session.reporter)
