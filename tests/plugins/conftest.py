"""Sessions without a model, for a wide, a tall and a square weight."""

from __future__ import annotations

import pytest

from tests.support.sessions import SHAPES, FakeSession


@pytest.fixture(params=SHAPES, ids=["wide", "tall", "square"])
def session(request: pytest.FixtureRequest) -> FakeSession:
    """A fresh session; half of its second moment's eigenvalues are small."""
    return FakeSession(request.param, small=request.param[1] // 2)
