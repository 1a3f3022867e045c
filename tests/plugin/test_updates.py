"""Low-rank and dense updates: one arithmetic, one record each, and the record of earlier versions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from editcli.plugin.interfaces import Dense, LowRank, Problem, Site, Update, Values, update_of
from editcli.records.state import RunFolder
from editcli.requests.schema import EditRequest

SITE = Site(0, "blocks.0.mlp.out", False)


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=["low rank", "dense"])
def update(request: pytest.FixtureRequest) -> Update:
    factors = LowRank(random(4, 2), random(7, 2, seed=1))
    return factors if request.param == "low rank" else Dense(factors.dense())


@pytest.mark.parametrize("rank", [1, 2, 3, 9])
def test_the_norm_of_factors_of_any_rank_is_that_of_their_product(rank: int) -> None:
    factors = LowRank(random(4, rank), random(7, rank, seed=1))
    assert factors.norm() == pytest.approx(float(factors.dense().norm()), rel=1e-12)


def test_both_kinds_are_the_same_matrix(update: Update) -> None:
    matrix, weight = random(4, 2) @ random(7, 2, seed=1).T, random(4, 7, seed=2)
    outer, inner = random(4, 4, seed=3), random(7, 7, seed=4)
    torch.testing.assert_close(update.dense(), matrix)
    torch.testing.assert_close(update.added_to(weight), weight + matrix)
    torch.testing.assert_close(update.scaled(-0.5).dense(), -0.5 * matrix)
    torch.testing.assert_close(update.mapped(lambda x: outer @ x).dense(), outer @ matrix)
    mapped = update.mapped(lambda x: outer @ x, lambda x: inner @ x)
    torch.testing.assert_close(mapped.dense(), outer @ matrix @ inner.T)
    assert type(mapped) is type(update.scaled(2.0)) is type(update)
    assert update.norm() == pytest.approx(float(matrix.norm()))
    assert update.added_to(weight.float()).dtype == torch.float32


def test_an_update_is_recorded_as_it_is_and_once(update: Update, tmp_path: Path) -> None:
    """Also without a problem, as an editor without target values has none."""
    run, request = RunFolder(tmp_path), EditRequest("a", "", "Paris", " is in", "Italy")
    run.create()
    for problems in ({SITE: Problem(SITE, random(7, 1), random(4, 1))}, {}):
        name, _ = run.write_segment(1 + len(problems), [request], problems, {SITE: update})
        tensors = load_file(run.updates / name)
        known = {"keys", "residual"} if problems else set()
        assert set(tensors) == {f"{SITE.module}.{part}" for part in known | set(update.parts)}
        size = sum(tensor.numel() for key, tensor in tensors.items() if key.rpartition(".")[2] in update.parts)
        assert size == (4 * 7 if isinstance(update, Dense) else 4 * 2 + 7 * 2)
        again = update_of({key.rpartition(".")[2]: tensor for key, tensor in tensors.items()})
        assert type(again) is type(update)
        assert torch.equal(again.dense(), update.dense())


def test_a_dropped_column_is_left_as_it_is_and_the_others_are_not_touched() -> None:
    values = Values(random(3, 4), random(3, 4, seed=1), random(3, 4, seed=2), {0: "known"}, torch.zeros(4))
    dropped = values.drop({2: "too long"})
    assert dict(dropped.dropped) == {0: "known", 2: "too long"}
    assert torch.equal(dropped.target[:, 2], values.initial[:, 2])
    assert torch.equal(dropped.target[:, [0, 1, 3]], values.target[:, [0, 1, 3]])
    assert not torch.equal(values.target[:, 2], values.initial[:, 2]), "nothing changes in place"
    assert values.drop({}) is values
