"""A session whose forward and backward passes are shared out: every rank ends up with all results, bit by bit alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from editcli.distributed.team import Team
from editcli.editing.session import ModelSession, generate_prefixes
from editcli.editing.targets import target_costs
from editcli.models.loading import LoadedModel
from editcli.plugin.interfaces import Gradients, Site, SiteGradients, Values
from editcli.requests.schema import EditRequest
from editcli.requests.subjects import by_subject
from editcli.settings.core import TargetOptions


class TeamSession(ModelSession):
    """Shares the edits of a batch out by their tokens; for a team of one, a :class:`ModelSession` as it is."""

    def __init__(
        self,
        loaded: LoadedModel,
        layers: Sequence[int],
        *,
        team: Team,
        options: TargetOptions | None = None,
        prefixes: Sequence[str] | None = None,
        seed: int = 0,
        **others: Any,
    ):
        self.team = team
        if prefixes is None:
            # Sampling is not bit-reproducible across ranks, so rank 0 samples the prefixes for all.
            made = options or TargetOptions()
            prefixes = team.lead_model(
                "prefixes", lambda: generate_prefixes(loaded, made, seed=seed, reporter=others.get("reporter"))
            )
        super().__init__(loaded, layers, options=options, prefixes=prefixes, seed=seed, **others)
        self._costs: tuple[Sequence[EditRequest], list[int]] = ((), [])

    def values(self, requests: Sequence[EditRequest], *, prefixed: bool = True) -> Values:
        """Optimise the targets of this rank's share and return those of all."""

        def work(share: Sequence[int]) -> tuple[Tensor, ...]:
            values = super(TeamSession, self).values([requests[item] for item in share], prefixed=prefixed)
            assert values.reached is not None
            assert values.clamped is not None
            flags = torch.stack([values.reached, values.clamped], dim=1).to(values.loss)
            return values.target.T, values.initial.T, values.written.T, values.loss, flags

        costs = self._weigh_targets(requests, len(self.prefixes) + 1 if prefixed else 1)
        together = by_subject(requests) if self.options.merge else None
        target, initial, written, loss, flags = self.team.spread("targets", costs, work, groups=together)
        reached, clamped = flags.bool().unbind(dim=1)
        return Values(target.T, initial.T, written.T, dropped={}, loss=loss, reached=reached, clamped=clamped)

    def keys(self, requests: Sequence[EditRequest], site: Site) -> Tensor:
        """Read the keys of this rank's share and return those of all, (d_in, n)."""

        def work(share: Sequence[int]) -> tuple[Tensor]:
            return (super(TeamSession, self).keys([requests[item] for item in share], site).T,)

        (rows,) = self.team.spread("keys", self._weigh(requests), work)
        return rows.T.contiguous()

    def residual(self, requests: Sequence[EditRequest], site: Site, values: Values) -> Tensor:
        """Measure the residuals of this rank's share and return those of all, (d_out, n)."""

        def work(share: Sequence[int]) -> tuple[Tensor]:
            some = self._some(values, share)
            return (super(TeamSession, self).residual([requests[item] for item in share], site, some).T,)

        (rows,) = self.team.spread("residuals", self._weigh(requests), work)
        return rows.T.to(self.weight(site).device)

    def gradients(
        self,
        requests: Sequence[EditRequest],
        *,
        positions: Literal["target", "all"] = "target",
        trial: Mapping[Site, Tensor] | None = None,
        ended: bool = False,
    ) -> Gradients:
        """Run one forward and backward pass of this rank's share and return what all ranks saw."""
        share = self.team.share(self._weigh(requests))
        if self.team.parts == 1 or not requests:
            return super().gradients(requests, positions=positions, trial=trial, ended=ended)
        tensors: list[Tensor] = []
        if share:
            some = [requests[item] for item in share]
            measured = super().gradients(some, positions=positions, trial=trial, ended=ended)
            numbers = torch.tensor(share)
            tensors = [numbers, measured.loss]
            for site in self.sites:
                part = measured.sites[site]
                tensors += [part.inputs.T, part.gradients.T, numbers.to(part.owner.device)[part.owner]]
        parts = [part for part in self.team.gather("gradients", tensors) if part]
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        order = torch.argsort(columns[0]).to(columns[1].device)
        places = range(2, len(columns), 3)
        sites = {site: _in_order(*columns[at : at + 3]) for site, at in zip(self.sites, places, strict=True)}
        return Gradients(loss=columns[1][order], sites=sites)

    def decomposition(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues and eigenvectors that rank 0 finds or computes: it alone keeps the cache."""
        device = self.second_moment(site).device
        values, vectors = self.team.lead_tensors("decompositions", lambda: super(TeamSession, self).decomposition(site))
        return values.to(device), vectors.to(device)

    def calibrated(self, name: str, parts: Mapping[str, Any], measure: Callable[[], Tensor]) -> Tensor:
        """Return what rank 0 finds on disk, else what all ranks measure together: rank 0 alone keeps the cache."""
        if self.team.size == 1:
            return super().calibrated(name, parts, measure)
        key, identity = self._calibration(name, parts)

        def read() -> tuple[Tensor, ...]:
            cached = self._files.read(key)
            return () if cached is None else (cached["calibration"],)

        calibration = self.team.lead_tensors("calibrations", read)
        if calibration:
            return calibration[0]
        return self._measured(key, identity, measure) if self.team.leads else measure()

    def _weigh_targets(self, requests: Sequence[EditRequest], contexts: int) -> list[int]:
        """Return the cost of each edit's target in ``contexts`` contexts."""
        if self.team.parts == 1:
            return [1] * len(requests)
        return target_costs(self.loaded, requests, contexts, self.layers[-1], self.options)

    def _weigh(self, requests: Sequence[EditRequest]) -> list[int]:
        """Return what reading each edit costs: the tokens of its prompt and target, bare and behind every prefix."""
        if self.team.parts == 1:
            return [1] * len(requests)
        of, costs = self._costs
        if list(of) != list(requests):
            tokens = self.loaded.tokens
            texts = [tokens.locate(request, request.target_new) for request in requests]
            lengths = [len(text.ids) for text in tokens.encode(texts)]
            behind = self.options.prefix_tokens * len(self.prefixes)
            costs = [length * (len(self.prefixes) + 1) + behind for length in lengths]
            self._costs = (tuple(requests), costs)
        return costs

    def _some(self, values: Values, share: Sequence[int]) -> Values:
        """Return the values of some edits; a batch that is all this rank's stays as it is."""
        if len(share) == len(values.loss):
            return values
        at = torch.tensor(share)

        def part(tensor: Tensor) -> Tensor:
            return tensor[..., at.to(tensor.device)]

        return Values(part(values.target), part(values.initial), part(values.written), {}, part(values.loss))


def _in_order(inputs: Tensor, gradients: Tensor, owner: Tensor) -> SiteGradients:
    """Return rows of all ranks as columns, edit by edit."""
    order = torch.argsort(owner, stable=True)
    return SiteGradients(inputs=inputs[order].T, gradients=gradients[order].T, owner=owner[order])
