"""The texts of a batch, laid out so that only what an offset can change is computed again.

Nothing below the last edited layer changes while its output is steered, and nothing before the lookup token. So the
stored output of that layer stands in for everything below, and, with ``cached``, the keys and values that the tokens
before the lookup token left in attention stand in for those tokens. Neither changes the result. Texts are computed in
chunks of about equal length, so that little of the work is padding.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from editcli.editing.prompt_cache import Kept, encode
from editcli.models.blocks import Blocks, Call, Past
from editcli.models.forward import first, run, tapped
from editcli.models.kv_cache import cache_options
from editcli.models.loading import LoadedModel
from editcli.models.tokens import Encoded

SETUP = 60e6
"""Multiplications that the fixed cost of one call of a block is worth: chunks are joined where padding costs less."""
CACHE_BYTES = 24 << 20
"""Activations of one chunk in one block on a CPU: what its caches hold, and enough rows for fast products."""


@dataclass(frozen=True, slots=True)
class Row:
    """One text of one edit: ``edit`` is its index in the batch, ``weight`` the share of a target token in its loss."""

    text: Encoded
    edit: int
    weight: float
    is_essence: bool
    stems: tuple[Hashable, ...]
    """Names of the groups of texts that it may share a beginning with, the widest first."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows as tensors, cut in front of what is computed once, and how the model calls its blocks on them."""

    rows: Tensor
    """(k,) indices of the rows."""
    ids: Tensor
    """(k, columns)"""
    hidden: Tensor
    """(k, columns, d): the last edited layer's output."""
    lookup: Tensor
    """(k,) column of the lookup token."""
    options: dict[str, Any]
    """What the model is given besides the ids."""
    calls: tuple[Call, ...]


