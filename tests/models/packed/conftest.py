"""What the tests of the formats of few bits share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="class")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the format of a test class, which is made once and must not be changed."""
    return request.cls.make(tmp_path_factory.mktemp("packed") / "model")
