"""Call a model's decoder blocks one by one, as the model itself calls them, whatever family it is.

The arguments of the blocks (masks, rotary embeddings, position ids) are recorded once for some texts; from then on the
blocks run on other hidden states of the same texts without the rest of the model. The norm, head, scaling and
soft-capping after the last block work on each position alone, so they run only at the positions that need logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from editcli.models.forward import first, head_only_at, positions, replaced_forward, run, with_first
from editcli.models.loading import LoadedModel


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one call of a block, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str | None
    """The hidden states' keyword; None where they are the first argument."""

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run ``block`` on other hidden states."""
        if self.name is None:
            return first(block(hidden, *self.args, **self.kwargs))
        return first(block(*self.args, **{self.name: hidden}, **self.kwargs))


class Blocks:
    """The blocks of one model above ``layer``, called one by one; ``example`` is what a block returns."""

    def __init__(self, loaded: LoadedModel, layer: int, example: Any):
        self.loaded, self.architecture, self.layer, self.example = loaded, loaded.architecture, layer, example
        self.last = self.architecture.layers - 1

    @torch.no_grad()
    def record(self, ids: Tensor, options: dict[str, Any]) -> tuple[Call, ...]:
        """Return how the model calls the upper blocks on ``ids``, (rows, columns); computes nothing in them."""
        calls: list[Call] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            if args:
                calls.append(Call(args[1:], kwargs, None))
                return with_first(self.example, args[0])
            name = next(iter(kwargs))
            calls.append(Call((), {key: value for key, value in kwargs.items() if key != name}, name))
            return with_first(self.example, kwargs[name])

        with ExitStack() as stack:
            self._stand_in(stack, range(self.layer + 1), self._pass_through)
            self._stand_in(stack, range(self.layer + 1, self.last + 1), record)
            stack.enter_context(head_only_at(self.architecture.head, *positions([(0, 0)], ids.device)))
            run(self.loaded.model, ids, **options)
        return tuple(calls)

    def logits(self, calls: Sequence[Call], hidden: Tensor, where: tuple[Tensor, Tensor]) -> Tensor:
        """Return float32 logits at ``where`` (rows, columns) from the output of :attr:`layer`, (rows, columns, d)."""
        rows, columns = (index.to(hidden.device) for index in where)
        flat = rows * hidden.shape[1] + columns
        with ExitStack() as stack:
            for layer, call in enumerate(calls, start=self.layer + 1):
                if layer == self.last:
                    mlp = self.architecture.mlp(layer)
                    stack.enter_context(replaced_forward(mlp, _only_at(mlp.forward, flat)))
                hidden = call(self.architecture.block(layer), hidden)
        return self._after_blocks(hidden.flatten(0, 1)[flat.to(hidden.device)])

    def whole_logits(self, ids: Tensor, options: dict[str, Any], hidden: Tensor, where: tuple[Tensor, Tensor]) -> Any:
        """Return the result of :meth:`logits`, by the model's own forward pass."""
        steered = with_first(self.example, hidden)
        with ExitStack() as stack:
            self._stand_in(stack, range(self.layer), self._pass_through)
            self._stand_in(stack, [self.layer], lambda *args, **kwargs: steered)
            stack.enter_context(head_only_at(self.architecture.head, *where))
            return run(self.loaded.model, ids, **options).logits[0].float()

    def _after_blocks(self, hidden: Tensor) -> Tensor:
        """Run the modules after the last block on hidden states (n, d), each as a text of one token."""
        answer = with_first(self.example, hidden[:, None])
        ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=self.loaded.input_device)
        with ExitStack() as stack:
            self._stand_in(stack, range(self.last + 1), lambda *args, **kwargs: answer)
            return run(self.loaded.model, ids).logits[:, 0].float()

    def _stand_in(self, stack: ExitStack, layers: Sequence[int], forward: Callable[..., Any]) -> None:
        for layer in layers:
            stack.enter_context(replaced_forward(self.architecture.block(layer), forward))

    def _pass_through(self, *args: Any, **kwargs: Any) -> Any:
        return with_first(self.example, args[0] if args else next(iter(kwargs.values())))


def _only_at(forward: Callable[..., Any], positions: Tensor) -> Callable[..., Any]:
    """Return an MLP's forward that computes the flat ``positions`` and leaves the others zero: nothing reads them."""

    def pruned(hidden: Tensor, *others: Any, **more: Any) -> Any:
        if others or more:
            # Other arguments may have to be cut as well, in a way that depends on the family.
            return forward(hidden, *others, **more)
        flat = hidden.reshape(-1, hidden.shape[-1])
        where = positions.to(flat.device)
        # Some families flatten (rows, tokens) in front of their MLP; it gets the shape that it knows.
        whole = forward(flat[where] if hidden.ndim == 2 else flat[where][None])
        output = first(whole)
        wide = output.new_zeros(len(flat), output.shape[-1])
        # Some mixtures of experts return the scores of their router as well, which nothing reads.
        return with_first(whole, wide.index_copy(0, where, output.reshape(len(where), -1)).view(*hidden.shape[:-1], -1))

    return pruned
