"""A run that will take long on a CPU says so before it starts, with what shortens it."""

from __future__ import annotations

from pathlib import Path

import pytest

from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.requests.schema import EditRequest
from editcli.runs import forecast as foresight
from editcli.runs.forecast import foresee
from editcli.settings.core import TargetOptions
from editcli.testing import tiny_model_folder
from editcli.testing.sessions import tiny_requests


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return open_model(resolve_model(tiny_model_folder(tmp_path_factory.mktemp("ahead") / "model")), device="cpu")


def many(count: int) -> list[EditRequest]:
    return tiny_requests(4) * (count // 4)


def test_what_is_short_on_any_cpu_is_not_even_measured(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight.targets, "optimise", None)
    assert foresee(loaded, many(40), (1,), TargetOptions()) is None


def test_a_long_run_is_foreseen_in_proportion_to_its_edits(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foresight, "LONG", 0.01)
    monkeypatch.setattr(foresight, "SLOW", 1.0)
    # The clock of a busy machine would measure another speed each time.
    ticks = iter(range(100))
    monkeypatch.setattr(foresight.time, "perf_counter", lambda: float(next(ticks)))
    few, more, shared = (
        foresee(loaded, many(count), (1,), TargetOptions(), parts=parts)
        for count, parts in ((40, 1), (400, 1), (400, 2))
    )
    assert few is not None
    assert more is not None
    assert shared is not None
    assert more.seconds == pytest.approx(10 * few.seconds)
    assert shared.seconds == pytest.approx(more.seconds / 2)
    assert [setting for setting, _ in more.remedies] == ["targets.prefixes=1", "targets.steps=12"]
    assert all(seconds < 0.6 * more.seconds for _, seconds in more.remedies)
    cheap = foresee(loaded, many(400), (1,), TargetOptions(prefixes=1, steps=10))
    assert cheap is not None
    assert cheap.remedies == (), "nothing is left that would help"


def test_apply_warns_before_it_starts(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from editcli.__main__ import main

    monkeypatch.setattr(foresight, "LONG", 1e-9)
    monkeypatch.setattr(foresight, "SLOW", 1.0)
    edits, text = tmp_path / "facts.jsonl", tmp_path / "corpus.txt"
    edits.write_text('{"prompt": "{} lives in", "subject": "Ann", "target_new": "Paris"}\n')
    text.write_text("The city of Paris is in France. Ann lives in Rome. " * 50)
    given = ("apply", str(edits), "--model", str(loaded.source.folder), "--corpus", str(text), "--device", "cpu")
    assert main([*given, "--no-eval", "-o", "targets.steps=20", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "warning: the targets of 1 edit take up to" in said
    assert said.index("-o targets.prefixes=1") < said.index("-o targets.steps=10")
