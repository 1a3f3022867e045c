"""The diagnostics: figures of a batch's updates against dense numpy, and spectra as often as asked for."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from editcli.plugin.interfaces import LowRank, Site
from editcli.plugin.options import build
from editcli_norms.diagnostic import Norms, effective_rank
from editcli_spectra.diagnostic import Spectra
from editcli_spectra.directions import RelativeChange

SITE = Site(3, "model.layers.3.mlp.down_proj", False)


def session(weight: torch.Tensor, base: torch.Tensor) -> SimpleNamespace:
    """Return what a diagnostic reads of a session."""
    return SimpleNamespace(
        sites=(SITE,), device=torch.device("cpu"), weight=lambda site: weight, baseline=lambda site: base
    )


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rank_of(matrix: np.ndarray) -> float:
    sigma = np.linalg.svd(matrix, compute_uv=False)
    share = sigma[sigma > 1e-9 * sigma[0]] / sigma.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.parametrize("columns", [1, 4, 30])
def test_norms_equal_those_of_the_dense_update(columns):
    update, base = LowRank(random(12, columns), random(20, columns, seed=1)), random(12, 20, seed=2)
    found = Norms().observe(session(base, base), {SITE: update})
    dense = update.dense().double().numpy()
    assert found["update_norm_share/layer 3"] == pytest.approx(np.linalg.norm(dense) / float(base.norm()), rel=1e-5)
    assert found["update_rank/layer 3"] == pytest.approx(rank_of(dense), rel=1e-4)


def test_a_wide_update_is_not_decomposed():
    update, base = LowRank(random(12, 5), random(20, 5)), random(12, 20)
    options = build(Norms.Options, {"most": 4}, owner="norms")
    assert list(Norms(options).observe(session(base, base), {SITE: update})) == ["update_norm_share/layer 3"]


def test_an_update_of_zeros_has_rank_zero():
    assert effective_rank(LowRank(torch.zeros(4, 2), torch.zeros(5, 2))) == 0


def test_spectra_are_relative_to_the_base():
    base = random(12, 20)
    weight = base + 3 * torch.outer(random(12, seed=1), random(20, seed=2))
    found = Spectra(build(Spectra.Options, {"every": 1}, owner="spectra")).observe(session(weight, base), {})
    growth = np.linalg.norm(weight.numpy(), 2) / np.linalg.norm(base.numpy(), 2)
    assert found["spectral_growth/layer 3"] == pytest.approx(growth, rel=1e-5)
    expected = rank_of(weight.double().numpy()) / rank_of(base.double().numpy())
    assert found["effective_rank_share/layer 3"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("every", "looked"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6])])
def test_spectra_come_as_often_as_asked_for(every, looked):
    base = random(6, 8)
    diagnostic = Spectra(build(Spectra.Options, {"every": every}, owner="spectra"))
    assert [step for step in range(1, 7) if diagnostic.observe(session(base, base), {})] == looked


def test_an_unchanged_weight_has_shares_of_one():
    base = random(6, 8)
    found = Spectra(build(Spectra.Options, {"every": 1}, owner="spectra")).observe(session(base, base), {})
    assert set(found.values()) == {1.0}


def watch(weight, base, **options):
    diagnostic = RelativeChange(build(RelativeChange.Options, options, owner="directions"))
    return diagnostic.observe(session(weight, base), {})


def test_the_relative_change_is_that_along_the_leading_directions_of_the_base():
    base, step = random(12, 20), random(12, 20, seed=1)
    left, values, right = np.linalg.svd(base.double().numpy(), full_matrices=False)
    change = step.double().numpy()
    expected = np.mean([abs(left[:, i] @ change @ right[i]) / values[i] for i in range(5)])
    assert watch(base + step, base, count=5) == {"relative_change/layer 3": pytest.approx(expected, rel=1e-5)}
    assert watch(base, base) == {"relative_change/layer 3": 0.0}


def test_directions_are_not_watched_where_none_is_asked_for_or_the_base_is_zero():
    base = random(12, 20)
    assert watch(base, base, count=0) == {}
    assert watch(base, torch.zeros(12, 20)) == {}
