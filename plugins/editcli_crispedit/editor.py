"""CrispEdit: fine-tuning along directions in which the pretraining loss is flat (2026)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from editcli.plugin import (
    EditRequest,
    FineTuningEditor,
    Gradients,
    Problem,
    SavedState,
    Session,
    Site,
    State,
    option,
    shuffled,
)

if TYPE_CHECKING:
    from torch import Tensor

    from editcli_crispedit.curvature import Curvature

TOKENS_PER_DIM = 10
"""Tokens for each dimension of a key that the reference text counts as: what is read of it by default."""


@dataclass(frozen=True)
class _Fields:
    """What a snapshot holds beside the factors."""

    tokens: dict[str, int]

    def __post_init__(self) -> None:
        if not all(count > 0 for count in self.tokens.values()):
            raise ValueError("tokens must be greater than 0")


class CrispEdit(FineTuningEditor):
    """Train late matrices on all edits of a batch, with every gradient kept out of directions of high curvature.

    The curvature of the pretraining loss in W is about A (x) B, with A = E[k k^T] = U_A diag(a) U_A^T of the inputs and
    B = E[g g^T] = U_B diag(b) U_B^T of the gradients at the outputs. With M_ij = 1 where the product b_i a_j is below
    the value at which the descending products reach the share gamma of their sum, Adam descends along ::

        U_B ((U_B^T dL/dW U_A) * M) U_A^T

    With ``sequential`` the inputs and gradients of each batch, as its first epoch meets them, are averaged into A and
    B by their number of tokens, so that later batches avoid the directions of earlier ones.
    """

    name: ClassVar[str] = "crispedit"
    reference: ClassVar[str] = "arXiv:2602.15823"
    tempered_by: ClassVar[str] = "raise crispedit.gamma or lower crispedit.lr"
    ended: ClassVar[bool] = True
    remembers: bool = True

    @dataclass(frozen=True)
    class Options:
        """How much curvature is avoided, and how long, how fast and in which portions to train."""

        gamma: float = option(0.8, "share of the curvature whose directions are left alone")
        sequential: bool = option(True, "count the curvature of earlier batches as well")
        epochs: int = option(25, "passes over a batch of edits, at most")
        lr: float = option(0.02, "step size of Adam, as a share of the weight's root mean square")
        mini_batch: int = option(32, "edits of one step; --batch-size says how many are trained together")
        stop_loss: float = option(0.01, "leave out a mini-batch whose loss is below this, and stop at such an epoch")

        def __post_init__(self) -> None:
            if not (0 < self.gamma < 1 and self.epochs > 0 and self.lr > 0 and self.mini_batch > 0):
                raise ValueError("gamma must lie between 0 and 1, and epochs, lr and mini_batch be greater than 0")

    def __init__(self, options: object = None):
        super().__init__(options)
        self.remembers = self.options.sequential
        self.curvatures: dict[str, Curvature] = {}
        """A, B and the mask of each site by module name."""
        self._seen: list[Gradients] = []
        """The gradients of the batch's first epoch, a mini-batch each."""

    def prepare(self, session: Session) -> None:
        from editcli_crispedit.curvature import Curvature

        with session.reporter.phase(f"preparing {self.name}", len(session.sites), "sites") as advance:
            for site in session.sites:
                inputs, gradients = session.second_moment(site), session.gradient_moment(site)
                self.curvatures[site.module] = Curvature.of(
                    inputs, gradients, tokens=TOKENS_PER_DIM * len(inputs), gamma=self.options.gamma, site=site.module
                )
                advance(1)

    def mini_batches(self, count: int, epoch: int) -> Iterator[Sequence[int]]:
        return shuffled(count, self.options.mini_batch)

    def direction(self, session: Session, site: Site, gradient: Tensor) -> Tensor:
        return self.curvatures[site.module].flat(gradient)

    def begin(self, session: Session, requests: Sequence[EditRequest]) -> None:
        self._seen = []
        super().begin(session, requests)

    def measured(self, session: Session, gradients: Gradients, *, epoch: int) -> None:
        if epoch == 0 and self.options.sequential:
            self._seen.append(gradients)

    def remember(self, session: Session, requests: Sequence[EditRequest], problems: Sequence[Problem]) -> None:
        import torch

        if not self.options.sequential:
            return
        for site in session.sites:
            columns = [(seen.sites[site].inputs, seen.sites[site].gradients) for seen in self._seen]
            inputs, gradients = (torch.cat(side, dim=1) for side in zip(*columns, strict=True))
            self.curvatures[site.module] = self.curvatures[site.module].counting(
                inputs, gradients, gamma=self.options.gamma, site=site.module
            )
        self._seen = []

    def state(self) -> State:
        """Return A and B of each site as ``<module>.inputs`` and ``<module>.gradients``, and their ``tokens``."""
        if not self.options.sequential:
            return State()
        parts = {
            f"{m}.{name}": getattr(c, name) for m, c in self.curvatures.items() for name in ("inputs", "gradients")
        }
        return State(parts, {"tokens": {module: curvature.tokens for module, curvature in self.curvatures.items()}})

    def load_state(self, session: Session, state: State) -> None:
        from editcli.plugin import double
        from editcli_crispedit.curvature import Curvature

        if not self.options.sequential:
            self.prepare(session)
            return
        saved = SavedState(self.name, state)
        counted = saved.fields(_Fields).tokens
        for site in session.sites:
            rows, columns = session.weight(site).shape
            if site.module not in counted:
                raise saved.refusal(f"tokens has no {site.module}")
            factors = (("inputs", columns), ("gradients", rows))
            read = [saved.tensor(f"{site.module}.{name}", (size, size)) for name, size in factors]
            inputs, gradients = (double(factor, session.device) for factor in read)
            tokens = counted[site.module]
            self.curvatures[site.module] = Curvature.of(
                inputs, gradients, tokens=tokens, gamma=self.options.gamma, site=site.module
            )

    def record(self) -> dict[str, Any]:
        """Return, per site, the share of the directions that edits may use, and the tokens behind the curvature."""
        sites = self.curvatures.items()
        return {"sites": {m: {"share": float(c.mask.double().mean()), "tokens": c.tokens} for m, c in sites}}
