"""Attention of few new tokens to few past ones, by plain matrix products.

The kernels of ``scaled_dot_product_attention`` are made for long texts; some of them plan anew for every new shape, and
with a mask the heads of keys and values are repeated for each head of queries. Target optimisation has hundreds of
texts of some ten tokens, so the products here keep one copy of keys and values: the queries of all heads that share
them are the rows of one product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from editcli.models.forward import run
from editcli.models.frozen_cache import PAST, FrozenCache
from editcli.models.kv_cache import cache_options, supports_kv_cache

NAME = "editcli_grouped"
"""The name under which transformers finds the function."""
REPLACED = "sdpa"
"""The implementation that it stands in for, with the same arguments and masks."""
TRIAL = 8
"""Tokens of the two texts on which a model is tried."""


@contextmanager
def grouped_attention(model: nn.Module) -> Iterator[bool]:
    """Let ``model`` use :func:`grouped`, where it uses torch's own attention; yields whether it does.

    The choice is the model's: other models of the process keep theirs.
    """
    config: Any = model.config if isinstance(model, PreTrainedModel) else None
    if config is None or getattr(config, "_attn_implementation", None) != REPLACED:
        yield False
        return
    AttentionInterface.register(NAME, grouped)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[REPLACED])
    # The choice reaches the parts of a model as well, such as a tower for images, which may have made another one.
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    before = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    config._attn_implementation = NAME
    try:
        yield True
    finally:
        config._attn_implementation = {"": REPLACED, **before}


@torch.no_grad()
def grouped_agrees(model: nn.Module, device: torch.device | str, *, apart: bool = False) -> bool:
    """Tell whether ``model`` computes the same with :func:`grouped`: some families choose their attention elsewhere.

    With ``apart`` past keys and values stay where they lie, which a family that changes them on the way does not find.
    """
    embeddings: Any = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if embeddings is None or (apart and not supports_kv_cache(model, device)):
        return False
    ids = ((torch.arange(2 * TRIAL) + 3) % len(embeddings.weight)).view(2, TRIAL).to(device)
    mask, half = torch.ones(2, TRIAL, dtype=torch.long), TRIAL // 2
    # The second text begins later, behind padding.
    mask[1, : half // 2] = 0
    options = _without_cache(mask, device)
    plain = run(model, ids, **options).logits
    with grouped_attention(model) as used:
        if not used:
            return False
        try:
            close = _second_half(model, ids, mask, device) if apart else run(model, ids, **options).logits
        # A family's own code may know the names of transformers only.
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
            return False
    seen = mask[:, -close.shape[1] :].bool().to(close.device)
    plain, close = (logits[:, -close.shape[1] :][seen].float() for logits in (plain, close))
    exact = next(model.parameters()).dtype == torch.float32
    return bool((plain - close).abs().max() <= (1e-4 if exact else 5e-2) * plain.abs().max())


def _without_cache(mask: Tensor, device: torch.device | str) -> dict[str, Any]:
    places = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return {"attention_mask": mask.to(device), "position_ids": places.to(device)}


def _second_half(model: nn.Module, ids: Tensor, mask: Tensor, device: torch.device | str) -> Tensor:
    """Return the logits of the second half of two texts, behind the keys and values of the first."""
    half, cache = ids.shape[1] // 2, DynamicCache()
    run(model, ids[:, :half], **cache_options(model, mask[:, :half], half, cache, device))
    layers: Any = cache.layers
    past = FrozenCache([(layer.keys, layer.values) for layer in layers], apart=True)
    return run(model, ids[:, half:], **cache_options(model, mask, half, past, device)).logits


def grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Return softmax(Q K^T scaling + mask) V, (rows, tokens, heads, width), as transformers' own functions do.

    ``query`` is (rows, heads, tokens, width), ``key`` and ``value`` (rows, key heads, past + tokens, width). The mask
    is True where a token is seen, or is added to the products; without one a causal module sees no later token.
    """
    rows, heads, tokens, width = query.shape
    if dropout or heads % key.shape[1] or more.get("position_bias") is not None:
        plain = ALL_ATTENTION_FUNCTIONS[REPLACED]
        return plain(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **more
        )
    key_heads, past = key.shape[1], getattr(key, PAST, None)
    shared = (rows, key_heads, heads // key_heads * tokens)
    # Scaled before the products, which are many times as many.
    queries = (query * (width**-0.5 if scaling is None else scaling)).reshape(*shared, width)
    products = torch.matmul(queries, key.transpose(-1, -2))
    if past is not None:
        products = torch.cat([torch.matmul(queries, past.transpose(-1, -2)), products], dim=-1)
    columns = products.shape[-1]
    scores = products.view(rows, key_heads, heads // key_heads, tokens, columns)
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and tokens > 1:
            attention_mask = torch.ones(tokens, columns, dtype=torch.bool, device=query.device).tril()[None, None]
    if attention_mask is not None:
        scores = _masked(scores, attention_mask[..., :columns])
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype).view(*shared, columns)
    if past is None:
        mixed = torch.matmul(weights, value)
    else:
        split = past.shape[2]
        mixed = torch.matmul(weights[..., :split], getattr(value, PAST)) + torch.matmul(weights[..., split:], value)
    return mixed.view(rows, heads, tokens, value.shape[-1]).transpose(1, 2).contiguous(), None


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Apply a mask (rows or 1, heads or 1, tokens, columns) to scores (rows, key heads, queries, tokens, columns)."""
    per_head = mask.shape[1] > 1
    mask = mask.reshape(len(mask), *scores.shape[1:]) if per_head else mask[:, :, None]
    if mask.dtype != torch.bool:
        return scores + mask
    # A padded token may see nothing; an infinite score would make it NaN.
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
