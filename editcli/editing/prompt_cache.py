"""Keys and values of the tokens before each lookup token, computed once for all texts that share them.

All edits of a batch follow the same few prefixes, and many follow the same words of a template. Such common beginnings
are the roots of a short tree: the texts of a level continue from the keys and values of their parents.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from editcli.models.forward import batches, head_only_at, positions, run
from editcli.models.kv_cache import cache_options
from editcli.models.loading import LoadedModel

Layer = tuple[Tensor, Tensor]
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer, (rows, heads, columns, head width); columns with mask 0 hold nothing."""

    layers: tuple[Layer, ...]
    mask: Tensor
    """(rows, columns) int64 on the CPU."""

    def select(self, rows: Tensor, *, size: Callable[[int], int]) -> KVCache:
        """Return some of the rows, without the columns that none of them uses, padded on the left to a ``size``."""
        mask = self.mask[rows]
        used = mask.any(dim=0).nonzero().flatten()
        mask, empty = mask[:, used], size(len(used)) - len(used)
        layers = tuple((_cut(k, rows, used, empty), _cut(v, rows, used, empty)) for k, v in self.layers)
        return KVCache(layers, pad(mask, (empty, 0)))

    def above(self, layer: int) -> KVCache:
        """Return the cache without the content of the layers up to ``layer``; their number of columns stays."""
        shells = (keys.new_zeros(1).expand(len(keys), 1, keys.shape[2], 1) for keys, _ in self.layers[: layer + 1])
        return KVCache((*((shell, shell) for shell in shells), *self.layers[layer + 1 :]), self.mask)


def encode(loaded: LoadedModel, texts: Sequence[Ids], stems: Sequence[Sequence[Hashable]], *, budget: int) -> KVCache:
    """Run ``texts`` through the model, ``budget`` tokens at a time, and return their keys and values.

    ``stems`` name for each text, from the widest level to the narrowest, the group that may share its beginning.
    """
    cache, parent = KVCache((), torch.zeros(1, 0, dtype=torch.long)), [0] * len(texts)
    done = [0] * len(texts)
    for level in range(len(stems[0])):
        nodes = _groups([stem[level] for stem in stems])
        ends = [_common(texts, members, done) for members in nodes]
        segments = [texts[members[0]][done[members[0]] : end] for members, end in zip(nodes, ends, strict=True)]
        cache = _extend(loaded, cache, [parent[members[0]] for members in nodes], segments, budget)
        for node, (members, end) in enumerate(zip(nodes, ends, strict=True)):
            for member in members:
                parent[member], done[member] = node, end
    return _extend(loaded, cache, parent, [text[start:] for text, start in zip(texts, done, strict=True)], budget)


def _groups(names: Sequence[Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name, []).append(index)
    return list(groups.values())


def _common(texts: Sequence[Ids], members: Sequence[int], done: Sequence[int]) -> int:
    """Return how many leading tokens the members share; a lone one shares nothing beyond ``done``."""
    if len(members) == 1:
        return done[members[0]]
    least, greatest = min(texts[member] for member in members), max(texts[member] for member in members)
    # The common beginning of the first and the last in order is common to all between them.
    differing = (index for index, (a, b) in enumerate(zip(least, greatest, strict=False)) if a != b)
    return next(differing, min(len(least), len(greatest)))


@torch.no_grad()
def _extend(
    loaded: LoadedModel, cache: KVCache, parent: Sequence[int], segments: Sequence[Ids], budget: int
) -> KVCache:
    """Return the keys and values of each segment after its parent's; segments of a level end in the same column."""
    parents, start, width = torch.tensor(parent), cache.mask.shape[1], max(map(len, segments))
    added = right_aligned(segments, 1)[1]
    mask = torch.cat([cache.mask[parents], added], dim=1)
    if not width:
        everything = torch.arange(start)
        return KVCache(
            tuple((_cut(k, parents, everything, 0), _cut(v, parents, everything, 0)) for k, v in cache.layers), mask
        )
    filled = [index for index, segment in enumerate(segments) if segment]
    pool: list[Layer] = []
    for group in batches([len(segments[index]) for index in filled], budget=budget):
        rows = torch.tensor([filled[index] for index in group])
        grown = _grow(loaded, cache, parents[rows], [segments[index] for index in rows.tolist()])
        pool = pool or [_room(layer, len(segments), start + width) for layer in grown]
        for into, new in zip(pool, grown, strict=True):
            for whole, part in zip(into, new, strict=True):
                whole[rows.to(whole.device), :, 2 * start + width - part.shape[2] :] = part[:, :, start:]
    for into, old in zip(pool, cache.layers, strict=False):
        for whole, part in zip(into, old, strict=True):
            whole[:, :, :start] = part[parents.to(part.device)]
    for whole in (tensor for layer in pool for tensor in layer):
        # A fully masked token may have left NaN in the padding.
        whole.masked_fill_(mask.to(whole.device)[:, None, :, None] == 0, 0)
    return KVCache(tuple(pool), mask)


def _grow(loaded: LoadedModel, cache: KVCache, parents: Tensor, segments: Sequence[Ids]) -> list[Layer]:
    """Return keys and values of the parents' columns and of the segments, which are padded on the left."""
    ids, added = right_aligned(segments, loaded.tokens.pad_id)
    grown = DynamicCache()
    for layer, (keys, values) in enumerate(cache.layers):
        grown.update(keys[parents.to(keys.device)], values[parents.to(values.device)], layer)
    device = loaded.input_device
    options = cache_options(loaded.model, torch.cat([cache.mask[parents], added], dim=1), ids.shape[1], grown, device)
    with head_only_at(loaded.architecture.head, *positions([(0, 0)], device)):
        run(loaded.model, ids.to(device), **options)
    layers: Any = grown.layers
    return [(layer.keys, layer.values) for layer in layers]


def right_aligned(segments: Sequence[Ids], pad: int) -> tuple[Tensor, Tensor]:
    """Return token ids padded on the left and their mask, (rows, width) int64 each on the CPU."""
    width = max(map(len, segments))
    ids = torch.tensor([[pad] * (width - len(segment)) + list(segment) for segment in segments], dtype=torch.long)
    mask = torch.tensor([[0] * (width - len(segment)) + [1] * len(segment) for segment in segments], dtype=torch.long)
    return ids.reshape(len(segments), width), mask.reshape(len(segments), width)


def _room(layer: Layer, rows: int, columns: int) -> Layer:
    keys, values = (t.new_zeros(rows, t.shape[1], columns, t.shape[3]) for t in layer)
    return keys, values


def _cut(tensor: Tensor, rows: Tensor, columns: Tensor, empty: int) -> Tensor:
    """Return some rows and columns, (rows, heads, columns, width), behind ``empty`` columns of zeros."""
    cut = tensor[rows.to(tensor.device)][:, :, columns.to(tensor.device)]
    return pad(cut, (0, 0, empty, 0)) if empty else cut