class Steering:
    """Runs the rows of one micro-batch with an offset added at their lookup tokens."""

    def __init__(self, loaded: LoadedModel, rows: Sequence[Row], layer: int, *, cached: bool, budget: int):
        self.loaded, self.rows, self.layer, self.budget = loaded, tuple(rows), layer, budget
        self._from_lookup = cached and self._cacheable()
        begun = [row.text.ids[: self._start(row)] for row in rows]
        kept = encode(loaded, begun, [row.stems for row in rows], budget=self._tokens())
        self.width = [len(row.text.ids) - self._start(row) for row in rows]
        self._lookup = torch.tensor([row.text.lookup - self._start(row) for row in rows])
        self.outputs, self._hidden, example = self._observe(kept)
        self._kept = kept.above(layer)
        self._blocks = Blocks(loaded, layer, example)
        self.whole = False

    def at_lookup(self) -> Tensor:
        """Return h at each row's lookup token, (rows, d) float32."""
        everywhere = torch.arange(len(self.rows))
        return self._hidden[_on(self._hidden, everywhere, self._lookup)].float()

    def columns(self, row: int, places: Sequence[int]) -> list[int]:
        """Return a chunk's columns of token positions of a row."""
        return [place - self._start(self.rows[row]) for place in places]

    def chunks(self, rows: Sequence[int]) -> list[Chunk]:
        """Return the chunks in which ``rows`` are computed; the same for the same rows."""
        return [self._chunk(group) for group in self.groups(rows)]

    def groups(self, rows: Sequence[int]) -> list[list[int]]:
        """Return ``rows`` in groups of about equal width, the widest first.

        A narrower row joins a group while the padding that this costs is less work than another call of every block.
        """
        allowance, most = SETUP / self._block_size(), self._tokens()
        found: list[list[int]] = []
        wasted = 0
        for row in sorted(rows, key=lambda row: (-self.width[row], self._start(self.rows[row]), row)):
            width = self.width[found[-1][0]] if found else 0
            wasted += width - self.width[row]
            if not found or wasted > allowance or width * (len(found[-1]) + 1) > most:
                found.append([])
                wasted = 0
            found[-1].append(row)
        return found

    def logits(self, chunk: Chunk, shift: Tensor, wanted: tuple[Tensor, Tensor]) -> Tensor:
        """Return float32 logits at ``wanted`` (rows, columns) with ``shift`` (rows, d) added at the lookup tokens."""
        hidden = chunk.hidden.clone()
        where = _on(hidden, torch.arange(len(hidden)), chunk.lookup)
        hidden[where] = (hidden[where].float() + shift.to(hidden.device)).to(hidden.dtype)
        if self.whole:
            return self._blocks.whole_logits(chunk.ids, chunk.options, hidden, wanted)
        return self._blocks.logits(chunk.calls, hidden, wanted)

    @torch.no_grad()
    def check(self, chunk: Chunk, wanted: tuple[Tensor, Tensor]) -> None:
        """Leave the blocks to the model's own forward pass if it does more between them than call one by one."""
        whole = self._blocks.whole_logits(chunk.ids, chunk.options, chunk.hidden, wanted)
        alone = self._blocks.logits(chunk.calls, chunk.hidden, wanted)
        exact = chunk.hidden.dtype == torch.float32
        self.whole = not bool((whole - alone).abs().max() <= (1e-3 if exact else 5e-2) * whole.abs().max())

    def _start(self, row: Row) -> int:
        """Return the first token position that is computed again."""
        return row.text.lookup if self._from_lookup else 0

    def _cacheable(self) -> bool:
        """Tell whether keys and values can stand in for the tokens before the lookup tokens."""
        config = self.loaded.model.config.get_text_config()
        window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
        # A window shorter than the texts hides old tokens from new ones by a rule that differs between cache classes.
        # Each level of shared beginnings is padded on its own.
        levels = len(self.rows[0].stems) + 1
        longest = max(row.text.lookup for row in self.rows) * levels + max(len(row.text.ids) for row in self.rows)
        return (window is None or longest < window) and self.loaded.resumes

    def _block_size(self) -> int:
        block = self.loaded.architecture.block(self.layer)
        return sum(parameter.numel() for parameter in block.parameters())

    def _tokens(self) -> int:
        """Return the most tokens of a chunk: a CPU works best within its caches, an accelerator on all of them."""
        if torch.device(self.loaded.input_device).type != "cpu":
            return self.budget
        widest = max(self.loaded.architecture.shape(self.layer))
        return min(self.budget, max(128, CACHE_BYTES // (24 * widest)))

    def _chunk(self, rows: Sequence[int]) -> Chunk:
        index = torch.tensor(rows)
        ids, options = self._input(self._kept, index)
        hidden = self._hidden[_on(self._hidden, index)][:, : ids.shape[1]]
        return Chunk(index, ids, hidden, self._lookup[index], options, self._blocks.record(ids, options))

    def _input(self, kept: Kept, rows: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return the ids that are computed again, padded on the right, and what the model is given besides them."""
        device = self.loaded.input_device
        texts = [self.rows[row].text.ids[self._start(self.rows[row]) :] for row in rows.tolist()]
        width = max(map(len, texts))
        # What follows a token cannot change it, so padding behind needs no mask.
        ids = torch.tensor([[*own, *[own[-1]] * (width - len(own))] for own in texts])
        real = torch.tensor([[1] * len(own) + [0] * (width - len(own)) for own in texts])
        past = kept.select(rows)
        if not past.mask.shape[1]:
            return ids.to(device), {}
        # Behind a past it is masked all the same, so that it gets no positions that the model may not have.
        mask = torch.cat([past.mask, real], dim=1)
        return ids.to(device), cache_options(self.loaded.model, mask, width, Past(past.layers), device)

    @torch.no_grad()
    def _observe(self, kept: Kept) -> tuple[Tensor, Tensor, Any]:
        """Return the last edited layer's MLP output at each lookup token as it joins the stream, (rows, d) float32,

        its own output, (rows, columns, d), and an example of what a block returns.
        """
        architecture = self.loaded.architecture
        seen: dict[str, Any] = {}
        hidden = outputs = torch.empty(0)

        def see_mlp(module: Any, entered: Tensor, output: Any) -> None:
            # A copy, because some parallel blocks add the attention's output to this very tensor.
            seen["mlp"] = first(output).clone()

        def see_block(module: Any, entered: Tensor, output: Any) -> None:
            seen["block"], seen["example"] = first(output), output

        for group in self.groups(range(len(self.rows))):
            rows = torch.tensor(group)
            ids, options = self._input(kept, rows)
            with ExitStack() as stack:
                stack.enter_context(tapped(architecture.mlp(self.layer), see_mlp))
                stack.enter_context(tapped(architecture.block(self.layer), see_block, stop=True))
                run(self.loaded.model, ids, **options)
            part = seen["block"]
            if not len(hidden):
                hidden = part.new_zeros(len(self.rows), max(self.width), part.shape[-1])
                outputs = part.new_zeros(len(self.rows), part.shape[-1], dtype=torch.float32)
            hidden[_on(part, rows)[0], : part.shape[1]] = part
            # Some families flatten (rows, tokens) inside their MLP; the hidden states have the same order either way.
            at_lookup = seen["mlp"].reshape(part.shape)[_on(part, torch.arange(len(rows)), self._lookup[rows])]
            outputs[_on(outputs, rows)] = at_lookup.float() * architecture.residual_scale(self.layer)
        return outputs, hidden, seen["example"]


def _on(tensor: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
    """Return indices on a tensor's device."""
    return tuple(index.to(tensor.device) for index in indices)
