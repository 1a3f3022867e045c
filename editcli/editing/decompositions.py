"""Eigendecompositions of second moments, kept on disk: they cost minutes at the width of real models.

The key is the content of the second moment itself, so a file can serve no other model, corpus or amount of text.
"""

from __future__ import annotations

import hashlib

import torch
from safetensors import SafetensorError
from torch import Tensor

from editcli.editing.leastsquares import double, eigh
from editcli.errors import StatisticsError
from editcli.interfaces import Site
from editcli.runs.cache import CacheFolder
from editcli.runs.files import read_safetensors

FORMAT = 1


class Decompositions:
    """Computes or reads the eigenvalues, ascending, and eigenvectors of a symmetric matrix."""

    def __init__(self, cache: CacheFolder | None):
        self.cache = cache

    def __call__(self, moment: Tensor, site: Site, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return (values (d_in,), vectors (d_in, d_in)) in float64 of a (d_in, d_in) second moment."""
        if self.cache is None:
            return eigh(double(moment, device), site=site.module)
        path = self.cache.path(f"eigen-{_content(moment)}.safetensors")
        if not self.cache.holds(path.name):
            values, vectors = eigh(double(moment, device), site=site.module)
            self.cache.store(path.name, {"values": values, "vectors": vectors.float()}, {"format": str(FORMAT)})
            # Rounded as on disk, so that a run that reads the cache equals the run that filled it.
            return values, vectors.float().double()
        try:
            found, _ = read_safetensors(path)
            return double(found["values"], device), double(found["vectors"], device)
        except (SafetensorError, OSError, KeyError) as error:
            raise StatisticsError(f"cannot read {path}: {error}; delete it, it will be computed again") from error


def _content(moment: Tensor) -> str:
    data = moment.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{FORMAT}\0{data.dtype}\0{tuple(data.shape)}\0".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
