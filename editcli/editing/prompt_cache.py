"""What attention keeps of the tokens before each lookup token: computed once, and once for all texts that share them.

All edits of a batch stand behind the same few prefixes, and many behind the same words of a template. Such common
beginnings are the roots of a short tree: a level's texts go on from the keys and values that their parents left.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from editcli.models.forward import batches, head_only_at, positions, run
from editcli.models.kv_cache import cache_options
from editcli.models.loading import LoadedModel

Layer = tuple[Tensor, Tensor]
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """Keys and values of every layer, (rows, heads, columns, head width); columns with mask 0 hold nothing."""

    layers: tuple[Layer, ...]
    mask: Tensor
    """(rows, columns) int64 on the CPU."""

    def select(self, rows: Tensor) -> Kept:
        """Return some of the rows, without the columns that none of them uses."""
        mask = self.mask[rows]
        used = mask.any(dim=0).nonzero().flatten()
        return Kept(tuple((_cut(k, rows, used), _cut(v, rows, used)) for k, v in self.layers), mask[:, used])

    def above(self, layer: int) -> Kept:
        """Return the same without what the layers up to ``layer`` keep; their number of columns stays."""
        shells = (keys.new_zeros(1).expand(len(keys), 1, keys.shape[2], 1) for keys, _ in self.layers[: layer + 1])
        return Kept((*((shell, shell) for shell in shells), *self.layers[layer + 1 :]), self.mask)


def encode(loaded: LoadedModel, texts: Sequence[Ids], stems: Sequence[Sequence[Hashable]], *, budget: int) -> Kept:
    """Run ``texts`` through the model and return what attention keeps of them, ``budget`` tokens at a time.

    ``stems`` name for each text, from the widest level to the narrowest, the group that it may share a beginning with.
    """
    nothing = Kept((), torch.zeros(1, 0, dtype=torch.long))
    kept, parent = nothing, [0] * len(texts)
    done = [0] * len(texts)
    for level in range(len(stems[0])):
        nodes = _groups([stem[level] for stem in stems])
        ends = [_common(texts, members, done) for members in nodes]
        segments = [texts[members[0]][done[members[0]] : end] for members, end in zip(nodes, ends, strict=True)]
        kept = _extend(loaded, kept, [parent[members[0]] for members in nodes], segments, budget)
        for node, (members, end) in enumerate(zip(nodes, ends, strict=True)):
            for member in members:
                parent[member], done[member] = node, end
    return _extend(loaded, kept, parent, [text[start:] for text, start in zip(texts, done, strict=True)], budget)


def _groups(names: Sequence[Hashable]) -> list[list[int]]:
    found: dict[Hashable, list[int]] = {}
    for index, name in enumerate(names):
        found.setdefault(name, []).append(index)
    return list(found.values())


def _common(texts: Sequence[Ids], members: Sequence[int], done: Sequence[int]) -> int:
    """Return how many leading tokens the members share; a lone one has nothing to share beyond what is done."""
    if len(members) == 1:
        return done[members[0]]
    least, greatest = min(texts[member] for member in members), max(texts[member] for member in members)
    # What the first and the last in order share, all between them share.
    differing = (place for place, (a, b) in enumerate(zip(least, greatest, strict=False)) if a != b)
    return next(differing, min(len(least), len(greatest)))


@torch.no_grad()
def _extend(loaded: LoadedModel, kept: Kept, parent: Sequence[int], segments: Sequence[Ids], budget: int) -> Kept:
    """Return what is kept of each segment behind its parent; segments of a level end in the same column."""
    parents, start, width = torch.tensor(parent), kept.mask.shape[1], max(map(len, segments))
    own = right_aligned(segments, 1)[1]
    mask = torch.cat([kept.mask[parents], own], dim=1)
    if not width:
        everything = torch.arange(start)
        return Kept(tuple((_cut(k, parents, everything), _cut(v, parents, everything)) for k, v in kept.layers), mask)
    filled = [index for index, segment in enumerate(segments) if segment]
    pool: list[Layer] = []
    for group in batches([len(segments[index]) for index in filled], budget=budget):
        rows = torch.tensor([filled[index] for index in group])
        grown = _grow(loaded, kept, parents[rows], [segments[index] for index in rows.tolist()])
        pool = pool or [_room(layer, len(segments), start + width) for layer in grown]
        for into, new in zip(pool, grown, strict=True):
            for whole, part in zip(into, new, strict=True):
                whole[rows.to(whole.device), :, 2 * start + width - part.shape[2] :] = part[:, :, start:]
    for into, old in zip(pool, kept.layers, strict=False):
        for whole, part in zip(into, old, strict=True):
            whole[:, :, :start] = part[parents.to(part.device)]
    for whole in (tensor for layer in pool for tensor in layer):
        # Where nothing is, a fully masked token may have left no numbers.
        whole.masked_fill_(mask.to(whole.device)[:, None, :, None] == 0, 0)
    return Kept(tuple(pool), mask)


def _grow(loaded: LoadedModel, kept: Kept, parents: Tensor, segments: Sequence[Ids]) -> list[Layer]:
    """Return keys and values of the parents' columns and the segments', which are padded on the left."""
    ids, own = right_aligned(segments, loaded.tokens.pad_id)
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(kept.layers):
        cache.update(keys[parents.to(keys.device)], values[parents.to(values.device)], layer)
    device = loaded.input_device
    options = cache_options(loaded.model, torch.cat([kept.mask[parents], own], dim=1), ids.shape[1], cache, device)
    with head_only_at(loaded.architecture.head, *positions([(0, 0)], device)):
        run(loaded.model, ids.to(device), **options)
    layers: Any = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def right_aligned(segments: Sequence[Ids], pad: int) -> tuple[Tensor, Tensor]:
    """Return token ids padded on the left and their mask, (rows, width) int64 each on the CPU."""
    width = max(map(len, segments))
    ids = torch.tensor([[pad] * (width - len(own)) + list(own) for own in segments], dtype=torch.long)
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in segments], dtype=torch.long)
    return ids.reshape(len(segments), width), mask.reshape(len(segments), width)


def _room(layer: Layer, rows: int, columns: int) -> Layer:
    keys, values = (t.new_zeros(rows, t.shape[1], columns, t.shape[3]) for t in layer)
    return keys, values


def _cut(tensor: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return tensor[rows.to(tensor.device)][:, :, columns.to(tensor.device)]
