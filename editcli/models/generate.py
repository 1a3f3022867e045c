"""Continue texts token by token, from the cached keys and values of earlier tokens: the one text generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from editcli.models.kv_cache import cache_of, with_cache
from editcli.models.loading import LoadedModel

Choose = Callable[[Tensor], Tensor]
"""Picks the next token of each row, (rows,), from logits (rows, vocabulary) in the model's dtype and on its device."""


@torch.no_grad()
def continue_rows(loaded: LoadedModel, begin: Tensor, choose: Choose, *, count: int, end: int | None = None) -> Tensor:
    """Return up to ``count`` token ids after each row of ``begin``, (rows, columns) int64 on the CPU.

    ``choose`` picks them. ``begin`` (rows, length) holds texts of one length, so nothing is padded and the positions of
    every family are right. Generation stops early once every row has an ``end``; ignore the tokens after it.
    """
    step = begin.to(loaded.input_device)
    unfinished = torch.ones(len(begin), dtype=torch.bool)
    written: list[Tensor] = []
    cache: Any = None
    for _ in range(count):
        output = loaded.model(input_ids=step, **with_cache(loaded.model, cache))
        cache = cache_of(output)
        chosen = choose(output.logits[:, -1])
        written.append(chosen.cpu())
        unfinished &= written[-1] != end
        if not unfinished.any():
            break
        column = chosen[:, None].to(loaded.input_device)
        # A model without a cache reads its text again from the first token.
        step = torch.cat([step, column], dim=1) if cache is None else column
    return torch.stack(written, dim=1) if written else torch.empty(len(begin), 0, dtype=torch.long)
