"""A session without a model: random keys and targets behind the protocol that components see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from editcli.plugin.interfaces import Editor, Gradients, Problem, Site, SiteGradients, Stabilizer, State, Update, Values
from editcli.plugin.leastsquares import eigh
from editcli.reporting import Silent
from editcli.requests.schema import EditRequest
from editcli.testing import through_bytes as state_through_bytes

SHAPES = [(6, 11), (11, 6), (8, 8)]
"""(d_out, d_in) of wide, tall and square weights."""


class Listener(Silent):
    """A reporter that keeps what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class FakeSession:
    """Sites whose outputs add up: h = h_0 + sum_i W_i k_i, everything float64, everything decided by the seed.

    Keys move a little with every batch that is written, as those of a model do.
    """

    def __init__(self, shape: tuple[int, int], *, sites: int = 3, small: int = 0, seed: int = 0):
        self.shape, self.seed, self.small = shape, seed, small
        self.device = torch.device("cpu")
        self.reporter = Listener()
        self.sites = tuple(Site(layer, f"blocks.{layer}.mlp.out", False) for layer in range(sites))
        self._base = {site: self.random("weight", site.layer, size=shape) for site in self.sites}
        self.weights = dict(self._base)
        self.batches_written = 0

    def random(self, *key: Any, size: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(abs(hash_of((self.seed, *key))) % (1 << 62))
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def weight(self, site: Site) -> Tensor:
        return self.weights[site]

    def baseline(self, site: Site) -> Tensor:
        return self._base[site]

    def second_moment(self, site: Site) -> Tensor:
        """A well-conditioned C with ``small`` eigenvalues below 0.01 and the rest between 1 and 2."""
        size = self.shape[1]
        basis = torch.linalg.qr(self.random("basis", site.layer, size=(size, size))).Q
        values = 1 + self.random("values", site.layer, size=(size,)).sigmoid()
        values[: self.small] *= 1e-3
        return (basis * values) @ basis.T

    def decomposition(self, site: Site) -> tuple[Tensor, Tensor]:
        return eigh(self.second_moment(site), site=site.module)

    def keys(self, requests: Sequence[EditRequest], site: Site) -> Tensor:
        size = (self.shape[1],)
        columns = [
            self.random("key", site.layer, r.id, size=size)
            + 0.1 * self.random("drift", site.layer, r.id, self.batches_written, size=size)
            for r in requests
        ]
        return torch.stack(columns, dim=1)

    def output(self, requests: Sequence[EditRequest]) -> Tensor:
        start = torch.stack([self.random("h", r.id, size=(self.shape[0],)) for r in requests], dim=1)
        return start + sum(self.weights[site] @ self.keys(requests, site) for site in self.sites)

    def residual(self, requests: Sequence[EditRequest], site: Site, values: Values) -> Tensor:
        remaining = len(self.sites) - self.sites.index(site)
        return (values.target - self.output(requests)) / remaining

    def values(self, requests: Sequence[EditRequest], *, prefixed: bool = True) -> Values:
        def draw(name: str) -> Tensor:
            return torch.stack([self.random(name, r.id, prefixed, size=(self.shape[0],)) for r in requests], dim=1)

        return Values(draw("z"), draw("h"), draw("m"), {}, torch.zeros(len(requests)))

    def gradients(
        self,
        requests: Sequence[EditRequest],
        *,
        positions: str = "target",
        trial: Mapping[Site, Tensor] | None = None,
    ) -> Gradients:
        """Differentiate half the squared distance of h to a target; two positions an edit, more with ``all``."""
        weights = {**self.weights, **(trial or {})}
        count = 2 if positions == "target" else 3
        keys = {s: torch.cat([self._position(r, s, p) for r in requests for p in range(count)], 1) for s in self.sites}
        start = torch.stack([self.random("h", r.id, size=(self.shape[0],)) for r in requests for _ in range(count)], 1)
        goal = torch.stack(
            [self.random("z", r.id, True, size=(self.shape[0],)) for r in requests for _ in range(count)], 1
        )
        gap = start + sum(weights[site] @ keys[site] for site in self.sites) - goal
        owner = torch.arange(len(requests)).repeat_interleave(count)
        loss = torch.zeros(len(requests), dtype=torch.float64).index_add(0, owner, gap.square().sum(0) / 2)
        return Gradients(loss, {site: SiteGradients(keys[site], gap, owner) for site in self.sites})

    def _position(self, request: EditRequest, site: Site, position: int) -> Tensor:
        return self.random("key", site.layer, request.id, position, size=(self.shape[1], 1))

    def pilots(self, count: int) -> tuple[Sequence[EditRequest], str]:
        return requests("pilot", min(count, 40)), "made for this test"

    def calibrated(self, name: str, parts: Mapping[str, Any], measure: Callable[[], Tensor]) -> Tensor:
        return measure()

    def write(self, site: Site, update: Update) -> None:
        self.weights[site] = self.weights[site] + update.dense()


def hash_of(key: tuple[Any, ...]) -> int:
    """Hash a key the same way in every process, which ``hash`` does not."""
    import hashlib

    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


def requests(label: str, count: int) -> list[EditRequest]:
    """Return ``count`` requests that differ in their id only."""
    return [EditRequest(f"{label}-{i}", "", "Paris", " is in", "Italy") for i in range(count)]


def write_batch(
    session: FakeSession, editor: Editor, batch: Sequence[EditRequest], stabilizers: Sequence[Stabilizer] = ()
) -> list[tuple[Problem, Update]]:
    """Take one batch through the stages that core takes it through; return each site's problem and update.

    The problem of an editor without target values knows its site only.
    """
    values = editor.values(session, batch) if editor.needs_values else None  # pyright: ignore[reportArgumentType]
    if values is None:
        editor.begin(session, batch)  # pyright: ignore[reportArgumentType]
    for stabilizer in stabilizers if values is not None else ():
        values = stabilizer.stabilize_values(session, values)  # pyright: ignore[reportArgumentType]
    done = []
    for site in session.sites[-1:] if editor.single_site else session.sites:
        problem = None if values is None else editor.problem(session, batch, site, values)  # pyright: ignore[reportArgumentType]
        update = editor.solve(session, problem) if problem else editor.update(session, site)  # pyright: ignore[reportArgumentType]
        for stabilizer in stabilizers:
            update = stabilizer.stabilize_update(session, site, update, problem)  # pyright: ignore[reportArgumentType]
        session.write(site, update)
        done.append((problem or SimpleNamespace(site=site), update))
    session.batches_written += 1
    problems = [problem for problem, _ in done] if values is not None else []
    editor.remember(session, batch, problems)  # pyright: ignore[reportArgumentType]
    return done


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    """Compare in the Frobenius norm, relative to what is expected."""
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= tolerance * float(expected.norm())


@pytest.fixture(params=SHAPES, ids=["wide", "tall", "square"])
def session(request: pytest.FixtureRequest) -> FakeSession:
    """A fresh session, for a wide, a tall and a square weight."""
    return FakeSession(request.param, small=request.param[1] // 2)


@pytest.fixture
def fake_session() -> Callable[..., FakeSession]:
    """The class, for tests that need a session of their own."""
    return FakeSession


@pytest.fixture
def edit_batch() -> Callable[..., list[tuple[Problem, Update]]]:
    return write_batch


@pytest.fixture
def make_requests() -> Callable[[str, int], list[EditRequest]]:
    return requests


@pytest.fixture
def close() -> Callable[..., None]:
    return assert_close


@pytest.fixture
def through_bytes() -> Callable[[State], State]:
    """Take a state through the file formats of a snapshot."""
    return state_through_bytes
