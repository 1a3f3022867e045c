"""Norms and spectra: the figures are numpy's, in both orientations, and the estimates keep their stated error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from editcli.linalg import krylov, spectra

SHAPES = [(40, 90), (90, 40), (64, 64), (1, 7), (7, 1)]


def matrix(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def low_rank(shape: tuple[int, int], rank: int) -> torch.Tensor:
    return matrix((shape[0], rank), 1) @ matrix((rank, shape[1]), 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [matrix, lambda shape: low_rank(shape, 1)], ids=["full", "rank-one"])
def test_every_figure_equals_numpy(shape, make):
    weight = make(shape)
    found = spectra.spectrum(weight)
    sigma = np.linalg.svd(weight.numpy(), compute_uv=False)
    share = sigma[sigma > 0] / sigma.sum()
    assert found.exact
    assert found.error == 0
    assert found.frobenius == pytest.approx(np.linalg.norm(weight.numpy()), rel=1e-6)
    assert found.spectral == pytest.approx(sigma[0], rel=1e-6)
    assert found.stable_rank == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-6)
    assert found.effective_rank == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-6)
    np.testing.assert_allclose(found.values.numpy(), sigma, rtol=1e-6, atol=1e-9 * sigma[0])
    for tau in (0.05, 0.1, 0.2, 0.7):
        assert found.k(tau) == int(np.argmax(np.cumsum(sigma) >= tau * sigma.sum() * (1 - 1e-12))) + 1


@pytest.mark.parametrize("shape", SHAPES)
def test_both_orientations_agree(shape):
    weight = matrix(shape)
    one, other = spectra.spectrum(weight, vectors=1), spectra.spectrum(weight.T, vectors=1)
    assert one.effective_rank == pytest.approx(other.effective_rank, rel=1e-9)
    assert one.k(0.5) == other.k(0.5)
    assert one.left.shape[0] == other.right.shape[0] == shape[0]
    assert float((one.left[:, 0] @ other.right[:, 0]).abs()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kept_vectors_are_singular_vectors(shape):
    weight = matrix(shape)
    found = spectra.spectrum(weight, tau=0.6)
    count = found.left.shape[1]
    assert count == found.k(0.6)
    torch.testing.assert_close(weight @ found.right, found.left * found.values[:count], rtol=0, atol=1e-9)
    torch.testing.assert_close(found.left.T @ found.left, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
def test_a_few_leading_vectors_need_no_full_decomposition(shape, monkeypatch):
    """However ill-conditioned the rest is: what is wanted of it are its values alone."""
    weight = low_rank(shape, 20)
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: pytest.fail("everything was decomposed"))
    found = spectra.spectrum(weight, tau=0.6)
    count = found.left.shape[1]
    assert 1 < count == found.k(0.6) < 20
    torch.testing.assert_close(found.values, sigma, rtol=1e-9, atol=1e-12)
    for kept, exact in ((found.left, left[:, :count]), (found.right, right.T[:, :count])):
        torch.testing.assert_close(kept @ kept.T, exact @ exact.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norms_of_a_low_precision_weight_are_accumulated_in_double(dtype):
    weight, other = matrix((300, 500), 0, dtype), matrix((300, 500), 1, dtype)
    assert spectra.frobenius(weight) == pytest.approx(np.linalg.norm(weight.double().numpy()), rel=1e-12)
    difference = weight.double().numpy() - other.double().numpy()
    assert spectra.distance(weight, other) == pytest.approx(np.linalg.norm(difference), rel=1e-12)
    assert spectra.distance(weight, weight) == 0


def test_a_zero_matrix_has_zero_figures():
    found = spectra.spectrum(torch.zeros(4, 6))
    assert (found.frobenius, found.spectral, found.effective_rank, found.stable_rank) == (0, 0, 0, 0)
    assert found.k(0.1) == 1
    assert spectra.spectral_norm(torch.zeros(4, 6)) == (0, 0)
    assert spectra.spectral_norm(torch.zeros(4, 6), method="randomized") == (0, 0)


def test_similarity_of_a_matrix_with_itself_is_one():
    found = spectra.spectrum(matrix((30, 50)), vectors=5)
    same = spectra.similarity(found, found, 5)
    assert (same.ls, same.ss, same.ss_left, same.ss_right) == pytest.approx((1, 1, 1, 1), abs=1e-9)
    assert max(same.angles_left + same.angles_right) < 1e-5


def test_similarity_equals_its_definition():
    before, after, k = matrix((30, 50), 0), matrix((30, 50), 0) + 0.4 * matrix((30, 50), 1), 6
    found = spectra.similarity(spectra.spectrum(before, vectors=k), spectra.spectrum(after, vectors=k), k)
    (u0, s0, v0), (u1, s1, v1) = (np.linalg.svd(weight.numpy(), full_matrices=False) for weight in (before, after))
    first, second = ((u[:, :k] * s[:k]) @ v[:k] for u, s, v in ((u0, s0, v0), (u1, s1, v1)))
    assert found.ls == pytest.approx((first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second), rel=1e-6)
    assert found.ss_left == pytest.approx(np.abs((u0[:, :k] * u1[:, :k]).sum(0)).mean(), rel=1e-6)
    assert found.ss_right == pytest.approx(np.abs((v0[:k] * v1[:k]).sum(1)).mean(), rel=1e-6)
    cosines = np.linalg.svd(u0[:, :k].T @ u1[:, :k], compute_uv=False)
    np.testing.assert_allclose(np.cos(np.radians(found.angles_left)), cosines, rtol=1e-6)


def test_a_tiny_principal_angle_is_not_rounded_away():
    angle = 1e-9
    first = torch.eye(3, 1, dtype=torch.float64)
    second = torch.tensor([[math.cos(angle)], [math.sin(angle)], [0]], dtype=torch.float64)
    assert math.radians(spectra.principal_angles(first, second)[0]) == pytest.approx(angle, rel=1e-6)


@pytest.mark.parametrize("shape", [(300, 700), (700, 300)])
def test_estimates_keep_their_stated_error(shape):
    # A decaying spectrum, as trained weights have, on top of noise.
    weight = matrix(shape) + 5 * low_rank(shape, 6)
    exact = spectra.spectrum(weight)
    found = spectra.spectrum(weight, method="randomized")
    assert not found.exact
    assert 0 < found.error < 0.1
    assert found.frobenius == pytest.approx(exact.frobenius, rel=1e-6)
    assert found.spectral == pytest.approx(exact.spectral, rel=found.error)
    assert found.nuclear == pytest.approx(exact.nuclear, rel=found.error)
    assert found.effective_rank == pytest.approx(exact.effective_rank, rel=found.error)
    assert abs(found.k(0.1) - exact.k(0.1)) <= 1
    value, error = spectra.spectral_norm(weight, method="randomized")
    assert value == pytest.approx(exact.spectral, rel=max(error, 1e-6))


def test_leading_triplets_are_within_their_residual():
    weight = matrix((120, 80)).float()
    found = krylov.leading(weight, 10)
    sigma = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    off = np.abs(sigma[None, :] - found.values.numpy()[:, None]).min(1)
    assert off.max() <= found.error * sigma[0] + 1e-5


def test_an_estimate_is_the_same_every_time():
    weight = matrix((100, 60)).float()
    one, other = (spectra.spectrum(weight, method="randomized") for _ in range(2))
    assert (one.nuclear, one.entropy, one.error) == (other.nuclear, other.entropy, other.error)


def test_the_largest_value_is_within_its_bound():
    weight = matrix((400, 900))
    value, error = krylov.estimate_largest(weight, steps=40)
    assert value == pytest.approx(np.linalg.norm(weight.numpy(), 2), rel=max(error, 1e-6))


def test_a_matrix_of_low_rank_ends_the_recurrence_early():
    weight = low_rank((200, 100), 3).float()
    sigma = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    sums = krylov.estimate_sums(weight, krylov.leading(weight, 3))
    assert krylov.estimate_largest(weight)[0] == pytest.approx(sigma[0], rel=1e-4)
    assert sums.nuclear == pytest.approx(sigma.sum(), rel=1e-4)
