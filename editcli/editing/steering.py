"""The texts of a batch, laid out so that only what an offset can change is computed again.

Nothing below the last edited layer changes while its output is steered, and nothing before the lookup token. So the
stored output of that layer stands in for everything below, and, with ``cached``, the keys and values that the tokens
before the lookup token left in every layer's attention cache stand in for those tokens. Neither changes the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from editcli.models.forward import first, head_only_at, positions, replaced_forward, run, tapped, with_first
from editcli.models.loading import LoadedModel
from editcli.models.tokens import Encoded


@dataclass(frozen=True, slots=True)
class Row:
    """One text of one edit: ``edit`` is its index in the batch, ``weight`` the share of a target token in its loss."""

    text: Encoded
    edit: int
    weight: float
    is_essence: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows as tensors. Columns count from the first one that is computed again; ``past`` holds what is before it."""

    ids: Tensor
    """(rows, columns)"""
    hidden: Tensor
    """(rows, columns, d): the last edited layer's output."""
    lookup: Tensor
    """(rows,) column of the lookup token."""
    mask: Tensor | None
    """(rows, past + columns), 0 where padding stands before a text; None where nothing does."""
    places: Tensor | None
    """(rows, columns) position ids; None for the default."""
    past: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of each layer before the first column, (rows, heads, past, head width)."""

    def select(self, rows: Tensor, width: int) -> Layout:
        """Return some of the rows, cut to ``width`` columns."""
        past = 0 if not self.past else self.past[0][0].shape[-2]
        return Layout(
            ids=self.ids[rows.to(self.ids.device), :width],
            hidden=self.hidden[rows.to(self.hidden.device), :width],
            lookup=self.lookup[rows.to(self.lookup.device)],
            mask=None if self.mask is None else self.mask[rows.to(self.mask.device), : past + width],
            places=None if self.places is None else self.places[rows.to(self.places.device), :width],
            past=tuple((k[rows.to(k.device)], v[rows.to(v.device)]) for k, v in self.past),
        )


@dataclass(frozen=True, slots=True)
class Observed:
    """What one pass over the texts showed."""

    layout: Layout
    outputs: Tensor
    """(rows, d) float32: the last edited layer's MLP output at each row's lookup token, as it joins the stream."""
    example: Any
    """What a block returns, to be imitated."""


class Steering:
    """Runs the rows of one micro-batch with an offset added at their lookup tokens."""

    def __init__(self, loaded: LoadedModel, rows: Sequence[Row], layer: int, *, cached: bool):
        self.loaded, self.rows, self.layer = loaded, tuple(rows), layer
        self.cached = cached and self._cacheable()
        observed = self._observe()
        self.layout, self.outputs, self._example = observed.layout, observed.outputs, observed.example

    def columns(self, row: Row, places: Sequence[int]) -> list[int]:
        """Return the layout's columns of token positions of a row."""
        return [place - row.text.lookup for place in places] if self.cached else list(places)

    def width(self, row: Row) -> int:
        """Return how many columns a row needs."""
        return len(row.text.ids) - (row.text.lookup if self.cached else 0)

    def at_lookup(self) -> Tensor:
        """Return h at each row's lookup token, (rows, d) float32."""
        everywhere = torch.arange(len(self.rows), device=self.layout.hidden.device)
        return self.layout.hidden[everywhere, self.layout.lookup.to(everywhere)].float()

    def logits(self, layout: Layout, shift: Tensor, head: tuple[Tensor, Tensor]) -> Tensor:
        """Return float32 logits at ``head`` (rows, columns) with ``shift`` (rows, d) added at the lookup tokens."""
        architecture = self.loaded.architecture
        hidden = layout.hidden.clone()
        where = (torch.arange(len(hidden), device=hidden.device), layout.lookup.to(hidden.device))
        hidden[where] = (hidden[where].float() + shift).to(hidden.dtype)
        steered = with_first(self._example, hidden)
        with ExitStack() as stack:
            for layer in range(self.layer):
                stack.enter_context(replaced_forward(architecture.block(layer), self._pass_through))
            stack.enter_context(replaced_forward(architecture.block(self.layer), lambda *a, **k: steered))
            stack.enter_context(head_only_at(architecture.head, *head))
            return self._run(layout).logits[0].float()

    def _run(self, layout: Layout) -> Any:
        if not self.cached:
            return run(self.loaded.model, layout.ids)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(layout.past):
            cache.update(keys, values, layer)
        return run(
            self.loaded.model,
            layout.ids,
            attention_mask=layout.mask,
            position_ids=layout.places,
            past_key_values=cache,
            use_cache=True,
        )

    def _pass_through(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stand in for a lower block: nothing that it computes is used."""
        return with_first(self._example, hidden)

    def _cacheable(self) -> bool:
        """Tell whether the attention cache can stand in for the tokens before the lookup tokens."""
        config = self.loaded.model.config.get_text_config()
        texts = [row.text for row in self.rows]
        length = max(text.lookup for text in texts) + max(len(text.ids) - text.lookup for text in texts)
        window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
        # A window shorter than the texts hides old tokens from new ones by a rule that differs between cache classes.
        return min(text.lookup for text in texts) >= 1 and (window is None or length < window)

    @torch.no_grad()
    def _observe(self) -> Observed:
        """Run every text once; keep the last edited layer's output and, when cached, every layer's keys and values."""
        architecture, seen = self.loaded.architecture, {}

        def see_block(module: Any, entered: Tensor, output: Any) -> None:
            seen["block"], seen["example"] = first(output), output

        def see_mlp(module: Any, entered: Tensor, output: Any) -> None:
            # A copy, because some parallel blocks add the attention's output to this very tensor.
            seen["mlp"] = first(output).clone()

        with ExitStack() as stack:
            stack.enter_context(tapped(architecture.mlp(self.layer), see_mlp))
            # Without a cache nothing above the last edited layer is of interest.
            stack.enter_context(tapped(architecture.block(self.layer), see_block, stop=not self.cached))
            layout = self._cached_pass(stack) if self.cached else self._plain_pass()
        hidden, skipped = seen["block"], layout.ids.shape[1] - layout.hidden.shape[1]
        # Some families flatten (rows, tokens) inside their MLP; the hidden states have the same order either way.
        outputs = seen["mlp"].reshape(hidden.shape)[:, skipped:]
        everywhere = torch.arange(len(hidden), device=hidden.device)
        scale = architecture.residual_scale(self.layer)
        return Observed(
            layout=replace(layout, ids=layout.ids[:, skipped:], hidden=hidden[:, skipped:]),
            outputs=outputs[everywhere, layout.lookup.to(hidden.device)].float() * scale,
            example=seen["example"],
        )

    def _plain_pass(self) -> Layout:
        device = self.loaded.input_device
        ids = self.loaded.tokens.pad([row.text for row in self.rows], device)
        lookup = torch.tensor([row.text.lookup for row in self.rows], device=device)
        run(self.loaded.model, ids)
        return Layout(ids, ids, lookup, None, None, ())

    def _cached_pass(self, stack: ExitStack) -> Layout:
        """Align the rows at their lookup tokens, with padding on both sides, and keep the cache before that column."""
        device, texts = self.loaded.input_device, [row.text for row in self.rows]
        past, width = max(t.lookup for t in texts), max(len(t.ids) - t.lookup for t in texts)
        ids = torch.full((len(texts), past + width), self.loaded.tokens.pad_id)
        mask = torch.ones_like(ids)
        for row, text in enumerate(texts):
            start = past - text.lookup
            ids[row, start : start + len(text.ids)] = torch.tensor(text.ids)
            mask[row, :start] = 0
        places = (mask.cumsum(dim=1) - 1).clamp_min(0).to(device)
        ids, mask = ids.to(device), mask.to(device)
        stack.enter_context(head_only_at(self.loaded.architecture.head, *positions([(0, past)], device)))
        cache = DynamicCache()
        options = {"attention_mask": mask, "position_ids": places, "past_key_values": cache, "use_cache": True}
        run(self.loaded.model, ids, **options)
        # Copies, so that the part of the cache behind the lookup tokens can be freed.
        layers: Any = cache.layers
        kept = tuple((item.keys[..., :past, :].clone(), item.values[..., :past, :].clone()) for item in layers)
        lookup = torch.zeros(len(texts), dtype=torch.long, device=device)
        return Layout(ids, ids[:, past:], lookup, mask, places[:, past:], kept)
