"""Second moments E[g g^T] of gradients on reference text, always of the unedited model: K-FAC's second factor.

With k what a projection reads and g the gradient of the text's summed cross-entropy at its output, the curvature of
that loss in W is about A (x) B, A = E[k k^T] and B = E[g g^T] (Martens and Grosse, arXiv 1503.05671). A is the second
moment that the locate-and-edit methods use; B is measured here, on the same text and as many tokens for each dimension.
A result is cached, keyed by everything it depends on: all weights, since a gradient comes from the top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from editcli.distributed.team import Team
from editcli.editing.gradients import one_pass
from editcli.errors import StatisticsError
from editcli.linalg.precision import double
from editcli.models.forward import chunks, pass_tokens
from editcli.models.loading import LoadedModel
from editcli.models.tokens import Encoded
from editcli.plugin.interfaces import Site
from editcli.statistics.cache import fingerprint
from editcli.statistics.moments import SecondMoments
from editcli.storage.checkpoint import file_digest

FORMAT = 1
PASS_TOKENS = 2048
"""Most tokens of one pass: logits of all positions are held, with their gradients."""


class GradientMoments:
    """Second moments of the gradients at the outputs of ``sites``: from the cache, or computed for all in one go."""

    def __init__(self, loaded: LoadedModel, sites: Sequence[Site], moments: SecondMoments, *, team: Team | None = None):
        self.loaded, self.sites, self.moments, self.team = loaded, tuple(sites), moments, team or Team()
        self._computed: dict[Site, Tensor] = {}

    def __call__(self, site: Site) -> Tensor:
        """Return B = E[g g^T] of ``site``, (d_out, d_out) float64."""
        if not self._computed:
            self.moments.asked = True
            identity = self._identity()
            stored = self.team.lead_tensors("gradient moments", lambda: self._stored(identity))
            if not stored:
                measured = self._measure()
                # Every rank has measured; those of rank 0 hold for all.
                stored = self.team.lead_tensors("gradient moments", lambda: [measured[one] for one in self.sites])
                if self.team.leads:
                    tensors = {one.module: moment for one, moment in zip(self.sites, stored, strict=True)}
                    self.moments.files.write(fingerprint(identity), tensors, identity)
            self._computed = dict(zip(self.sites, stored, strict=True))
        return double(self._computed[site], self._computed[site].device)

    @property
    def tokens(self) -> int:
        """The number of tokens that are read."""
        options = self.moments.options
        widest = max(self.loaded.architecture.shape(site.layer)[0] for site in self.sites)
        return options.tokens or options.tokens_per_dim * widest

    def _identity(self) -> dict[str, Any]:
        checkpoint, tokenizer = self.loaded.checkpoint, self.loaded.source.folder / "tokenizer.json"
        return {
            "kind": "gradient moments",
            "weights": checkpoint.fingerprint() or checkpoint.digest_of(checkpoint.names()),
            "tokenizer": file_digest(tokenizer) if tokenizer.is_file() else "",
            "dtype": str(next(self.loaded.model.parameters()).dtype),
            "modules": [site.module for site in self.sites],
            "corpus": self.moments.corpus.identity_of(self.tokens),
            "tokens": self.tokens,
            "max_length": self.moments.max_length,
            "format": FORMAT,
        }

    def _stored(self, identity: Mapping[str, Any]) -> list[Tensor]:
        tensors = self.moments.files.read(fingerprint(identity))
        return [] if tensors is None else [tensors[site.module] for site in self.sites]

    def _measure(self) -> dict[Site, Tensor]:
        """Return B of every site, (d_out, d_out) float32 on the CPU."""
        rows, sums = list(self._rows()), dict[Site, Tensor]()
        total = sum(len(row.ids) for row in rows)
        if not total:
            raise StatisticsError(f"the corpus {self.moments.corpus.name} holds no text of at least two tokens")
        budget = pass_tokens(PASS_TOKENS, self.loaded.input_device)
        with self.moments.reporter.phase("Gradients of reference text", total, "tokens") as advance:
            for group in chunks(rows, budget=budget):
                for site, outer in self._outer([rows[index] for index in group]).items():
                    sums[site] = sums[site].add_(outer) if site in sums else outer
                advance(sum(len(rows[index].ids) for index in group))
        return {site: (outer / total).float().cpu() for site, outer in sums.items()}

    def _rows(self) -> Sequence[Encoded]:
        """Return the reference text, each row as a text all of whose tokens but the first are its target."""
        rows, missing = [], self.tokens
        for ids in self.moments.corpus.read(self.tokens):
            ids = tuple(ids[:missing])
            missing -= len(ids)
            if len(ids) > 1:
                rows.append(Encoded(ids, -1, range(1, len(ids)), ids[1:]).without_last())
            if missing <= 0:
                break
        return rows

    def _outer(self, texts: Sequence[Encoded]) -> dict[Site, Tensor]:
        """Return the sum of g g^T over the tokens of some rows for every site, float64 where the device has it."""
        _, at_sites = one_pass(self.loaded, self.sites, texts, {})
        sums = {}
        for site, (_, gradients) in at_sites.items():
            # The loss of a row is a mean over its target; curvature is that of the sum. Padding has gradient zero.
            length = torch.tensor([len(text.target) for text in texts], device=gradients.device)
            columns = (gradients * length[:, None, None]).flatten(0, 1)
            outer = columns.T @ columns
            sums[site] = double(outer, outer.device)
        return sums
