"""The texts of a batch, laid out so that only the activations that an offset can change are computed again.

An offset on the output of the last edited layer changes nothing below it, and nothing before the lookup token. So the
stored output of that layer replaces everything below, and, with ``cached``, the keys and values of the tokens before
the lookup token replace those tokens. Neither changes the result. Texts are computed in chunks of about equal length,
so that little of the work is padding.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from editcli.editing.layout import Group, Layout, layout_for
from editcli.editing.prompt_cache import KVCache, encode
from editcli.models.blocks import Blocks, Call
from editcli.models.forward import first, hooked, run
from editcli.models.frozen_cache import FrozenCache
from editcli.models.kv_cache import cache_options
from editcli.models.loading import LoadedModel
from editcli.models.tokens import Encoded

CACHE_BYTES = 24 << 20
"""Activations of one chunk in one block on a CPU: they fit its caches, with enough rows for fast products."""


@dataclass(frozen=True, slots=True)
class Row:
    """One text of one edit: ``edit`` is its index in the batch, ``weight`` the factor of each position in its loss."""

    text: Encoded
    edit: int
    weight: float
    is_essence: bool
    stems: tuple[Hashable, ...]
    """Names of the groups of texts that it may share a beginning with, the widest first."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tensors of a group of rows, without the tokens that are computed once, and the model's calls of its blocks.

    All of them lie on the model's devices and are padded to the group's rows and columns; the rows that pad it repeat
    its first.
    """

    ids: Tensor
    """(rows, columns)"""
    hidden: Tensor
    """(rows, columns, d): the last edited layer's output."""
    lookup: Tensor
    """(rows,) the lookup token of each row, among all rows * columns tokens."""
    options: dict[str, Any]
    """The model's arguments besides the ids."""
    calls: tuple[Call, ...]


