"""AlphaEdit: editing in the null space of what must be kept (Fang et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from editcli.plugin import (
    EditRequest,
    InverseGramEditor,
    OptionError,
    Problem,
    SavedState,
    Session,
    Site,
    State,
    option,
)

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_JUMP = 0.5
"""Most that one batch may change R_n through a small null space; a larger change has destroyed the layer."""


@dataclass(frozen=True)
class _Ranks:
    """What a snapshot holds beside Q."""

    ranks: dict[str, int]


class AlphaEdit(InverseGramEditor):
    """Write only along directions that keys of reference text hardly use.

    With P the projector on the eigenvectors of C whose eigenvalue is small, and H the sum of k k^T over earlier
    edits, the paper's update is the transpose of ::

        (P (K K^T + H) + L2 I)^-1 P K R^T,    equal to D = R (I + K^T Q K)^-1 K^T Q with Q = P / L2 at the start

    and Q down-dated by each batch's keys, which are extracted again once all sites are written, as in the paper's code.

    The published threshold, 0.02, is an absolute eigenvalue, chosen on keys of three models' scales. On real keys it
    leaves two thirds to three quarters of the directions. ``threshold_kind = "directions"`` asks for such a share
    itself. A share of the trace is no substitute: a few directions of massive activations hold most of the trace, so
    the same share of it may leave 7 % of the directions or all but one.
    """

    name: ClassVar[str] = "alphaedit"
    reference: ClassVar[str] = "arXiv:2410.02355"
    tempered_by: ClassVar[str] = "lower alphaedit.nullspace_threshold or raise alphaedit.l2"

    @dataclass(frozen=True)
    class Options:
        """The threshold of unused directions, and the weight of keeping the update small."""

        l2: float = option(10.0, "weight L2 of keeping the update small, against ||P k||^2 of an edit's key")
        l2_kind: Literal["absolute", "relative"] = option(
            "absolute", "relative: in units of the mean ||P k||^2 on reference text, which no model's scale changes"
        )
        nullspace_threshold: float = option(2e-2, "what counts as unused; its meaning is threshold_kind")
        threshold_kind: Literal["absolute", "relative", "median", "directions"] = option(
            "absolute",
            "absolute: eigenvalues of C below it; median: below this many times the median eigenvalue; "
            "directions: this share of the directions, the least used; relative: the smallest that hold this "
            "share of the trace",
        )

        def __post_init__(self) -> None:
            if not (self.l2 > 0 and self.nullspace_threshold > 0):
                raise ValueError("l2 and nullspace_threshold must be greater than 0")
            if self.threshold_kind == "directions" and self.nullspace_threshold >= 1:
                raise ValueError("nullspace_threshold must be below 1 where it is a share of the directions")

    def __init__(self, options: object = None):
        super().__init__(options)
        self.ranks: dict[str, int] = {}
        """rank(P) of each site by module name."""

    def initial_inverse(self, session: Session, site: Site) -> Tensor:
        values, vectors = session.decomposition(site)
        unused = self._unused(values)
        null = vectors[:, unused]
        self.ranks[site.module] = rank = null.shape[1]
        self._check_rank(rank, values, site)
        share = f"{rank} of {len(values)} directions ({rank / len(values):.1%})"
        session.reporter.note(f"{site.module}: edits may use {share}")
        # The mean of ||P k||^2 on reference text is trace(P C), the sum of the eigenvalues that P keeps.
        unit = float(values[unused].sum()) if self.options.l2_kind == "relative" else 1.0
        return null @ null.T / (self.options.l2 * max(unit, 1e-30))

    def largest_jump(self, site: Site) -> float | None:
        """Return LARGEST_JUMP where edits may use less than half of the directions.

        The parts of the keys that such a null space leaves are small, and an update that writes through them is large.
        """
        return LARGEST_JUMP if 2 * self.ranks[site.module] < self.memory[site.module].matrix.shape[0] else None

    def remember(self, session: Session, requests: Sequence[EditRequest], problems: Sequence[Problem]) -> None:
        for problem in problems:
            self.advance(problem.site, session.keys(requests, problem.site))

    def state(self) -> State:
        """Return Q as ``<module>.inverse_gram``, and rank(P) by module as ``ranks``."""
        return State(super().state().tensors, {"ranks": self.ranks})

    def load_state(self, session: Session, state: State) -> None:
        super().load_state(session, state)
        saved = SavedState(self.name, state)
        if "ranks" in state.json:
            ranks = saved.fields(_Ranks).ranks
        else:
            # Earlier versions saved each rank as a tensor.
            ranks = {site.module: saved.count(f"{site.module}.rank") for site in session.sites}
        for site in session.sites:
            rank, size = ranks.get(site.module), session.weight(site).shape[1]
            if rank is None or not 0 < rank < size:
                raise saved.refusal(f"the rank of {site.module} is {rank}, not between 0 and {size}")
        self.ranks = {site.module: ranks[site.module] for site in session.sites}

    def record(self) -> dict[str, Any]:
        """Return rank(P) and rank(P) / d_in per site."""
        size = {module: gram.matrix.shape[0] for module, gram in self.memory.items()}
        return {"nullspace": {m: {"rank": rank, "share": rank / size[m]} for m, rank in self.ranks.items()}}

    def _unused(self, values: Tensor) -> Tensor:
        """Say which of the ascending eigenvalues of C count as unused."""
        threshold, kind = self.options.nullspace_threshold, self.options.threshold_kind
        if kind == "absolute":
            return values < threshold
        if kind == "median":
            return values < threshold * values.median()
        if kind == "directions":
            import torch

            return torch.arange(len(values), device=values.device) < round(threshold * len(values))
        return values.clamp_min(0).cumsum(0) <= threshold * values.clamp_min(0).sum()

    def _check_rank(self, rank: int, values: Tensor, site: Site) -> None:
        if 0 < rank < len(values):
            return
        what = "no direction" if rank == 0 else "every direction"
        change = "raise" if rank == 0 else "lower"
        raise OptionError(
            f"alphaedit.nullspace_threshold={self.options.nullspace_threshold:g} leaves {what} of {site.module} to "
            f"edits (eigenvalues {float(values[0]):.3g} to {float(values[-1]):.3g}); {change} it or set "
            "alphaedit.threshold_kind=directions"
        )
