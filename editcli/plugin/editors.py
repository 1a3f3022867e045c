"""The base of the editors that share one solve: a subclass states Q at the start, and nothing else.

See :mod:`editcli.plugin.leastsquares` for the formulas. This module never imports torch at import time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from editcli.plugin.interfaces import Editor, Problem, Session, Site, State, Update
from editcli.plugin.saved import SavedState
from editcli.requests.schema import EditRequest

if TYPE_CHECKING:
    from torch import Tensor

    from editcli.plugin.leastsquares import InverseGram


class InverseGramEditor(Editor):
    """An editor whose update is D = R (I + K^T Q K)^-1 K^T Q, with one symmetric Q (d_in, d_in) per site.

    Implement :meth:`initial_inverse`, Q at the start. While :attr:`remembers` is true, every batch's keys down-date Q,
    so that later updates leave earlier ones in place; set it to False for an editor that starts afresh each batch.
    """

    remembers: bool = True

    def __init__(self, options: object = None):
        super().__init__(options)
        self.memory: dict[str, InverseGram] = {}
        """Q of each site by module name."""

    @abstractmethod
    def initial_inverse(self, session: Session, site: Site) -> Tensor:
        """Return Q of ``site`` on the unedited model, (d_in, d_in) float64; it is not changed in place."""

    def invert(self, session: Session, site: Site, gram: Tensor, *, ridge: float = 0.0) -> Tensor:
        """Return ``gram``^-1 for a symmetric positive definite (d_in, d_in) matrix, in float64.

        ``ridge`` adds this share of its own second moment to each input. Raises :class:`NumericalError` when ``gram``
        is singular or indefinite.
        """
        from editcli.plugin.leastsquares import double, invert

        return invert(double(gram, session.device), site=site.module, reporter=session.reporter, ridge=ridge)

    def prepare(self, session: Session) -> None:
        from editcli.plugin.leastsquares import InverseGram

        sites = session.sites[-1:] if self.single_site else session.sites
        with session.reporter.phase(f"preparing {self.name}", len(sites), "sites") as advance:
            for site in sites:
                matrix = self.initial_inverse(session, site)
                self.memory[site.module] = InverseGram.of(
                    matrix, site=site.module, device=session.device, reporter=session.reporter
                )
                advance(1)

    @property
    def releases(self) -> bool:
        return self.remembers

    def releasable(self, session: Session, site: Site, keys: Tensor) -> Sequence[int]:
        return self.memory[site.module].releasable(keys)

    def solve(self, session: Session, problem: Problem) -> Update:
        memory = self.memory[problem.site.module]
        if problem.released is not None:
            memory = memory.released(problem.released)
        return memory.solve(problem.keys, problem.residual)

    def remember(self, session: Session, requests: Sequence[EditRequest], problems: Sequence[Problem]) -> None:
        if self.remembers:
            for problem in problems:
                self.advance(problem.site, problem.remembered, released=problem.released)

    def advance(self, site: Site, keys: Tensor, *, released: Tensor | None = None) -> None:
        """Down-date the Q of ``site`` by ``keys`` (d_in, n), after it let go of ``released`` (d_in, m)."""
        memory = self.memory[site.module]
        memory = memory if released is None else memory.released(released)
        self.memory[site.module] = memory.downdated(keys)

    def state(self) -> State:
        """Return Q of each site as ``<module>.inverse_gram``, nothing for an editor that does not remember."""
        if not self.remembers:
            return State()
        return State({f"{module}.inverse_gram": gram.matrix for module, gram in self.memory.items()})

    def load_state(self, session: Session, state: State) -> None:
        """Take Q back bit by bit; an editor that does not remember is prepared again from the statistics.

        Raises :class:`StateError` where a Q is missing or is not (d_in, d_in) finite numbers.
        """
        from editcli.plugin.leastsquares import InverseGram

        if not self.remembers:
            self.prepare(session)
            return
        saved = SavedState(self.name, state)
        for site in session.sites:
            size = session.weight(site).shape[1]
            matrix = saved.tensor(f"{site.module}.inverse_gram", (size, size))
            self.memory[site.module] = InverseGram(matrix.to(session.device), site.module, session.reporter)
