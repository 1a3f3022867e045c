import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from editcli.errors import NumericalError
from editcli.linalg.precision import working_dtype
from editcli.plugin.leastsquares import PART, InverseGram, invert, ridge, symmetrise
from editcli.reporting import Silent
from tests.support.reporters import Listener

CPU = torch.device("cpu")


def random(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size, seed=0):
    keys = random(size, 4 * size, seed=seed)
    return keys @ keys.T / (4 * size)


def inverting(gram, reporter=None):
    return InverseGram.inverting(gram, site="block.0", device=CPU, reporter=reporter or Silent())


@settings(max_examples=40, deadline=None)
@example(d_out=1, d_in=1, n=9, seed=5)
@given(d_out=st.integers(1, 9), d_in=st.integers(1, 9), n=st.integers(1, 12), seed=st.integers(0, 99))
def test_solve_and_downdate_equal_explicit_inverses(d_out, d_in, n, seed):
    gram, keys, residual = moment(d_in, seed), random(d_in, n, seed=seed + 1), random(d_out, n, seed=seed + 2)
    memory = inverting(gram)
    expected = residual @ keys.T @ torch.linalg.inv(gram + keys @ keys.T)
    torch.testing.assert_close(memory.solve(keys, residual).dense(), expected, rtol=1e-8, atol=1e-10)
    after = memory.downdated(keys).matrix
    torch.testing.assert_close(after, torch.linalg.inv(gram + keys @ keys.T), rtol=1e-8, atol=1e-8)
    assert torch.equal(after, after.T)


@pytest.mark.parametrize("n", [PART, PART + 1, 2 * PART + 300])
def test_a_batch_wider_than_a_part_is_solved_like_one_system(n):
    gram, keys, residual = moment(40), random(40, n, seed=1), random(3, n, seed=2)
    memory = inverting(gram)
    system = torch.eye(n, dtype=torch.float64) + keys.T @ memory.matrix @ keys
    expected = residual @ torch.linalg.solve(system, keys.T @ memory.matrix)
    update = memory.solve(keys, residual)
    assert update.left.shape == (3, n)
    torch.testing.assert_close(update.dense(), expected, rtol=1e-8, atol=1e-11)
    after = memory.downdated(keys).matrix
    torch.testing.assert_close(after, torch.linalg.inv(gram + keys @ keys.T), rtol=1e-8, atol=1e-11)
    assert torch.equal(after, after.T)


@pytest.mark.parametrize("block", [1, 3, 7, 64])
def test_symmetrising_in_place_equals_the_mean_with_the_transpose(block):
    matrix = random(7, 7)
    expected = (matrix + matrix.T) / 2
    assert torch.equal(symmetrise(matrix, block=block), expected)
    assert torch.equal(matrix, expected)


def test_a_downdate_leaves_the_earlier_memory_as_it_was():
    memory = inverting(moment(6))
    before = memory.matrix.clone()
    memory.downdated(random(6, 3))
    assert torch.equal(memory.matrix, before)


def test_memory_stays_accurate_over_a_long_stream():
    gram = moment(12)
    memory = inverting(gram)
    for seed in range(200):
        keys = random(12, 5, seed=seed)
        memory, gram = memory.downdated(keys), gram + keys @ keys.T
    torch.testing.assert_close(memory.matrix, torch.linalg.inv(gram), rtol=1e-8, atol=1e-12)


def test_float32_memory_stays_symmetric_and_close():
    gram, exact = moment(12), moment(12)
    memory = InverseGram(torch.linalg.inv(gram).float(), "block.0")
    for seed in range(100):
        keys = random(12, 5, seed=seed)
        memory, exact = memory.downdated(keys.float()), exact + keys @ keys.T
        assert torch.equal(memory.matrix, memory.matrix.T)
    assert memory.matrix.dtype == torch.float32
    torch.testing.assert_close(memory.matrix.double(), torch.linalg.inv(exact), rtol=1e-2, atol=1e-6)


def test_scales_far_apart_are_no_singularity():
    """Units of a real model differ by many orders of magnitude; only their correlation matters."""
    scale = torch.logspace(-8, 8, 10, dtype=torch.float64)
    gram = moment(10) * scale[:, None] * scale
    found = inverting(gram).matrix
    assert torch.allclose(scale[:, None] * found * scale, torch.linalg.inv(moment(10)), rtol=1e-9)


def test_a_unit_that_never_fired_stays_untouched_and_is_noted():
    gram = moment(6)
    gram[2], gram[:, 2] = 0, 0
    listener = Listener()
    update = inverting(gram, listener).solve(random(6, 3), random(4, 3)).dense()
    assert torch.equal(update[:, 2], torch.zeros(4, dtype=torch.float64))
    assert float(update.norm()) > 0
    assert listener.notes == ["block.0: 1 of 6 inputs never fired on the reference text and stay untouched"]


