"""What every stabilizer has to hold, and this one against plain float64 algebra."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from editcli.plugin import LowRank, OptionError, Problem, Site, State, StateError, Update
from editcli.testing import Plugins, StabilizerContract, build

import editcli_orthogonal
from editcli_orthogonal.stabilizer import Orthogonal, leading

SITE = Site(0, "blocks.0.mlp.out", False)


class TestOrthogonal(StabilizerContract):
    component = Orthogonal


class TestOrthogonalWhileProjecting(StabilizerContract):
    """The same, with options under which almost every batch is projected."""

    component = Orthogonal
    options: ClassVar = {"warmup": 2, "deviations": 0}


def test_editcli_finds_it() -> None:
    plugins = Plugins()
    plugins.register(editcli_orthogonal, "orthogonal")
    assert plugins.find("stabilizer", "orthogonal").component is Orthogonal


class OneSite:
    """A session with one float64 weight and nothing else."""

    def __init__(self, rows: int = 7, columns: int = 11):
        self.sites, self.device = (SITE,), torch.device("cpu")
        self.base = draw(rows, columns, seed=0)
        self.current = self.base.clone()

    def weight(self, site: Site) -> torch.Tensor:
        return self.current

    def baseline(self, site: Site) -> torch.Tensor:
        return self.base


def draw(*size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batches(session: OneSite, count: int) -> list[tuple[Problem, Update]]:
    """Return problems with their updates; every third batch has the keys of the one before, so that it stands out."""
    rows, columns = session.base.shape
    found = []
    for number in range(count):
        keys = draw(columns, 2, seed=10 + number - (number % 3 == 2))
        left = draw(rows, 2, seed=50 + number)
        found.append((Problem(SITE, keys, left), LowRank(0.1 * left, keys)))
    return found


def run(session: Any, stabilizer: Orthogonal, given: list[tuple[Problem, Update]]) -> list[torch.Tensor]:
    """Write batches as editcli does; return what was written."""
    written = []
    for problem, update in given:
        stable = stabilizer.stabilize_update(session, SITE, update, problem)
        session.current = session.current + stable.dense()
        stabilizer.remember(session, [problem], {SITE: stable})
        written.append(stable.dense())
    return written


def reference(
    given: list[tuple[Problem, Update]], *, deviations: float, share: float, decay: float, warmup: int
) -> tuple[list[torch.Tensor], int]:
    """The method in a few lines: dense matrices, a full singular value decomposition, an explicit projector."""
    change = torch.zeros_like(given[0][1].dense())
    mean = variance = 0.0
    written, projected = [], 0
    for number, (problem, update) in enumerate(given):
        keys = problem.keys.T
        noise = sum(float((change @ k).norm() / change.norm() / k.norm()) for k in keys) / len(keys) if number else 0.0
        dense = update.dense()
        if number >= warmup and noise > mean + deviations * variance**0.5:
            projected += 1
            left, sigma, _ = torch.linalg.svd(change)
            rank = next(r for r in range(1, len(sigma) + 1) if sigma[:r].square().sum() >= share * sigma.square().sum())
            dense = (torch.eye(len(left)) - left[:, :rank] @ left[:, :rank].T) @ dense
        if number < 2:
            mean = noise
        else:
            mean = decay * mean + (1 - decay) * noise
            variance = decay * variance + (1 - decay) * (noise - mean) ** 2
        change = change + dense
        written.append(dense)
    return written, projected


@pytest.mark.parametrize(
    "options",
    [
        {"deviations": 1.0, "share": 0.5, "decay": 0.9, "warmup": 2},
        {"deviations": 0.0, "share": 0.9, "decay": 0.5, "warmup": 3},
        {"deviations": 0.3, "share": 0.2, "decay": 0.8, "warmup": 4},
    ],
)
@pytest.mark.parametrize("shape", [(7, 11), (11, 7), (8, 8)])
def test_it_is_the_method(options: Mapping[str, Any], shape: tuple[int, int]) -> None:
    session = OneSite(*shape)
    given = batches(session, 12)
    stabilizer = Orthogonal(Orthogonal.Options(**options))
    stabilizer.prepare(session)
    expected, projected = reference(given, **options)
    found = run(session, stabilizer, given)
    assert 0 < projected < len(given)
    assert stabilizer.noise[SITE.module].exceptional == projected
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_what_is_projected_is_orthogonal_to_what_is_protected() -> None:
    session = OneSite()
    stabilizer = Orthogonal(Orthogonal.Options(warmup=2, deviations=0.0))
    stabilizer.prepare(session)
    given = batches(session, 3)
    run(session, stabilizer, given[:2])
    basis = leading(session.current - session.base, 0.5)
    (written,) = run(session, stabilizer, given[2:])
    assert float((basis.T @ written).norm()) < 1e-12 * float(written.norm())
    assert float(written.norm()) > 0


def test_nothing_is_changed_before_there_is_anything_to_compare_with() -> None:
    session, stabilizer = OneSite(), Orthogonal(Orthogonal.Options(warmup=5, deviations=0.0))
    stabilizer.prepare(session)
    given = batches(session, 5)
    for written, (_, update) in zip(run(session, stabilizer, given), given, strict=True):
        assert torch.equal(written, update.dense())


@pytest.mark.parametrize("share", [1e-9, 0.3, 0.8, 1.0])
def test_the_fewest_directions_that_carry_the_share(share: float) -> None:
    change = draw(6, 9, seed=3)
    basis = leading(change, share)
    sigma = torch.linalg.svdvals(change).square()
    rank = basis.shape[1]
    assert float(sigma[:rank].sum()) >= share * float(sigma.sum()) * (1 - 1e-12)
    assert rank == 1 or float(sigma[: rank - 1].sum()) < share * float(sigma.sum())
    assert torch.allclose(basis.T @ basis, torch.eye(rank, dtype=torch.float64))


def test_a_resumed_stream_goes_on_bit_by_bit() -> None:
    unbroken, broken = OneSite(), OneSite()
    given = batches(unbroken, 9)
    whole, first, second = (Orthogonal(Orthogonal.Options(warmup=2, deviations=0.5)) for _ in range(3))
    whole.prepare(unbroken)
    first.prepare(broken)
    run(unbroken, whole, given)
    run(broken, first, given[:5])
    second.load_state(broken, first.state())
    run(broken, second, given[5:])
    assert torch.equal(unbroken.current, broken.current)
    assert second.record() == whole.record()


def test_a_state_of_another_model_is_refused() -> None:
    with pytest.raises(StateError, match=r"nothing for blocks\.0\.mlp\.out"):
        Orthogonal().load_state(SimpleNamespace(sites=(SITE,)), State())


@pytest.mark.parametrize(
    "settings", [{"share": 0}, {"share": 1.1}, {"decay": 1}, {"warmup": 1}, {"deviations": -1}, {"warmup": 2.5}]
)
def test_options_that_make_no_sense_are_refused(settings: Mapping[str, Any]) -> None:
    with pytest.raises(OptionError, match="orthogonal"):
        build(Orthogonal.Options, settings, owner="orthogonal")
