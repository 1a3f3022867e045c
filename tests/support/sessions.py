"""A session without a model, which the program's own pipeline writes to: what the tests of methods run on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor

from editcli.editing.pipeline import Written, commit, edit_batch
from editcli.editing.session import ModelSession
from editcli.plugin.interfaces import (
    Editor,
    Gradients,
    Problem,
    Session,
    Site,
    SiteGradients,
    Stabilizer,
    Update,
    Values,
)
from editcli.plugin.leastsquares import eigh
from editcli.requests.schema import EditRequest
from editcli.settings.core import TargetOptions
from tests.support.facts import requests_of
from tests.support.reporters import Listener

SHAPES = ((6, 11), (11, 6), (8, 8))
"""(d_out, d_in) of wide, tall and square weights."""


class FakeSession:
    """Sites whose outputs add up, h = h_0 + sum_i W_i k_i, with everything drawn from the seed.

    The weights are float32, as a session's are; keys, hidden states and gradients are float64. The keys of a site move
    with the weights of the sites before it, as a model's do, so that putting weights back puts keys back as well.
    """

    def __init__(self, shape: tuple[int, int], *, sites: int = 3, small: int = 0, seed: int = 0):
        self.shape, self.seed, self.small = shape, seed, small
        self.device = torch.device("cpu")
        self.options = TargetOptions()
        self.reporter = Listener()
        self._drawn: dict[tuple[Any, ...], Tensor] = {}
        self.sites = tuple(Site(layer, f"blocks.{layer}.mlp.out", False) for layer in range(sites))
        self.base = {site: self.random("weight", site.layer, size=shape).float() for site in self.sites}
        self.weights = dict(self.base)

    @property
    def stages(self) -> tuple[FakeSession, ...]:
        return (self,)

    def random(self, *key: Any, size: tuple[int, ...]) -> Tensor:
        """Return the float64 tensor that belongs to ``key``: the same in every process."""
        named = (self.seed, *key, size)
        if named not in self._drawn:
            digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()[:8]
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") % (1 << 62))
            self._drawn[named] = torch.randn(size, generator=generator, dtype=torch.float64)
        return self._drawn[named].clone()

    def weight(self, site: Site) -> Tensor:
        return self.weights[site]

    def baseline(self, site: Site) -> Tensor:
        return self.base[site]

    def change(self, site: Site) -> Tensor:
        """Return W - W_0, float64."""
        return self.weight(site).double() - self.baseline(site).double()

    def second_moment(self, site: Site) -> Tensor:
        """A well-conditioned C with ``small`` eigenvalues below 0.01 and the rest between 1 and 2."""
        size = self.shape[1]
        basis = torch.linalg.qr(self.random("basis", site.layer, size=(size, size))).Q
        values = 1 + self.random("values", site.layer, size=(size,)).sigmoid()
        values[: self.small] *= 1e-3
        return (basis * values) @ basis.T

    def gradient_moment(self, site: Site) -> Tensor:
        """A well-conditioned B."""
        factor = self.random("gradient", site.layer, size=(self.shape[0], 2 * self.shape[0]))
        return factor @ factor.T / self.shape[0]

    def decomposition(self, site: Site) -> tuple[Tensor, Tensor]:
        return eigh(self.second_moment(site), site=site.module)

    def keys(self, requests: Sequence[EditRequest], site: Site) -> Tensor:
        return self._keys(requests, site, "key")

    def output(self, requests: Sequence[EditRequest]) -> Tensor:
        start = self._columns(requests, "h", size=self.shape[0])
        return start + sum(self.weights[site].double() @ self.keys(requests, site) for site in self.sites)

    def residual(self, requests: Sequence[EditRequest], site: Site, values: Values) -> Tensor:
        remaining = len(self.sites) - self.sites.index(site)
        return (values.target - self.output(requests)) / remaining

    def values(self, requests: Sequence[EditRequest], *, prefixed: bool = True) -> Values:
        target, initial, written = (self._columns(requests, name, prefixed, size=self.shape[0]) for name in "zhm")
        return Values(target, initial, written, {}, torch.ones(len(requests)))

    def gradients(
        self,
        requests: Sequence[EditRequest],
        *,
        positions: Literal["target", "all"] = "target",
        trial: Mapping[Site, Tensor] | None = None,
        ended: bool = False,
    ) -> Gradients:
        """Differentiate half the squared distance of h to a target; two positions an edit, three with ``all``.

        A target that is ``ended`` lies elsewhere.
        """
        weights = {**self.weights, **(trial or {})}
        every, count = [r for r in requests for _ in range(2 if positions == "target" else 3)], len(requests)
        owner = torch.arange(count).repeat_interleave(len(every) // count)
        places = [place % (len(every) // count) for place in range(len(every))]
        keys = {site: self._positions(every, places, site) for site in self.sites}
        gap = self._columns(every, "h", size=self.shape[0]) - self._columns(every, "z", not ended, size=self.shape[0])
        gap = gap + sum(weights[site].double() @ keys[site] for site in self.sites)
        loss = torch.zeros(count, dtype=torch.float64).index_add(0, owner, gap.square().sum(0) / 2)
        return Gradients(loss, {site: SiteGradients(keys[site], gap, owner) for site in self.sites})

    def pilots(self, count: int) -> tuple[Sequence[EditRequest], str]:
        return requests_of("pilot", min(count, 40)), "made for this test"

    def calibrated(self, name: str, parts: Mapping[str, Any], measure: Callable[[], Tensor]) -> Tensor:
        return measure()

    def write(self, site: Site, update: Update) -> None:
        self.weights[site] = self.weights[site] + update.dense().float()

    @property
    def written(self) -> bool:
        return any(weight is not self.base[site] for site, weight in self.weights.items())

    @contextmanager
    def under(self, weights: Mapping[Site, Tensor], *, unedited: bool = False) -> Iterator[None]:
        before = self.masters()
        self.weights.update({**(self.base if unedited else {}), **weights})
        try:
            yield
        finally:
            self.restore(before)

    def masters(self) -> Mapping[Site, Tensor]:
        return dict(self.weights)

    def restore(self, masters: Mapping[Site, Tensor]) -> None:
        self.weights.update(masters)

    def _columns(self, requests: Sequence[EditRequest], *key: Any, size: int) -> Tensor:
        """Return one column an edit, (size, n)."""
        return torch.stack([self.random(*key, request.id, size=(size,)) for request in requests], dim=1)

    def _keys(self, requests: Sequence[EditRequest], site: Site, *key: Any) -> Tensor:
        start, way = (self._columns(requests, *name, site.layer, size=self.shape[1]) for name in (key, ("drift",)))
        moved = sum(float((self.change(s) * self._probe(s)).sum()) for s in self.sites[: self.sites.index(site)])
        return start + 0.1 * torch.tensor(moved).tanh() * way

    def _positions(self, every: Sequence[EditRequest], places: Sequence[int], site: Site) -> Tensor:
        pairs = zip(every, places, strict=True)
        columns = [self.random("key", site.layer, edit.id, place, size=(self.shape[1],)) for edit, place in pairs]
        return torch.stack(columns, dim=1)

    def _probe(self, site: Site) -> Tensor:
        return self.random("probe", site.layer, size=self.shape) / float(self.base[site].norm())


class Witness(Stabilizer):
    """Keeps the updates of the batch as they reach it, before they are rounded for the record."""

    name = "witness"
    reference = "none"

    def __init__(self) -> None:
        super().__init__()
        self.updates: dict[Site, Update] = {}

    def stabilize_update(self, session: Session, site: Site, update: Update, problem: Problem | None) -> Update:
        self.updates[site] = update
        return update


def write_batch(
    session: FakeSession, editor: Editor, requests: Sequence[EditRequest], stabilizers: Sequence[Stabilizer] = ()
) -> Written:
    """Write one batch as a run without guards does, and let the components remember it."""
    real = cast(ModelSession, session)
    written = edit_batch(real, editor, stabilizers, requests, lambda site, update: None)
    commit(real, editor, stabilizers, requests, written)
    return written


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Compare in the Frobenius norm, relative to what is expected; a batch is recorded in float32."""
    assert actual.shape == expected.shape
    difference, size = float((actual.double() - expected.double()).norm()), float(expected.double().norm())
    assert difference <= tolerance * size
