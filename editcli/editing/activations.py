"""Inputs and outputs of modules at the last token of a batch's texts, from the last written site upwards.

Every site of a batch is read after the sites before it were written. A written weight changes nothing before its own
block, so the hidden states that enter the block of a site are stored, and the next pass starts there instead of at the
embedding. They depend on the texts and on the weights of all lower blocks: the texts' token ids are their key, and
:meth:`Activations.forget` drops those that a written weight has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from editcli.errors import ModelError
from editcli.models.forward import chunks, first, hooked, pass_tokens, positions, replaced_forward, run, with_first
from editcli.models.keys import read_keys
from editcli.models.loading import LoadedModel
from editcli.models.tokens import Encoded
from editcli.reporting import Reporter

STORED_BATCHES = 2
"""Lists of texts whose hidden states are stored: a batch's bare prompts and its prefixed ones."""


@dataclass(frozen=True, slots=True)
class Hook:
    """What to read: the keys of a layer, or the output of a module."""

    module: nn.Module | None = None
    """None for the keys."""
    keys: int = -1
    """The layer whose keys to read."""
    within: nn.Module | None = None
    """A module that works on each token alone, so that only the rows' last tokens enter it."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One micro-batch: the texts' indices, their padded ids, their last positions, and the stored inputs of blocks."""

    texts: tuple[int, ...]
    ids: Tensor
    ends: tuple[tuple[int, int], ...]
    entering: dict[int, Any] = field(default_factory=dict)
    """By layer, the output of the block below."""


class Activations:
    """Reads modules of one model; ``batch_tokens`` limits the padded tokens of one pass."""

    def __init__(self, loaded: LoadedModel, *, batch_tokens: int, reporter: Reporter):
        self.loaded, self.reporter = loaded, reporter
        self.batch_tokens = pass_tokens(batch_tokens, loaded.input_device)
        self._stored: dict[tuple[tuple[int, ...], ...], list[_Part]] = {}

    def read(self, rows: Sequence[Encoded], layer: int, hooks: Sequence[Hook]) -> list[Tensor]:
        """Return the value of each hook at each row's last token, (rows, features) float32.

        ``hooks`` come in the order in which they run, none of them below the block of ``layer``; the pass ends after
        the last. The input of that block is stored for later reads of the same rows.
        """
        parts = self._parts(rows)
        while True:
            try:
                values = [self._pass(part, layer, hooks) for part in parts]
                break
            except torch.OutOfMemoryError as error:
                parts = self._halved(rows, layer, error)
        order = torch.argsort(torch.tensor([text for part in parts for text in part.texts]))
        columns = (torch.cat(tensors) for tensors in zip(*values, strict=True))
        return [column[order.to(column.device)] for column in columns]

    def forget(self, *, above: int = -1) -> None:
        """Drop the inputs of the blocks above a layer whose weight was replaced; by default all."""
        if above < 0:
            self._stored.clear()
        for parts in self._stored.values():
            for part in parts:
                for layer in [layer for layer in part.entering if layer > above]:
                    del part.entering[layer]

    def _parts(self, rows: Sequence[Encoded]) -> list[_Part]:
        """Return the micro-batches of some rows, with the stored inputs if they are still there."""
        name = tuple(row.ids for row in rows)
        if name not in self._stored:
            while len(self._stored) >= STORED_BATCHES:
                del self._stored[next(iter(self._stored))]
            self._stored[name] = [self._part(rows, group) for group in chunks(rows, budget=self.batch_tokens)]
        return self._stored[name]

    def _part(self, rows: Sequence[Encoded], group: Sequence[int]) -> _Part:
        texts = [rows[index] for index in group]
        ends = tuple((row, len(text.ids) - 1) for row, text in enumerate(texts))
        return _Part(tuple(group), self.loaded.tokens.pad(texts, self.loaded.input_device), ends)

    def _halved(self, rows: Sequence[Encoded], layer: int, error: torch.OutOfMemoryError) -> list[_Part]:
        """Split the micro-batches after one did not fit; a single text that does not fit ends the run."""
        largest = max(len(part.texts) for part in self._parts(rows))
        if largest == 1:
            site = self.loaded.architecture.site(layer).module
            raise ModelError(f"one text does not fit the memory at {site}; use a smaller --dtype") from error
        self.batch_tokens = max(part.ids.numel() for part in self._parts(rows)) // 2
        self.forget()
        self.reporter.note(
            f"{largest} texts at a time do not fit the memory: continuing with half; see targets.batch_tokens"
        )
        return self._parts(rows)

    @torch.no_grad()
    def _pass(self, part: _Part, layer: int, hooks: Sequence[Hook]) -> list[Tensor]:
        values: dict[int, Tensor] = {}

        def reading(number: int, hook: Hook) -> Any:
            stop = number == len(hooks) - 1

            def read(value: Tensor) -> None:
                values[number] = _at_ends(value, part).float()

            if hook.module is None:
                return read_keys(self.loaded.architecture, hook.keys, read, stop=stop)
            return hooked(hook.module, lambda owner, entered, produced: read(first(produced)), stop=stop)

        def store(owner: Any, entered: Tensor, produced: Any) -> None:
            # A copy, in case a block works on its input in place.
            part.entering[layer] = with_first(produced, first(produced).clone())

        with ExitStack() as stack:
            self._skip(stack, part, layer)
            if layer > 0 and layer not in part.entering:
                stack.enter_context(hooked(self.loaded.architecture.block(layer - 1), store))
            for number, hook in enumerate(hooks):
                stack.enter_context(reading(number, hook))
                if hook.within is not None:
                    stack.enter_context(_narrowed(hook.within, part))
            run(self.loaded.model, part.ids)
        return [values[number] for number in range(len(hooks))]

    def _skip(self, stack: ExitStack, part: _Part, layer: int) -> None:
        """Make the blocks below the highest one with a stored input pass that input on instead of running."""
        start = max((stored for stored in part.entering if stored <= layer), default=0)
        if start == 0:
            return
        stored, architecture = part.entering[start], self.loaded.architecture
        for below in range(start - 1):
            through = replaced_forward(architecture.block(below), lambda hidden, *a, **k: with_first(stored, hidden))
            stack.enter_context(through)
        last = replaced_forward(
            architecture.block(start - 1), lambda *a, **k: with_first(stored, first(stored).clone())
        )
        stack.enter_context(last)


def _at_ends(hidden: Tensor, part: _Part) -> Tensor:
    """Return hidden states at each row's last token, (rows, features)."""
    if hidden.numel() == len(part.ends) * hidden.shape[-1]:
        return hidden.reshape(len(part.ends), -1)
    # Some families flatten (rows, tokens) inside their MLP; the order is the same either way.
    return hidden.reshape(*part.ids.shape, -1)[positions(part.ends, hidden.device)]


@contextmanager
def _narrowed(module: nn.Module, part: _Part) -> Iterator[None]:
    """Pass only each row's last token to a module; with unusual arguments it gets all tokens."""

    def narrow(owner: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].shape[:-1] != part.ids.shape:
            return None
        return (_at_ends(args[0], part).unsqueeze(1), *args[1:])

    handle = module.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        handle.remove()
