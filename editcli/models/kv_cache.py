"""How a model continues from the keys and values of earlier tokens, and whether they are all that it needs.

A model that also carries convolutions or recurrent states along, or counts the columns of a padded cache as distances,
has to read its texts from the first token. No list of families names them: a few tokens are tried.
"""

from __future__ import annotations

import inspect
from functools import cache as remembered
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from editcli.models.forward import run

SPELLINGS = ("cache", "past_key_values")
"""Names of the cache argument in families and versions of transformers; 5.24 renamed the second."""

HALF = 12
"""Columns of each half of the two texts of the trial; the shorter text has ``FEW`` tokens in each and a gap behind."""
FEW = 2


@remembered
def cache_argument(model_class: Any) -> str | None:
    """Return the argument of a model class's forward that takes keys and values; None where it takes none.

    The signature says it for every version of transformers, so no version is compared.
    """
    parameters = inspect.signature(model_class.forward).parameters
    return next((name for name in SPELLINGS if name in parameters), None)


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the arguments that make ``model`` continue from ``cache`` and extend it; None starts an empty one.

    A model whose forward takes no cache gets none: it has to read each text from its first token.
    """
    name = cache_argument(type(model))
    return {"use_cache": False} if name is None else {name: cache, "use_cache": True}


def cache_of(output: Any) -> Any:
    """Return the keys and values in a model's output; None where it has none."""
    # Newer versions warn of a look-up by an old name, so only the names that the output lists are looked up.
    listed = set(output.keys())
    return next((output[name] for name in SPELLINGS if name in listed), None)


def cache_options(
    model: Any, mask: Tensor, width: int, cache: DynamicCache, device: torch.device | str
) -> dict[str, Any]:
    """Return the arguments that continue from ``cache``; ``mask`` (rows, past + width) is 0 at padding."""
    position_ids = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -width:]
    return {"attention_mask": mask.to(device), "position_ids": position_ids.to(device), **with_cache(model, cache)}


@torch.no_grad()
def supports_kv_cache(model: Any, device: torch.device | str) -> bool:
    """Tell whether ``model`` continues from cached keys and values of padded texts as if it had read the texts."""
    if cache_argument(type(model)) is None:
        return False
    size = len(model.get_input_embeddings().weight)
    long = (torch.arange(2 * HALF) + 3) % size
    first, second = long.reshape(2, HALF)
    rows, real = torch.stack([long, long]), torch.ones(2, 2 * HALF, dtype=torch.long)
    real[1].view(2, HALF)[:, FEW:] = 0
    short = torch.cat([first[:FEW], second[:FEW]])
    plain = [run(model, text[None].to(device)).logits[0, -1].float() for text in (long, short)]
    cache = DynamicCache()
    try:
        run(model, rows[:, :HALF].to(device), **cache_options(model, real[:, :HALF], HALF, cache, device))
        logits = run(model, rows[:, HALF:].to(device), **cache_options(model, real, HALF, cache, device)).logits
    # Families that cannot use such a cache raise different errors; they run without one.
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        return False
    cached = torch.stack([logits[0, -1], logits[1, FEW - 1]]).float()
    reference = torch.stack(plain).to(cached.device)
    exact = logits.dtype == torch.float32
    return bool((cached - reference).abs().max() <= (1e-3 if exact else 5e-2) * reference.abs().max())
