"""Let a model continue texts token by token, going on from the keys and values of what it has read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from editcli.models.kv_cache import cache_of, with_cache
from editcli.models.loading import LoadedModel

Choose = Callable[[Tensor], Tensor]
"""Turns logits (rows, vocabulary), in the model's dtype and on its device, into the next token of each row, (rows,)."""


@torch.no_grad()
def continue_rows(loaded: LoadedModel, begin: Tensor, choose: Choose, *, count: int, end: int | None = None) -> Tensor:
    """Return up to ``count`` token ids behind each row of ``begin``, (rows, columns), as ``choose`` picks them.

    ``begin`` (rows, length) holds texts of one length, so nothing is padded and every family's own positions are right.
    Writing stops early once every row has chosen ``end``; what stands behind a row's ``end`` means nothing. The result
    is int64 on the CPU.
    """
    step = begin.to(loaded.input_device)
    going = torch.ones(len(begin), dtype=torch.bool)
    written: list[Tensor] = []
    cache: Any = None
    for _ in range(count):
        output = loaded.model(input_ids=step, **with_cache(loaded.model, cache))
        cache = cache_of(output)
        chosen = choose(output.logits[:, -1])
        written.append(chosen.cpu())
        going &= written[-1] != end
        if not going.any():
            break
        column = chosen[:, None].to(loaded.input_device)
        # A model without a cache reads its text again from the first token.
        step = torch.cat([step, column], dim=1) if cache is None else column
    return torch.stack(written, dim=1) if written else torch.empty(len(begin), 0, dtype=torch.long)
