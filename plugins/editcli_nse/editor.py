"""NSE: sequential editing with target values of the unedited weights (Jiang et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from editcli.plugin import EditRequest, InverseGramEditor, LowRank, Problem, Session, Site, Values, option

if TYPE_CHECKING:
    from torch import Tensor


class Nse(InverseGramEditor):
    """Optimise targets on the unedited weights W_0, and write every batch in passes until its targets are met.

    The targets z of a batch are those of W_0, whatever the stream has written ("weights rewinding"). One pass asks
    each site in turn for what is still missing, of the edits that are unmet, met < ||z - h|| < lost; the others stay in
    the batch with R = 0, so that they are held where they are ::

        D = R K^T (w C + H + K K^T)^-1,    H the sum of K K^T over past batches

    K as it is once the batch is written joins H. The D of all passes are one update: it solves the problem that has the
    columns of all passes, R_m + sum_{j != m} D_j K_m at K_m, and stabilizers act on it as a whole.

    The released code also keeps, on GPT-2 XL and GPT-J, only the inputs that hold 0.8 of the sum of |K|. On Llama 3 it
    keeps all, as is done here.
    """

    name: ClassVar[str] = "nse"
    reference: ClassVar[str] = "arXiv:2410.04045"
    tempered_by: ClassVar[str] = "raise nse.mom2_update_weight"
    on_base: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Options:
        """How strongly the old is kept against the new, and which edits a pass writes."""

        mom2_update_weight: float = option(15000.0, "weight w of the reference text against the edits")
        ridge: float = option(0.0, "share of each input's second moment to add, for a moment that is singular")
        passes: int = option(2, "most passes over the edits of a batch that are unmet")
        met: float = option(2.5, "distance ||z - h|| up to which an edit is met")
        lost: float = option(50.0, "distance from which an edit is given up")
        bounds_kind: Literal["absolute", "relative"] = option(
            "absolute", "relative: met and lost are shares of the distance before the first pass"
        )

        def __post_init__(self) -> None:
            if not (self.mom2_update_weight > 0 and self.ridge >= 0 and self.passes >= 1):
                raise ValueError("mom2_update_weight and passes must be greater than 0 and ridge must not be negative")
            if not 0 <= self.met < self.lost:
                raise ValueError("met must not be negative and must be less than lost")
            if self.bounds_kind == "relative" and not self.met < 1 < self.lost:
                raise ValueError("with bounds_kind=relative, met must be below 1 and lost above 1")

    def __init__(self, options: object = None):
        super().__init__(options)
        self._asked: Mapping[Site, Problem] = {}

    def initial_inverse(self, session: Session, site: Site) -> Tensor:
        gram = self.options.mom2_update_weight * session.second_moment(site)
        return self.invert(session, site, gram, ridge=self.options.ridge)

    def values(self, session: Session, requests: Sequence[EditRequest]) -> Values:
        with session.under({}, unedited=True):
            return session.values(requests)

    def problem(self, session: Session, requests: Sequence[EditRequest], site: Site, values: Values) -> Problem:
        if site == session.sites[0]:
            self._asked = self._passes(session, requests, values)
        return self._asked[site]

    def completed(self, session: Session, requests: Sequence[EditRequest], problem: Problem) -> Problem:
        keys = session.keys(requests, problem.site).to(problem.keys)
        same = keys.shape == problem.keys.shape and bool((keys == problem.keys).all())
        return problem if same else replace(problem, held=keys)

    def _passes(self, session: Session, requests: Sequence[EditRequest], values: Values) -> Mapping[Site, Problem]:
        """Return the problem of each site: what all passes ask, each on the model as the one before left it."""
        passes: dict[Site, list[tuple[Problem, LowRank]]] = {site: [] for site in session.sites}
        first = self._distance(session, requests, values)
        self._tell_lost(session, requests, first)
        with ExitStack() as written:
            for number in range(self.options.passes):
                unmet = self._unmet(first, self._distance(session, requests, values) if number else first, values)
                if number and not bool(unmet.any()):
                    break
                for site in session.sites:
                    problem = super().problem(session, requests, site, values)
                    problem = replace(problem, residual=problem.residual * unmet.to(problem.residual))
                    update = self.memory[site.module].solve(problem.keys, problem.residual)
                    passes[site].append((problem, update))
                    written.enter_context(session.under({site: update.added_to(session.weight(site))}))
        return {site: _joined(site, pairs) for site, pairs in passes.items()}

    def _distance(self, session: Session, requests: Sequence[EditRequest], values: Values) -> Tensor:
        """Return ||z - h|| of each edit, (n,), as the change of the last site's output that would reach z."""
        return session.residual(requests, session.sites[-1], values).norm(dim=0)

    def _tell_lost(self, session: Session, requests: Sequence[EditRequest], distance: Tensor) -> None:
        """Warn of edits that no pass writes, since their targets are too far away from where the stream is."""
        if self.options.bounds_kind == "relative":
            return
        lost = [r.id for r, far in zip(requests, (distance >= self.options.lost).tolist(), strict=True) if far]
        if lost:
            session.reporter.warn(f"{len(lost)} edits are further than nse.lost from their targets, {lost[0]!r} first")

    def _unmet(self, first: Tensor, distance: Tensor, values: Values) -> Tensor:
        """Return which edits a pass writes, (n,) bool."""
        unit = first if self.options.bounds_kind == "relative" else 1.0
        unmet = (distance > self.options.met * unit) & (distance < self.options.lost * unit)
        # z is h of the unedited weights there, which is not where the stream is.
        unmet[list(values.dropped)] = False
        return unmet


def _joined(site: Site, passes: Sequence[tuple[Problem, LowRank]]) -> Problem:
    """Return the problem that the sum of all passes solves."""
    import torch

    (problem, _), *more = passes
    if not more:
        return problem
    total = sum(update.dense() for _, update in passes)
    asked = [p.residual + (total - update.dense()).to(p.residual) @ p.keys for p, update in passes]
    return Problem(site, torch.cat([p.keys for p, _ in passes], dim=1), torch.cat(asked, dim=1))
