"""The change that a run made to one matrix, as a product of two thin ones.

The change is the float32 weight that the run saved minus the base's: read-outs such as PRUNE's belong to it. Where the
recorded factors explain it, they are compressed (two QR decompositions and a small SVD), which is exact and cheap;
where they do not, the change itself is decomposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from editcli.errors import ModelError
from editcli.export.report import SiteExport
from editcli.export.source import Edited
from editcli.health.diff import ROUNDING_MARGIN, rounding_level
from editcli.linalg import krylov, spectra
from editcli.linalg.ratios import ratio
from editcli.plugin.interfaces import Site
from editcli.runs.output import to_stored
from editcli.storage.checkpoint import Checkpoint, opened_tensors

SHARE = 0.5
"""Largest size of an adapter's pair of matrices that is chosen unasked, as a share of the matrix that they change."""
EXPLAINED = 4.0
"""Units of float32 rounding per square root of the batches by which factors may miss a change that they explain."""


@dataclass(frozen=True, slots=True)
class SiteChange:
    """The pair of an adapter for one site, float32: the change is ``left @ right.T``."""

    site: Site
    left: Tensor
    """(d_out, r)."""
    right: Tensor
    """(d_in, r)."""
    report: SiteExport


@dataclass(frozen=True, slots=True)
class _Triplets:
    """Leading singular triplets of a change; ``whole`` when there are no others but zeros."""

    left: Tensor
    values: Tensor
    right: Tensor
    whole: bool
    explained: bool
    """Whether they come from the recorded factors, free of the rounding that every batch left in the weight."""


def find_change(edited: Edited, site: Site, rank: int | None, *, device: torch.device) -> SiteChange:
    """Return the change of one site at ``rank``, or at the smallest that loses nothing, up to :data:`SHARE`."""
    name = edited.before.weight_of(site.module)
    base = oriented(edited.before, name, site).to(device)
    saved = oriented(edited.run.after, name, site).to(device)
    master = _master(edited, site, name)
    target = saved if master is None else master.to(device)
    delta = target - base
    limit = rank or share_rank(*delta.shape)
    kind = torch.float32 if master is not None else edited.run.after.dtype(name)
    triplets = _triplets(delta, target, edited.run.segments, site, limit)
    floor = ROUNDING_MARGIN * rounding_level(target, kind)
    if kind == torch.float32 and not triplets.explained:
        floor *= max(len(edited.run.history.batches), 1) ** 0.5
    above = int((triplets.values > floor).sum())
    needed = above if triplets.whole or above < len(triplets.values) else None
    size = min(limit, above)
    root = triplets.values[:size].sqrt()
    left, right = ((side[:, :size] * root).float() for side in (triplets.left, triplets.right))
    rest = base.double() + left.double() @ right.double().T
    report = SiteExport(
        module=site.module,
        layer=site.layer,
        shape=(delta.shape[0], delta.shape[1]),
        rank=size,
        needed=needed,
        relative_error=_relative(rest, target, base),
        saved_error=_relative(rest, saved, base),
    )
    return SiteChange(site, left.cpu(), right.cpu(), report)


def share_rank(rows: int, columns: int) -> int:
    """Return the largest rank whose pair of matrices takes :data:`SHARE` of the numbers of a (rows, columns) matrix."""
    return max(1, int(SHARE * rows * columns / (rows + columns)))


def oriented(checkpoint: Checkpoint, name: str, site: Site) -> Tensor:
    """Return a stored weight as (d_out, d_in) float32."""
    stored = checkpoint.read(name).float()
    return site.oriented(stored).contiguous()


def _master(edited: Edited, site: Site, name: str) -> Tensor | None:
    """Return the run's float32 weight, (d_out, d_in), if its cast is what was saved: nothing came in between."""
    run, key = edited.run.history.folder, f"master/{site.module}"
    after = edited.run.after
    try:
        with opened_tensors(run.state, folder=run.out) as file:
            master = file.get_tensor(key)
        if master.ndim != 2 or not master.is_floating_point():
            return None
        cast = to_stored(master, name, after, site)
    except (SafetensorError, OSError, ModelError):
        # An exported folder has no state, and a damaged one is of no use here: what was saved tells enough.
        return None
    return master if torch.equal(cast, after.read(name)) else None


def _triplets(delta: Tensor, target: Tensor, segments: Sequence[Path], site: Site, limit: int) -> _Triplets:
    factors = _factors(segments, site, delta)
    if factors is not None:
        left, right = (side.to(delta.device, torch.float64) for side in factors)
        rounding = torch.finfo(torch.float32).eps * spectra.frobenius(target)
        if spectra.distance(delta, left @ right.T) <= EXPLAINED * len(segments) ** 0.5 * rounding:
            return _compressed(left, right)
    if min(delta.shape) <= spectra.NORM_LIMIT:
        left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
        return _Triplets(left, values, right.T, whole=True, explained=False)
    # One more than is kept tells whether there are more.
    count = min(limit + 1, min(delta.shape))
    # In float32 the iteration's own rounding would look like rank.
    leading = krylov.leading(delta.double(), count)
    return _Triplets(leading.left, leading.values, leading.right, whole=count == min(delta.shape), explained=False)


def _compressed(left: Tensor, right: Tensor) -> _Triplets:
    """Return the singular triplets of ``left @ right.T`` from its factors."""
    outer, inner = torch.linalg.qr(left), torch.linalg.qr(right)
    first, values, second = torch.linalg.svd(outer.R @ inner.R.T, full_matrices=False)
    return _Triplets(outer.Q @ first, values, inner.Q @ second.T, whole=True, explained=True)


def _factors(segments: Sequence[Path], site: Site, delta: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return all recorded factors of a site side by side; None when they are missing or too many to save work."""
    lefts, rights, width = [], [], 0
    rows, columns = delta.shape
    try:
        for path in segments:
            with opened_tensors(path) as file:
                left, right = (file.get_slice(f"{site.module}.{side}").get_shape() for side in ("left", "right"))
                if len(left) != 2 or (left[0], right) != (rows, [columns, left[1]]):
                    return None
                width += left[1]
                if width > min(delta.shape) // 2:
                    return None
                lefts.append(file.get_tensor(f"{site.module}.left"))
                rights.append(file.get_tensor(f"{site.module}.right"))
    except (SafetensorError, OSError, ModelError):
        # The change itself can be decomposed as well; factors only save work.
        return None
    return (torch.cat(lefts, dim=1), torch.cat(rights, dim=1)) if lefts else None


def _relative(matrix: Tensor, target: Tensor, base: Tensor) -> float:
    return ratio(spectra.distance(matrix, target), spectra.distance(target, base)) or 0.0
