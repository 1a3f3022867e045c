"""What modules read and write at the last token of a batch's texts, going on from the last written site.

Every site of a batch is read after the sites before it were written. A written weight changes nothing in front of its
own block, so the hidden states that enter the block of a site are kept, and the next pass starts there instead of at
token zero. What is kept depends on the texts and on the weights of all lower blocks: it is found by the texts' token
ids, and :meth:`Activations.forget` drops what a written weight has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from editcli.errors import ModelError
from editcli.models.forward import chunks, first, pass_tokens, positions, replaced_forward, run, tapped, with_first
from editcli.models.loading import LoadedModel
from editcli.models.sharded import whole_input
from editcli.models.tokens import Encoded
from editcli.reporting import Reporter

KEPT_BATCHES = 2
"""Lists of texts whose hidden states are kept: a batch's bare prompts and its prefixed ones."""


@dataclass(frozen=True, slots=True)
class Tap:
    """A module to read: what it puts out, or what enters it."""

    module: nn.Module
    output: bool
    within: nn.Module | None = None
    """A module that treats every token alike: of what enters it, only the rows' last tokens go on."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One micro-batch: which texts, their padded ids, where each ends, and what entered the blocks seen so far."""

    texts: tuple[int, ...]
    ids: Tensor
    ends: tuple[tuple[int, int], ...]
    entering: dict[int, Any] = field(default_factory=dict)
    """By layer, what the block below returned."""


class Activations:
    """Reads modules of one model; ``batch_tokens`` limits the padded tokens of one pass."""

    def __init__(self, loaded: LoadedModel, *, batch_tokens: int, reporter: Reporter):
        self.loaded, self.reporter = loaded, reporter
        self.batch_tokens = pass_tokens(batch_tokens, loaded.input_device)
        self._kept: dict[tuple[tuple[int, ...], ...], list[_Part]] = {}

    def read(self, rows: Sequence[Encoded], layer: int, taps: Sequence[Tap]) -> list[Tensor]:
        """Return what each tap shows at each row's last token, (rows, features) float32.

        ``taps`` come in the order in which they run, none of them below the block of ``layer``; the pass ends behind
        the last. What enters that block is kept for later reads of the same rows.
        """
        parts = self._parts(rows)
        while True:
            try:
                found = [self._pass(part, layer, taps) for part in parts]
                break
            except torch.OutOfMemoryError as error:
                parts = self._halved(rows, layer, error)
        order = torch.argsort(torch.tensor([text for part in parts for text in part.texts]))
        columns = (torch.cat(tensors) for tensors in zip(*found, strict=True))
        return [column[order.to(column.device)] for column in columns]

    def forget(self, *, above: int = -1) -> None:
        """Drop what entered the blocks above a layer whose weight was replaced; by default everything."""
        if above < 0:
            self._kept.clear()
        for parts in self._kept.values():
            for part in parts:
                for layer in [layer for layer in part.entering if layer > above]:
                    del part.entering[layer]

    def _parts(self, rows: Sequence[Encoded]) -> list[_Part]:
        """Return the micro-batches of some rows, the same ones as last time if they are still kept."""
        name = tuple(row.ids for row in rows)
        if name not in self._kept:
            while len(self._kept) >= KEPT_BATCHES:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = [self._part(rows, group) for group in chunks(rows, budget=self.batch_tokens)]
        return self._kept[name]

    def _part(self, rows: Sequence[Encoded], group: Sequence[int]) -> _Part:
        texts = [rows[index] for index in group]
        ends = tuple((place, len(text.ids) - 1) for place, text in enumerate(texts))
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
            f"{largest} texts at a time do not fit the memory: going on with half; see targets.batch_tokens"
        )
        return self._parts(rows)

    @torch.no_grad()
    def _pass(self, part: _Part, layer: int, taps: Sequence[Tap]) -> list[Tensor]:
        seen: dict[int, Tensor] = {}

        def show(number: int, tap: Tap) -> Any:
            def see(owner: Any, entered: Tensor, produced: Any) -> None:
                seen[number] = _at_ends(first(produced) if tap.output else whole_input(owner, entered), part).float()

            return see

        def keep(owner: Any, entered: Tensor, produced: Any) -> None:
            # A copy, in case a block works on what enters it in place.
            part.entering[layer] = with_first(produced, first(produced).clone())

        with ExitStack() as stack:
            self._skip(stack, part, layer)
            if layer > 0 and layer not in part.entering:
                stack.enter_context(tapped(self.loaded.architecture.block(layer - 1), keep))
            for number, tap in enumerate(taps):
                stop = number == len(taps) - 1
                stack.enter_context(tapped(tap.module, show(number, tap), stop=stop))
                if tap.within is not None:
                    stack.enter_context(_narrowed(tap.within, part))
            run(self.loaded.model, part.ids)
        return [seen[number] for number in range(len(taps))]

    def _skip(self, stack: ExitStack, part: _Part, layer: int) -> None:
        """Have the blocks below the highest one whose input is kept pass that input on instead of running."""
        start = max((kept for kept in part.entering if kept <= layer), default=0)
        if start == 0:
            return
        kept, architecture = part.entering[start], self.loaded.architecture
        for below in range(start - 1):
            through = replaced_forward(architecture.block(below), lambda hidden, *a, **k: with_first(kept, hidden))
            stack.enter_context(through)
        last = replaced_forward(architecture.block(start - 1), lambda *a, **k: with_first(kept, first(kept).clone()))
        stack.enter_context(last)


def _at_ends(hidden: Tensor, part: _Part) -> Tensor:
    """Return hidden states at each row's last token, (rows, features)."""
    if hidden.numel() == len(part.ends) * hidden.shape[-1]:
        return hidden.reshape(len(part.ends), -1)
    # Some families flatten (rows, tokens) inside their MLP; the order is the same either way.
    return hidden.reshape(*part.ids.shape, -1)[positions(part.ends, hidden.device)]


@contextmanager
def _narrowed(module: nn.Module, part: _Part) -> Iterator[None]:
    """Let only each row's last token into a module; one that is called in an unusual way gets everything."""

    def narrow(owner: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].shape[:-1] != part.ids.shape:
            return None
        return (_at_ends(args[0], part).unsqueeze(1), *args[1:])

    handle = module.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        handle.remove()
