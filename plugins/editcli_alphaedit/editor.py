"""AlphaEdit: editing in the null space of what must be kept (Fang et al., 2025), with BetaEdit's two additions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from editcli.plugin import (
    EditRequest,
    InverseGramEditor,
    NullSpaceOptions,
    Problem,
    SavedState,
    Session,
    Site,
    State,
    null_space,
    option,
    unused,
)

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_JUMP = 0.5
"""Most that one batch may change R_n through a small null space; a larger change has destroyed the layer."""


@dataclass(frozen=True)
class _Fields:
    """What a snapshot holds beside tensors; the last two with ``refresh`` alone."""

    ranks: dict[str, int] = field(default_factory=dict)
    edits: int = 0
    l2: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.edits < 0 or not all(0 < value < math.inf for value in self.l2.values()):
            raise ValueError("edits must not be negative, and l2 must be greater than 0")


class AlphaEdit(InverseGramEditor):
    """Write only along directions that keys of reference text hardly use.

    With P the projector on the eigenvectors of C whose eigenvalue is small, and H the sum of k k^T over earlier
    edits, the paper's update is the transpose of ::

        (P (K K^T + H) + L2 I)^-1 P K R^T,    equal to D = R (I + K^T Q K)^-1 K^T Q with Q = P / L2 at the start

    and Q down-dated by each batch's keys, which are extracted again once all sites are written, as in the paper's code.

    BetaEdit (arXiv:2605.09285) adds to H what leaks of the reference text through P, and finds P again as edits gather.
    With ``leak`` l1, e the small eigenvalues and U their eigenvectors, and with ``refresh`` every so many edits ::

        Q = U diag(1 / (L2 + l1 e)) U^T at the start
        P on the small eigenvalues of (H / n + l1 C) / (1 + l1),    Q = P (P (H + l1 C) P + L2 I)^-1 P

    The published threshold, 0.02, is an absolute eigenvalue, chosen on keys of three models' scales. On real keys it
    leaves two thirds to three quarters of the directions. ``threshold_kind = "directions"`` asks for such a share
    itself. A share of the trace is no substitute: a few directions of massive activations hold most of the trace, so
    the same share of it may leave 7 % of the directions or all but one.
    """

    name: ClassVar[str] = "alphaedit"
    reference: ClassVar[str] = "arXiv:2410.02355"
    tempered_by: ClassVar[str] = "lower alphaedit.nullspace_threshold or raise alphaedit.l2"

    @dataclass(frozen=True)
    class Options(NullSpaceOptions):
        """The unused directions, the weight of a small update, and BetaEdit's additions."""

        leak: float = option(0.0, "weight l1 of the reference text inside the null space (BetaEdit: 3000)")
        leak_kind: Literal["absolute", "relative"] = option(
            "absolute", "relative: as a share of d_in, about which ||k||^2 is in units of C (BetaEdit: 0.2)"
        )
        refresh: int = option(0, "edits after which the null space is found again (BetaEdit: 1000); 0: never")

        def __post_init__(self) -> None:
            super().__post_init__()
            if min(self.leak, self.refresh) < 0:
                raise ValueError("leak and refresh must not be negative")
            if self.refresh and not self.leak:
                raise ValueError("refresh weighs the edits' keys against the reference text; set leak above 0 too")

    def __init__(self, options: object = None):
        super().__init__(options)
        self.ranks: dict[str, int] = {}
        """rank(P) of each site by module name."""
        self.edits = 0
        """Edits whose keys are in :attr:`past`; counted for ``refresh`` alone, as everything below."""
        self.past: dict[str, Tensor] = {}
        """H of each site by module name."""
        self._moments: dict[str, Tensor] = {}
        self._l2: dict[str, float] = {}

    def initial_inverse(self, session: Session, site: Site) -> Tensor:
        null = null_space(session, site, self.options, owner=self.name)
        size = len(null.vectors)
        self.ranks[site.module], self._l2[site.module] = len(null.values), null.l2
        if self.options.refresh:
            self._moments[site.module] = session.second_moment(site)
            self.past[site.module] = null.vectors.new_zeros(size, size)
        root = null.vectors / (null.l2 + self._leak(size) * null.values).sqrt()
        return root @ root.T

    def largest_jump(self, site: Site) -> float | None:
        """Return LARGEST_JUMP where edits may use less than half of the directions.

        The parts of the keys that such a null space leaves are small, and an update that writes through them is large.
        """
        return LARGEST_JUMP if 2 * self.ranks[site.module] < self.memory[site.module].matrix.shape[0] else None

    def completed(self, session: Session, requests: Sequence[EditRequest], problem: Problem) -> Problem:
        keys = session.keys(requests, problem.site).to(problem.keys)
        # No layer above a site changes what it reads, so they differ only where a subject came to an attention sink.
        return problem if bool((keys == problem.keys).all()) else replace(problem, held=keys)

    def remember(self, session: Session, requests: Sequence[EditRequest], problems: Sequence[Problem]) -> None:
        # A record has only keys that differ, and the model still has the weights that all were read from.
        problems = [p if p.held is not None else self.completed(session, requests, p) for p in problems]
        super().remember(session, requests, problems)
        every = self.options.refresh
        due = bool(every) and (self.edits + len(requests)) // every > self.edits // every
        self.edits += len(requests) if every else 0
        for problem in problems if every else ():
            site, past = problem.site, self.past[problem.site.module]
            keys = problem.remembered.to(past)
            past = past + keys @ keys.T
            if problem.released is not None:
                gone = problem.released.to(past)
                past = past - gone @ gone.T
            self.past[site.module] = past
            if due:
                self._refresh(session, site)

    def state(self) -> State:
        """Return Q as ``<module>.inverse_gram``, and rank(P) by module as ``ranks``.

        With ``refresh`` also H as ``<module>.past``, the number of ``edits`` in it, and L2 by module as ``l2``.
        """
        past = {f"{module}.past": matrix for module, matrix in self.past.items()}
        counted = {"edits": self.edits, "l2": self._l2} if self.options.refresh else {}
        return State({**super().state().tensors, **past}, {"ranks": self.ranks, **counted})

    def load_state(self, session: Session, state: State) -> None:
        super().load_state(session, state)
        saved = SavedState(self.name, state)
        if "ranks" in state.json:
            ranks = saved.fields(_Fields).ranks
        else:
            # Earlier versions saved each rank as a tensor.
            ranks = {site.module: saved.count(f"{site.module}.rank") for site in session.sites}
        for site in session.sites:
            rank, size = ranks.get(site.module), session.weight(site).shape[1]
            if rank is None or not 0 < rank < size:
                raise saved.refusal(f"the rank of {site.module} is {rank}, not between 0 and {size}")
        self.ranks = {site.module: ranks[site.module] for site in session.sites}
        if not self.options.refresh:
            return
        fields = saved.fields(_Fields)
        for site in session.sites:
            size = session.weight(site).shape[1]
            self.past[site.module] = saved.tensor(f"{site.module}.past", (size, size))
            self._moments[site.module] = session.second_moment(site)
            if site.module not in fields.l2:
                raise saved.refusal(f"l2 has no {site.module}")
        self.edits, self._l2 = fields.edits, dict(fields.l2)

    def record(self) -> dict[str, Any]:
        """Return rank(P) and rank(P) / d_in per site."""
        size = {module: gram.matrix.shape[0] for module, gram in self.memory.items()}
        return {"nullspace": {m: {"rank": rank, "share": rank / size[m]} for m, rank in self.ranks.items()}}

    def _leak(self, size: int) -> float:
        """Return l1 for keys of ``size`` dimensions."""
        return self.options.leak * (size if self.options.leak_kind == "relative" else 1)

    def _refresh(self, session: Session, site: Site) -> None:
        """Find P again, on what reference text and edits leave unused together, and Q from H inside of it."""
        from editcli.plugin import InverseGram, double, eigh

        moment = self._moments[site.module]
        past, leak = double(self.past[site.module], moment.device).to(moment), self._leak(len(moment))
        values, vectors = eigh((past / self.edits + leak * moment) / (1 + leak), site=site.module)
        null = vectors[:, unused(values, self.options)]
        if not null.shape[1]:
            # The batch is written already, so what is there stays in force.
            session.reporter.warn(f"{site.module}: no direction is left unused; the null space stays as it was")
            return
        kept = null.T @ (past + leak * moment) @ null
        kept.diagonal().add_(self._l2[site.module])
        matrix = null @ self.invert(session, site, kept).to(null) @ null.T
        self.memory[site.module] = InverseGram.of(
            (matrix + matrix.T) / 2, site=site.module, device=session.device, reporter=session.reporter
        )
        self.ranks[site.module] = null.shape[1]
