"""MoEEdit: editing the routed experts of a mixture in the null space of each (arXiv:2602.10965, ICLR 2026)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from editcli.plugin import (
    Editor,
    EditRequest,
    NullSpaceOptions,
    OptionError,
    Problem,
    SavedState,
    Session,
    Site,
    State,
    Update,
    option,
    unused,
)

if TYPE_CHECKING:
    from torch import Tensor

    from editcli_moeedit.mixture import Mixture


@dataclass(frozen=True)
class _Fields:
    """What a snapshot holds beside tensors."""

    ranks: dict[str, list[int]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(number < 0 for lists in (self.ranks, self.tokens) for numbers in lists.values() for number in numbers):
            raise ValueError("ranks and tokens must not be negative")


class MoEEdit(Editor):
    """Write into the experts that read the subject's last token, along directions that each hardly uses.

    With P_j the projector on the eigenvectors of expert j's second moment whose eigenvalue is small, v_tj = P_j k_tj
    and g_tj the gate, the paper minimises over all X_j ::

        sum_t || r_t - sum_j g_tj X_j v_tj ||^2 + l sum_j || X_j ||^2,    W_j <- W_j + X_j P_j

    by block coordinate descent. Here it is solved exactly (``solver = exact``): with C_j = P_j / l at the start,
    W_j changes by R (I + sum_i K_i^T C_i K_i)^-1 K_j^T C_j, K_j the keys times their gates. As in ``alphaedit``, C_j is
    then down-dated by the batch's keys, so that later batches keep what earlier ones wrote. The router is not touched.

    An expert that read less reference text than ``floor`` tokens a dimension is given the rest from the layer's mean
    moment.
    """

    name: ClassVar[str] = "moeedit"
    reference: ClassVar[str] = "arXiv:2602.10965"
    writes_experts: ClassVar[bool] = True
    tempered_by: ClassVar[str] = "lower moeedit.nullspace_threshold or raise moeedit.l2"

    @dataclass(frozen=True)
    class Options(NullSpaceOptions):
        """The unused directions of each expert, the weight of a small update, and how to solve."""

        l2: float = option(1.0, "weight l of keeping the update small, against ||g P k||^2 of an edit's key")
        floor: float = option(2.0, "tokens a dimension below which an expert is given the layer's mean moment")
        remember: bool = option(True, "keep what earlier batches wrote; false starts every batch afresh")
        solver: Literal["exact", "descent"] = option(
            "exact", "exact: the closed form over all experts; descent: block coordinate descent, as published"
        )
        passes: int = option(10, "passes of descent over the experts")

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.floor < 0 or self.passes < 1:
                raise ValueError("floor must not be negative, and passes must be at least 1")

    def __init__(self, options: object = None):
        super().__init__(options)
        self.memory: dict[str, Mixture] = {}
        """C_j of the experts of each site by module name."""
        self.ranks: dict[str, list[int]] = {}
        """rank(P_j) of the experts of each site."""
        self.tokens: dict[str, list[int]] = {}
        """How many tokens of the reference text each expert reads."""

    @property
    def remembers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether later batches keep what earlier ones wrote."""
        return self.options.remember

    def prepare(self, session: Session) -> None:
        from editcli_moeedit.mixture import Mixture

        with session.reporter.phase(f"preparing {self.name}", len(session.sites), "sites") as advance:
            for site in session.sites:
                matrices = self._initial(session, site)
                self.memory[site.module] = Mixture.of(matrices, site=site.module, device=session.device)
                advance(1)

    def solve(self, session: Session, problem: Problem) -> Update:
        memory = self.memory[problem.site.module]
        if self.options.solver == "exact":
            return memory.solve(problem.keys, problem.residual)
        # The order is random, as published, and the same for the same problem.
        chance, experts = random.Random(0), memory.active(problem.keys)
        orders = [chance.sample(experts, len(experts)) for _ in range(self.options.passes)]
        return memory.descend(problem.keys, problem.residual, orders)

    def remember(self, session: Session, requests: Sequence[EditRequest], problems: Sequence[Problem]) -> None:
        for problem in problems if self.remembers else ():
            module = problem.site.module
            self.memory[module] = self.memory[module].downdated(problem.remembered)

    def state(self) -> State:
        """Return C_j as ``<module>.experts``, (E, d, d), and the ranks and tokens of all experts by module."""
        if not self.remembers:
            return State()
        matrices = {f"{module}.experts": memory.matrices for module, memory in self.memory.items()}
        return State(matrices, {"ranks": self.ranks, "tokens": self.tokens})

    def load_state(self, session: Session, state: State) -> None:
        """Take C_j back bit by bit; an editor that does not remember is prepared again from the statistics."""
        from editcli_moeedit.mixture import Mixture

        if not self.remembers:
            self.prepare(session)
            return
        saved = SavedState(self.name, state)
        fields = saved.fields(_Fields)
        for site in session.sites:
            size = session.weight(site).shape[1] // site.experts
            for name, numbers in (("ranks", fields.ranks), ("tokens", fields.tokens)):
                if len(numbers.get(site.module, ())) != site.experts:
                    raise saved.refusal(f"{name} has not {site.experts} numbers for {site.module}")
            matrices = saved.tensor(f"{site.module}.experts", (site.experts, size, size))
            self.memory[site.module] = Mixture(matrices.to(session.device), site.module)
        self.ranks, self.tokens = dict(fields.ranks), dict(fields.tokens)

    def record(self) -> dict[str, Any]:
        """Return rank(P_j) of every expert, and the tokens of reference text that it reads, per site."""
        return {"experts": {m: {"ranks": ranks, "tokens": self.tokens[m]} for m, ranks in self.ranks.items()}}

    def _initial(self, session: Session, site: Site) -> Tensor:
        """Return C_j = P_j / l of every expert, (E, d, d) float64."""
        import torch

        from editcli.plugin import eigh
        from editcli_moeedit.mixture import filled

        moments, tokens = session.expert_moments(site)
        size = moments.shape[-1]
        least = self.options.floor * size
        matrices, ranks = [], list[int]()
        for moment in filled(moments, tokens, least):
            values, vectors = eigh(moment, site=site.module)
            chosen = unused(values, self.options)
            unit = float(values[chosen].sum().clamp_min(1e-30)) if self.options.l2_kind == "relative" else 1.0
            null = vectors[:, chosen]
            matrices.append(null @ null.T / (self.options.l2 * unit))
            ranks.append(int(chosen.sum()))
        self._refuse_extremes(site, ranks, size)
        self.ranks[site.module], self.tokens[site.module] = ranks, [int(number) for number in tokens.tolist()]
        rare = int((tokens < least).sum())
        also = f"; {rare} of them read too little text and were given the layer's mean" if rare else ""
        session.reporter.note(
            f"{site.module}: edits may use {min(ranks)} to {max(ranks)} of {size} directions of each expert{also}"
        )
        return torch.stack(matrices)

    def _refuse_extremes(self, site: Site, ranks: Sequence[int], size: int) -> None:
        """Raise :class:`OptionError` where no expert may be edited, or nothing of any is kept."""
        if any(ranks) and any(rank < size for rank in ranks):
            return
        what, change = ("every direction", "lower") if any(ranks) else ("no direction", "raise")
        raise OptionError(
            f"{self.name}.nullspace_threshold={self.options.nullspace_threshold:g} leaves {what} of every expert of "
            f"{site.module} to edits; {change} it or set {self.name}.threshold_kind=directions"
        )
