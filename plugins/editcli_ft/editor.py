"""Constrained fine-tuning: the baseline that editors are compared with (Zhu et al., 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from editcli.plugin import Dense, Editor, EditRequest, Session, Site, Update, option

if TYPE_CHECKING:
    from torch import Tensor


class FineTuning(Editor):
    """Descend the targets' cross-entropy in the edited matrices alone, all of them together, within a norm.

    Adam on the change D of each site, brought back to ||D|| <= norm_bound ||W|| after every step; it stops early once
    the mean loss is below ``stop_loss``. Steps and bound are in units of the weight itself, so that one setting
    serves models of every scale; the published baselines bound the largest entry by an absolute number instead.
    """

    name: ClassVar[str] = "ft"
    reference: ClassVar[str] = "arXiv:2012.00363"
    tempered_by: ClassVar[str] = "lower ft.lr"
    needs_values: ClassVar[bool] = False
    needs_subject: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Options:
        """How far and how fast to descend."""

        steps: int = option(25, "at most this many steps for a batch")
        lr: float = option(0.01, "step size of Adam, as a share of the weight's root mean square")
        norm_bound: float = option(0.1, "bound on a batch's change of a site, as a share of the weight's norm")
        stop_loss: float = option(0.05, "stop once the batch's mean loss is below this")

        def __post_init__(self) -> None:
            if not (self.steps > 0 and self.lr > 0 and self.norm_bound > 0):
                raise ValueError("steps, lr and norm_bound must be greater than 0")

    def __init__(self, options: object = None):
        super().__init__(options)
        self._changes: dict[Site, Tensor] = {}
        self._known: tuple[int, ...] = ()

    def begin(self, session: Session, requests: Sequence[EditRequest]) -> None:
        """Fine-tune all sites together; :meth:`update` returns each site's change."""
        descents = {site: _Descent(session.weight(site), self.options) for site in session.sites}
        with session.reporter.phase("Fine-tuning", self.options.steps, "steps") as advance:
            for number in range(self.options.steps):
                trial = {site: descent.weight + descent.change for site, descent in descents.items()}
                measured = session.gradients(requests, positions="all", trial=trial)
                done = float(measured.loss.mean()) < self.options.stop_loss
                if number == 0:
                    # Where the batch's mean is low already, none of its edits needs a change.
                    low = (measured.loss < self.options.stop_loss) | done
                    self._known = tuple(low.nonzero().flatten().tolist())
                if done:
                    break
                for site, seen in measured.sites.items():
                    descents[site].step(seen.gradients @ seen.inputs.T / len(requests))
                advance(1)
        self._changes = {site: descent.change for site, descent in descents.items()}

    def update(self, session: Session, site: Site) -> Update:
        return Dense(self._changes[site])

    def already_true(self, requests: Sequence[EditRequest]) -> Sequence[int]:
        """Return the edits whose loss was low on the weights that the batch began with."""
        return self._known


class _Descent:
    """Adam on the change of one weight, inside a ball around zero."""

    def __init__(self, weight: Tensor, options: FineTuning.Options):
        from torch.optim import Adam

        norm = float(weight.norm())
        self.weight, self.change = weight, weight.new_zeros(weight.shape)
        self._bound, self._scale = options.norm_bound * norm, 0.0
        self._adam = Adam([self.change], lr=options.lr * norm / weight.numel() ** 0.5)

    def step(self, gradient: Tensor) -> None:
        """Take one step of Adam and project back into the ball."""
        # Adam's guard against division by zero is an absolute number, so gradients come in units of the first one.
        self._scale = self._scale or float(gradient.abs().max()) or 1.0
        self.change.grad = (gradient / self._scale).to(self.change)
        self._adam.step()
        norm = float(self.change.norm())
        if norm > self._bound:
            self.change.mul_(self._bound / norm)
