"""LocFT-BF: fine-tuning in the right place and order (2025)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from editcli.plugin import FineTuningEditor, option, shuffled


class LocFt(FineTuningEditor):
    """Fine-tune one late matrix on all edits of a batch together, breadth first, with the end of the text learned.

    Plain Adam on the cross-entropy of the target's tokens, the mean over a target, then over a mini-batch. Every epoch
    sees all edits of the batch in mini-batches of an order of its own, so that no edit is trained to its end before the
    next begins. The end of the text is the last token of every target: a generated answer then stops behind it. Edits
    need no subject, and targets may be of any length.

    A mini-batch whose loss is below ``stop_loss`` is left out, and the batch is done once the mean of an epoch is. The
    published rate, 5e-4 on Llama 3 8B, is an absolute number; here it is a share of the weight's root mean square. The
    published mini-batch, 100, is meant for a thousand edits and more: an epoch takes a step for each.
    """

    name: ClassVar[str] = "locft"
    reference: ClassVar[str] = "arXiv:2509.22072"
    tempered_by: ClassVar[str] = "lower locft.lr"
    ended: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Options:
        """How long, how fast and in which portions to train."""

        epochs: int = option(25, "passes over a batch of edits, at most")
        lr: float = option(0.04, "step size of Adam, as a share of the weight's root mean square")
        mini_batch: int = option(32, "edits of one step; --batch-size says how many are trained together")
        stop_loss: float = option(
            0.01, "leave out a mini-batch whose mean loss is below this, and stop at such an epoch"
        )

        def __post_init__(self) -> None:
            if not (self.epochs > 0 and self.lr > 0 and self.mini_batch > 0):
                raise ValueError("epochs, lr and mini_batch must be greater than 0")

    def mini_batches(self, count: int, epoch: int) -> Iterator[Sequence[int]]:
        return shuffled(count, self.options.mini_batch)