class Steering:
    """Runs the rows of one micro-batch with an offset added at their lookup tokens."""

    def __init__(
        self,
        loaded: LoadedModel,
        rows: Sequence[Row],
        layer: int,
        *,
        cached: bool,
        budget: int,
        layout: Layout | None = None,
        apart: bool = False,
    ):
        self.loaded, self.rows, self.layer, self.budget = loaded, tuple(rows), layer, budget
        self.apart = apart
        """Whether the model's attention reads past and new keys where they lie."""
        self.layout = layout or layout_for(torch.device(loaded.input_device).type)
        self.allowance = self.layout.allowance(self._block_size())
        """Tokens of padding that cost as much as one more call of a block."""
        self._from_lookup = cached and self._cacheable()
        cache = encode(loaded, self._begun(), self._stems(), budget=self._tokens())
        self.width = [len(row.text.ids) - self._start(row) for row in rows]
        self._lookup = torch.tensor([row.text.lookup - self._start(row) for row in rows])
        self.outputs, self._hidden, example = self._observe(cache)
        self._cache = cache.above(layer)
        self._blocks = Blocks(loaded, layer, example)
        self.whole = False

    def at_lookup(self) -> Tensor:
        """Return h at each row's lookup token, (rows, d) float32."""
        everywhere = torch.arange(len(self.rows))
        return self._hidden[_on(self._hidden, everywhere, self._lookup)].float()

    def columns(self, row: int, positions: Sequence[int]) -> list[int]:
        """Return a chunk's columns of token positions of a row."""
        return [position - self._start(self.rows[row]) for position in positions]

    def groups(self, rows: Sequence[int]) -> list[Group]:
        """Return the groups in which ``rows`` are computed, the widest first; the same for the same rows."""
        ordered = sorted(rows, key=lambda row: (self._start(self.rows[row]), row))
        widths = [self.width[row] for row in ordered]
        groups = self.layout.groups(widths, allowance=self.allowance, most=self._tokens())
        return [
            replace(
                group,
                members=tuple(ordered[member] for member in group.members),
                columns=self._in_context(group.columns, least=max(widths[member] for member in group.members)),
            )
            for group in groups
        ]

    def chunk(self, group: Group) -> Chunk:
        """Return the tensors of a group."""
        index = _padded(group)
        ids, options = self._input(self._cache, group)
        hidden = self._hidden[_on(self._hidden, index)][:, : group.columns]
        lookup = torch.arange(group.rows) * group.columns + self._lookup[index]
        return Chunk(ids, hidden, lookup.to(hidden.device), options, self._blocks.record(ids, options))

    def logits(self, chunk: Chunk, shift: Tensor, where: tuple[Tensor, Tensor]) -> Tensor:
        """Return float32 logits at ``where`` (rows, columns) with ``shift`` (rows, d) added at the lookup tokens."""
        flat = chunk.hidden.flatten(0, 1)
        steered = (flat[chunk.lookup].float() + shift.to(flat.device)).to(flat.dtype)
        hidden = flat.index_copy(0, chunk.lookup, steered).view_as(chunk.hidden)
        if self.whole:
            return self._blocks.whole_logits(chunk.ids, chunk.options, hidden, where)
        return self._blocks.logits(chunk.calls, hidden, where)

    @torch.no_grad()
    def check(self, chunk: Chunk, where: tuple[Tensor, Tensor]) -> None:
        """Use the model's own forward pass if it does more between the blocks than call one after the other."""
        whole = self._blocks.whole_logits(chunk.ids, chunk.options, chunk.hidden, where)
        alone = self._blocks.logits(chunk.calls, chunk.hidden, where)
        exact = chunk.hidden.dtype == torch.float32
        self.whole = not bool((whole - alone).abs().max() <= (1e-3 if exact else 5e-2) * whole.abs().max())

    def _begun(self) -> list[tuple[int, ...]]:
        """Return the tokens of each row that are computed once."""
        return [row.text.ids[: self._start(row)] for row in self.rows]

    def _stems(self) -> list[tuple[Hashable, ...]]:
        """Return the names of shared beginnings, or none where sharing saves less work than its passes cost."""
        levels, tokens = len(self.rows[0].stems), sum(map(len, self._begun()))
        return [row.stems if tokens > levels * self.allowance else () for row in self.rows]

    def _start(self, row: Row) -> int:
        """Return the first token position that is computed again."""
        return row.text.lookup if self._from_lookup else 0

    def _cacheable(self) -> bool:
        """Tell whether keys and values can replace the tokens before the lookup tokens."""
        config = self.loaded.model.config.get_text_config()
        window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
        # A window shorter than the texts hides old tokens from new ones by a rule that differs between cache classes.
        # Each level of shared beginnings is padded on its own.
        levels = len(self.rows[0].stems) + 1
        longest = max(row.text.lookup for row in self.rows) * levels + max(len(row.text.ids) for row in self.rows)
        return (window is None or longest < window) and self.loaded.supports_kv_cache

    def _past(self, used: int, columns: int) -> int:
        """Return the padded number of ``used`` past columns before ``columns`` new ones."""
        return self._in_context(self.layout.past(used) + columns, least=used + columns) - columns

    def _in_context(self, columns: int, *, least: int) -> int:
        """Return the padded ``columns``, cut so that padding needs no position beyond the model's context."""
        context = self.loaded.tokens.max_length
        return columns if context is None else max(least, min(columns, context))

    def _block_size(self) -> int:
        block = self.loaded.architecture.block(self.layer)
        return sum(parameter.numel() for parameter in block.parameters())

    def _tokens(self) -> int:
        """Return the most tokens of a chunk: a CPU is fastest within its caches, an accelerator with whole batches."""
        if torch.device(self.loaded.input_device).type != "cpu":
            return self.budget
        widest = max(self.loaded.architecture.shape(self.layer))
        return min(self.budget, max(128, CACHE_BYTES // (24 * widest)))

    def _input(self, cache: KVCache, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """Return the ids that are computed again, padded on the right, and the model's other arguments."""
        device, width, rows = self.loaded.input_device, group.columns, _padded(group)
        texts = [self.rows[row].text.ids[self._start(self.rows[row]) :] for row in rows.tolist()]
        # A causal model cannot see later tokens, so padding on the right needs no mask.
        ids = torch.tensor([[*text, *[text[-1]] * (width - len(text))] for text in texts])
        real = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
        past = cache.select(rows, size=lambda used: self._past(used, width))
        if not past.mask.shape[1]:
            return ids.to(device), {}
        # With a cache it is masked all the same, so that it gets no position beyond the model's context.
        mask = torch.cat([past.mask, real], dim=1)
        stored = FrozenCache(past.layers, apart=self.apart)
        return ids.to(device), cache_options(self.loaded.model, mask, width, stored, device)

    @torch.no_grad()
    def _observe(self, cache: KVCache) -> tuple[Tensor, Tensor, Any]:
        """Return the last edited layer's outputs: its MLP's, its block's, and one raw return value of the block.

        The MLP's is (rows, d) float32 at each lookup token, as it joins the stream; the block's (rows, columns, d).
        """
        architecture = self.loaded.architecture
        seen: dict[str, Any] = {}
        hidden = outputs = torch.empty(0)

        def record_mlp(module: Any, entered: Tensor, output: Any) -> None:
            # A copy, because some parallel blocks add the attention's output to this very tensor.
            seen["mlp"] = first(output).clone()

        def record_block(module: Any, entered: Tensor, output: Any) -> None:
            seen["block"], seen["example"] = first(output), output

        for group in (groups := self.groups(range(len(self.rows)))):
            rows = torch.tensor(group.members)
            ids, options = self._input(cache, group)
            with ExitStack() as stack:
                stack.enter_context(hooked(architecture.mlp(self.layer), record_mlp))
                stack.enter_context(hooked(architecture.block(self.layer), record_block, stop=True))
                run(self.loaded.model, ids, **options)
            part = seen["block"]
            if not len(hidden):
                widest = max(group.columns for group in groups)
                hidden = part.new_zeros(len(self.rows), widest, part.shape[-1])
                outputs = part.new_zeros(len(self.rows), part.shape[-1], dtype=torch.float32)
            hidden[_on(part, rows)[0], : part.shape[1]] = part[: len(rows)]
            # Some families flatten (rows, tokens) inside their MLP; the hidden states have the same order either way.
            at_lookup = seen["mlp"].reshape(part.shape)[_on(part, torch.arange(len(rows)), self._lookup[rows])]
            outputs[_on(outputs, rows)] = at_lookup.float() * architecture.residual_scale(self.layer)
        return outputs, hidden, seen["example"]


def _padded(group: Group) -> Tensor:
    """Return the rows of a group with those that pad it, (rows,)."""
    return torch.tensor([*group.members, *[group.members[0]] * (group.rows - len(group.members))])


def _on(tensor: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
    """Return indices on a tensor's device."""
    return tuple(index.to(tensor.device) for index in indices)
