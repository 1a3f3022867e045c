"""The relative change along leading singular directions: numpy's, by hand, and at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from editcli.linalg.directions import LEADING, along, change_along, leading_directions, relative_change


def matrix(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (5, 7)])
def test_it_equals_its_definition(shape: tuple[int, int]) -> None:
    base, edited = matrix(shape), matrix(shape) + 0.3 * matrix(shape, 1)
    left, values, right = np.linalg.svd(base.numpy(), full_matrices=False)
    k = min(LEADING, *shape)
    written = [left[:, i] @ (edited - base).numpy() @ right[i] for i in range(k)]
    expected = np.mean([abs(one) / value for one, value in zip(written, values, strict=False)])
    assert change_along(base, edited) == pytest.approx(expected, rel=1e-9)


def test_by_hand() -> None:
    """diag(4, 2) becomes ((5, 9), (9, 1)): 1/4 along the first direction, 1/2 along the second; the rest is nothing."""
    base = torch.diag(torch.tensor([4.0, 2.0]))
    edited = torch.tensor([[5.0, 9.0], [9.0, 1.0]])
    assert change_along(base, edited) == pytest.approx((1 / 4 + 1 / 2) / 2)


def test_equal_steps_of_random_sign_add_up_to_the_root_of_their_number() -> None:
    """A walk of n unit steps of c along a direction of sigma ends near sqrt(n) c; its square is n c^2 on average."""
    base, steps, n = torch.diag(torch.tensor([2.0])), torch.Generator().manual_seed(0), 64
    ends = [(torch.randint(2, (n,), generator=steps) * 2.0 - 1).sum() * 0.1 for _ in range(400)]
    squares = [(change_along(base, base + end) or 0.0) ** 2 for end in ends]
    assert np.mean(squares) == pytest.approx(n * 0.1**2 / 2.0**2, rel=0.2)


def test_an_unchanged_weight_has_not_moved_and_neither_has_one_changed_elsewhere() -> None:
    base = matrix((40, 90)).float()
    assert change_along(base, base) == 0
    directions = leading_directions(base)
    across = directions.left[:, :1] @ directions.right[:, 1:2].T
    assert change_along(base, base + across.float()) == pytest.approx(0, abs=1e-6)


def test_of_a_base_of_zeros_there_is_none() -> None:
    assert change_along(torch.zeros(4, 6), torch.ones(4, 6)) is None


def test_a_direction_without_a_singular_value_does_not_count() -> None:
    base = torch.diag(torch.tensor([4.0, 0.0]))
    assert change_along(base, base + torch.eye(2)) == pytest.approx(1 / 4)


def test_a_large_matrix_is_estimated_near_the_exact_figure() -> None:
    # A decaying spectrum, as trained weights have, on top of noise.
    base = (matrix((1100, 1200)) + 40 * matrix((1100, 20), 1) @ matrix((20, 1200), 2)).float()
    edited = base + 0.5 * matrix((1100, 1200), 3).float()
    left, values, right = np.linalg.svd(base.double().numpy(), full_matrices=False)
    change = (edited - base).double().numpy()
    expected = np.mean([abs(left[:, i] @ change @ right[i]) / values[i] for i in range(LEADING)])
    assert change_along(base, edited) == pytest.approx(expected, rel=0.05)
    assert change_along(base, edited) == change_along(base, edited)


def test_rows_in_parts_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base, edited = matrix((40, 90)), matrix((40, 90), 1)
    directions = leading_directions(base)
    whole = along(directions, edited)
    monkeypatch.setattr("editcli.linalg.directions._CHUNK", 200)
    torch.testing.assert_close(along(directions, edited), whole, rtol=1e-12, atol=1e-12)
    assert relative_change(directions, whole, whole) == 0
