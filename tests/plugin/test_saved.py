"""The saved state of a component: every reader gives what was declared, or one sentence that names the part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from editcli.errors import StateError
from editcli.plugin import SavedState, State


@dataclass(frozen=True)
class Share:
    share: float
    sites: dict[str, int]

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError("share must lie between 0 and 1")


def saved(name: str = "q", tensor: torch.Tensor | None = None, **fields: Any) -> SavedState:
    return SavedState("mine", State({} if tensor is None else {name: tensor}, fields))


def test_what_fits_is_given_back_as_it_is() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert saved("q", matrix).tensor("q", (2, 3)) is matrix
    assert saved("q", matrix).tensor("q", (None, 3), least=0) is matrix
    assert saved("n", torch.tensor(7)).count("n") == 7
    assert saved(share=1, sites={"a": 2}).fields(Share) == Share(1.0, {"a": 2})
    assert ("q" in saved("q", matrix), "n" in saved("q", matrix)) == (True, False)


@pytest.mark.parametrize(
    ("tensor", "clause"),
    [
        (None, "has no q"),
        (torch.zeros(3, 2), r"q is float32 \(3, 2\) in place of float32 or float64 \(2 x 3\)"),
        (torch.zeros(6), r"q is float32 \(6,\)"),
        (torch.zeros(2, 3, dtype=torch.int64), "q is int64"),
        (torch.zeros(2, 3, dtype=torch.bfloat16), "q is bfloat16"),
        (torch.full((2, 3), torch.inf), "q holds numbers that are not finite"),
        (torch.full((2, 3), -1.0), "q holds numbers below 0"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tensor: torch.Tensor | None, clause: str) -> None:
    with pytest.raises(StateError, match=rf"the saved state of mine .*{clause}.*backup"):
        saved("q", tensor).tensor("q", (2, 3), least=0)


@pytest.mark.parametrize("tensor", [torch.tensor(-1), torch.tensor(1.0), torch.tensor([1]), torch.tensor(True)])
def test_a_count_is_one_whole_number(tensor: torch.Tensor) -> None:
    with pytest.raises(StateError, match=r"mine .*n "):
        saved("n", tensor).count("n")


@pytest.mark.parametrize(
    ("fields", "clause"),
    [
        ({}, "share"),
        ({"share": "x", "sites": {}}, "share: Expected `float`"),
        ({"share": 0.5, "sites": {"a": 0.5}}, "sites"),
        ({"share": 2, "sites": {}}, "share must lie between 0 and 1"),
    ],
)
def test_a_field_that_does_not_fit_is_named(fields: dict[str, object], clause: str) -> None:
    with pytest.raises(StateError, match=rf"mine .*{clause}"):
        saved(**fields).fields(Share)
