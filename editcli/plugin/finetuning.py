"""The base of the editors that train the edited matrices themselves: Adam on their changes, breadth first.

A batch is trained in epochs of mini-batches. With W the weights that the batch begins with, D the change so far and
L the mean over a mini-batch's edits of their targets' cross-entropy, each site takes the step ::

    D <- D - Adam(direction(dL/dW at W + D)),    dL/dW = sum over positions of g k^T

A mini-batch whose loss is low already is left out, and the batch is done once the mean of an epoch is low. Sizes of
steps are shares of the weight's root mean square, so that one setting serves models of every scale. This module never
imports torch at import time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from editcli.plugin.interfaces import Dense, Editor, Gradients, Session, Site, Update
from editcli.requests.schema import EditRequest

if TYPE_CHECKING:
    from torch import Tensor


class Training(Protocol):
    """The options that every such editor has."""

    @property
    def epochs(self) -> int:
        """Passes over a batch, at most."""
        ...

    @property
    def lr(self) -> float:
        """Step size of Adam, as a share of the weight's root mean square."""
        ...

    @property
    def stop_loss(self) -> float:
        """Loss below which a mini-batch is left out, and an epoch is the last."""
        ...


class FineTuningEditor(Editor):
    """An editor that trains all sites of a batch together; its options have those of :class:`Training`.

    Override :meth:`direction` to change the gradient, :meth:`mini_batches` to divide a batch, :meth:`bound` to limit a
    change, and :meth:`measured` to look at what is measured anyway.
    """

    needs_values: ClassVar[bool] = False
    needs_subject: ClassVar[bool] = False
    ended: ClassVar[bool] = False
    """Whether the end of the text is learned as a part of every target."""

    def __init__(self, options: object = None):
        super().__init__(options)
        self._changes: dict[Site, Tensor] = {}
        self._known: tuple[int, ...] = ()

    def direction(self, session: Session, site: Site, gradient: Tensor) -> Tensor:
        """Return the gradient to descend along instead of ``gradient``, dL/dW (d_out, d_in)."""
        return gradient

    def mini_batches(self, count: int, epoch: int) -> Iterator[Sequence[int]]:
        """Yield the columns of the mini-batches of an epoch, counted from 0; by default the whole batch at once."""
        yield range(count)

    def bound(self, weight: Tensor) -> float:
        """Return the largest ||D|| of a batch for ``weight``; infinite unless overridden."""
        return float("inf")

    def measured(self, session: Session, gradients: Gradients, *, epoch: int) -> None:
        """Look at the gradients of a mini-batch, before its step is taken."""

    def begin(self, session: Session, requests: Sequence[EditRequest]) -> None:
        """Train all sites together; :meth:`update` returns each site's change."""
        options: Training = self.options
        descents = {
            site: Descent(weight, lr=options.lr, bound=self.bound(weight))
            for site, weight in ((site, session.weight(site)) for site in session.sites)
        }
        low: list[int] = []
        with session.reporter.phase(f"Training with {self.name}", options.epochs, "epochs") as advance:
            for epoch in range(options.epochs):
                losses = self._epoch(session, requests, epoch, descents, low)
                advance(1)
                if sum(losses) < options.stop_loss * len(losses):
                    break
        self._known = tuple(sorted(low))
        self._changes = {site: descent.change for site, descent in descents.items()}

    def update(self, session: Session, site: Site) -> Update:
        return Dense(self._changes[site])

    def already_true(self, requests: Sequence[EditRequest]) -> Sequence[int]:
        """Return the edits whose loss was low on the weights that the batch began with."""
        return self._known

    def _epoch(
        self,
        session: Session,
        requests: Sequence[EditRequest],
        epoch: int,
        descents: dict[Site, Descent],
        low: list[int],
    ) -> list[float]:
        """Train one epoch and return each edit's loss; ``low`` gains the edits that needed no change."""
        losses: list[float] = []
        for columns in self.mini_batches(len(requests), epoch):
            trial = {site: descent.weight + descent.change for site, descent in descents.items()}
            batch = [requests[column] for column in columns]
            gradients = session.gradients(batch, positions="all", trial=trial, ended=self.ended)
            self.measured(session, gradients, epoch=epoch)
            each = gradients.loss.tolist()
            losses += each
            done = sum(each) < self.options.stop_loss * len(each)
            if not any(descent.steps for descent in descents.values()):
                # Where the mini-batch's mean is low already, none of its edits needs a change.
                low += [c for c, loss in zip(columns, each, strict=True) if done or loss < self.options.stop_loss]
            if done:
                continue
            for site, seen in gradients.sites.items():
                slope = seen.gradients @ seen.inputs.T / len(batch)
                descents[site].step(self.direction(session, site, slope))
        return losses


class Descent:
    """Adam on the change D of one weight, inside a ball around zero."""

    def __init__(self, weight: Tensor, *, lr: float, bound: float = float("inf")):
        from torch.optim import Adam

        self.weight, self.change = weight, weight.new_zeros(weight.shape)
        self.steps = 0
        self._bound, self._scale = bound, 0.0
        self._adam = Adam([self.change], lr=lr * float(weight.norm()) / weight.numel() ** 0.5)

    def step(self, gradient: Tensor) -> None:
        """Take one step of Adam and project back into the ball."""
        # Adam's guard against division by zero is an absolute number, so gradients come in units of the first one.
        self._scale = self._scale or float(gradient.abs().max()) or 1.0
        self.change.grad = (gradient / self._scale).to(self.change)
        self._adam.step()
        self.steps += 1
        norm = float(self.change.norm())
        if norm > self._bound:
            self.change.mul_(self._bound / norm)


def shuffled(count: int, size: int) -> Iterator[Sequence[int]]:
    """Yield mini-batches of at most ``size`` of ``count`` columns, in an order that is drawn anew.

    A run seeds torch's generator for every batch, so that its repetition draws the same.
    """
    import torch

    order = torch.randperm(count).tolist() if count > size else list(range(count))
    for start in range(0, count, size):
        yield order[start : start + size]
