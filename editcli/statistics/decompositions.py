"""Eigendecompositions of second moments, cached on disk: they cost minutes at the width of real models.

The key is the content of the second moment itself, so a file can serve no other model, corpus or amount of text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from editcli.linalg.precision import double
from editcli.plugin.interfaces import Site
from editcli.plugin.leastsquares import eigh
from editcli.reporting import Reporter
from editcli.statistics.cache import Cache
from editcli.storage.files import tensors_digest

FORMAT = 2


class Decompositions:
    """Computes or reads the eigenvalues, ascending, and eigenvectors of a symmetric matrix."""

    def __init__(self, cache: Cache, reporter: Reporter):
        self._files, self.reporter = cache, reporter

    def __call__(self, moment: Tensor, site: Site, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return (values (d_in,), vectors (d_in, d_in)) in float64 of a (d_in, d_in) second moment."""
        key = f"eigen-{tensors_digest([(str(FORMAT), moment)])}"
        cached = self._files.read(key)
        if cached is not None:
            return double(cached["values"], device), double(cached["vectors"], device)
        with self.reporter.phase(f"Eigenvectors of {site.module}", 1) as advance:
            values, vectors = eigh(double(moment, device), site=site.module)
            advance(1)
        # Rounded as on disk, so that a run that reads the cache equals the run that filled it.
        vectors = vectors.float()
        self._files.write(key, {"values": values, "vectors": vectors}, {"format": FORMAT, "module": site.module})
        return values, vectors.double()
