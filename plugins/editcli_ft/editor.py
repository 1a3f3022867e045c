"""Constrained fine-tuning: the baseline that editors are compared with (Zhu et al., 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from editcli.plugin import FineTuningEditor, option

if TYPE_CHECKING:
    from torch import Tensor


class FineTuning(FineTuningEditor):
    """Descend the targets' cross-entropy in the edited matrices alone, all of them together, within a norm.

    Adam on the change D of each site, brought back to ||D|| <= norm_bound ||W|| after every step; it stops early once
    the mean loss is below ``stop_loss``. Steps and bound are in units of the weight itself, so that one setting
    serves models of every scale; the published baselines bound the largest entry by an absolute number instead.

    This is the weak baseline of the papers, in early layers, batch after batch; ``locft`` fine-tunes as well as it can.
    """

    name: ClassVar[str] = "ft"
    reference: ClassVar[str] = "arXiv:2012.00363"
    tempered_by: ClassVar[str] = "lower ft.lr"

    @dataclass(frozen=True)
    class Options:
        """How far and how fast to descend."""

        steps: int = option(25, "at most this many steps for a batch")
        lr: float = option(0.01, "step size of Adam, as a share of the weight's root mean square")
        norm_bound: float = option(0.1, "bound on a batch's change of a site, as a share of the weight's norm")
        stop_loss: float = option(0.05, "stop once the batch's mean loss is below this")

        @property
        def epochs(self) -> int:
            """A batch is one mini-batch, so that each pass over it is a step."""
            return self.steps

        def __post_init__(self) -> None:
            if not (self.steps > 0 and self.lr > 0 and self.norm_bound > 0):
                raise ValueError("steps, lr and norm_bound must be greater than 0")

    def bound(self, weight: Tensor) -> float:
        return self.options.norm_bound * float(weight.norm())
