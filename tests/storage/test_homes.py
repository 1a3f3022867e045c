"""Paths that begin with a home: of this user, and of one who is not known."""

from pathlib import Path

import pytest

from editcli.__main__ import main
from editcli.storage.opening import expanded


def test_a_home_is_filled_in() -> None:
    assert expanded("~/model") == Path.home() / "model"
    assert expanded(Path("model")) == Path("model")


def test_a_home_that_is_not_known_stays_as_it_is() -> None:
    assert expanded("~no-such-user/model") == Path("~no-such-user/model")


def test_a_model_in_a_home_that_is_not_known_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "~no-such-user/model"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "~no-such-user/model" in said
    assert "Traceback" not in said