@pytest.mark.parametrize(
    "gram",
    [
        torch.zeros(4, 4, dtype=torch.float64),
        random(6, 3) @ random(6, 3).T,
        torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)),
        torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64),
    ],
    ids=["zero", "rank-deficient", "negative", "indefinite"],
)
def test_singular_and_indefinite_grams_are_refused(gram):
    with pytest.raises(NumericalError, match="singular or indefinite") as caught:
        invert(gram, site="block.0", reporter=Silent())
    assert caught.value.site == "block.0"
    assert caught.value.condition == math.inf or caught.value.condition > 1e13


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    gram, keys = moment(4), random(4, 2)
    memory = inverting(gram)
    gram[1, 1] = keys[1, 1] = value
    with pytest.raises(NumericalError, match="finite"):
        inverting(gram)
    with pytest.raises(NumericalError, match="finite"):
        memory.solve(keys, random(3, 2))


@pytest.mark.parametrize("step", ["solve", "downdate"])
def test_a_memory_that_lost_definiteness_is_refused(step):
    """Even where I + K^T C K is still definite: a slightly negative memory is wrong already."""
    memory = InverseGram(torch.diag(torch.tensor([1.0, -0.1, 1.0], dtype=torch.float64)), "block.3")
    keys = torch.eye(3, dtype=torch.float64)[:, 1:2]
    with pytest.raises(NumericalError, match="lost definiteness") as caught:
        memory.solve(keys, random(4, 1)) if step == "solve" else memory.downdated(keys)
    assert caught.value.site == "block.3"
    assert caught.value.condition is not None


def test_jitter_is_reported_and_no_more_than_rounding_needs():
    """Keys so long that float32 cannot hold the identity beside them make the plain system indefinite."""
    listener = Listener()
    memory = InverseGram(torch.eye(64), "block.1", listener)
    keys = 1e5 * random(64, 1).float() + random(64, 8, seed=5).float() * 1e-3
    update = memory.solve(keys, random(3, 8))
    assert bool(update.left.isfinite().all())
    assert len(listener.warnings) <= 1
    assert all("block.1: added" in text for text in listener.warnings)


def test_hard_constraints_are_met_exactly():
    memory, keys, residual = inverting(moment(8)), random(8, 3), random(5, 3)
    torch.testing.assert_close(memory.solve(keys, residual, exact=True).dense() @ keys, residual)


def test_ridge_is_the_solve_with_the_identity():
    keys, residual = random(7, 4), random(5, 4, seed=1)
    expected = residual @ keys.T @ torch.linalg.inv(torch.eye(7, dtype=torch.float64) + keys @ keys.T)
    torch.testing.assert_close(ridge(keys, residual, site="block.0", reporter=Silent()).dense(), expected)


def test_matrices_are_double_on_a_cpu_and_single_elsewhere():
    assert working_dtype(CPU) == torch.float64
    assert working_dtype(torch.device("meta")) == torch.float32


@pytest.mark.parametrize("condition", [1e2, 1e5])
def test_float32_updates_are_as_accurate_as_their_conditioning_allows(condition):
    """Units of very different scale, correlated, over a stream: no false alarm, and an error that is explained."""
    size = 60
    basis = torch.linalg.qr(random(size, size)).Q
    root = (
        torch.logspace(2, -2, size, dtype=torch.float64)[:, None]
        * basis
        * torch.logspace(0, -math.log10(condition) / 2, size, dtype=torch.float64)
    )
    exact = inverting(size * root @ root.T)
    single = InverseGram(exact.matrix.float(), "block.0")
    for seed in range(20):
        keys, residual = root @ random(size, 5, seed=seed), random(4, 5, seed=seed)
        expected = exact.solve(keys, residual).dense()
        error = single.solve(keys.float(), residual).dense().double() - expected
        assert error.norm() <= 1e-7 * condition * expected.norm()
        exact, single = exact.downdated(keys), single.downdated(keys.float())


@settings(max_examples=40, deadline=None)
@given(d_in=st.integers(2, 12), n=st.integers(1, 6), m=st.integers(1, 6), seed=st.integers(0, 99))
def test_letting_go_of_keys_is_never_having_had_them(d_in, n, m, seed):
    gram, stays, goes = moment(d_in, seed), random(d_in, n, seed=seed + 1), random(d_in, m, seed=seed + 2)
    memory = inverting(gram).downdated(stays).downdated(goes)
    assert memory.releasable(goes) == list(range(m))
    left = memory.released(goes).matrix
    torch.testing.assert_close(left, torch.linalg.inv(gram + stays @ stays.T), rtol=1e-7, atol=1e-8)
    assert torch.equal(left, left.T)
    # Batches may go in parts and in another order than they came.
    again = memory.released(stays).downdated(stays)
    torch.testing.assert_close(again.matrix, memory.matrix, rtol=1e-7, atol=1e-8)


def test_only_keys_that_were_remembered_can_go():
    """A key that is not in the memory would make it indefinite; those beside it go all the same."""
    memory, inside = inverting(moment(8)), random(8, 3, seed=1)
    memory = memory.downdated(inside)
    strange = 5 * random(8, 1, seed=2)
    mixed = torch.cat([inside[:, :1], strange, inside[:, 1:], inside[:, :1]], dim=1)
    assert memory.releasable(mixed) == [0, 2, 3]
    with pytest.raises(NumericalError, match="definiteness"):
        memory.released(mixed)


def test_what_rounds_away_cannot_go():
    """Where I - K^T Q K is rounding, letting go would make the memory of it."""
    memory = inverting(1e-18 * moment(8)).downdated(random(8, 2, seed=1))
    assert memory.releasable(random(8, 2, seed=1)) == []
