"""Models by hub id, with the hub faked: nothing here reaches a network."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from editcli.errors import ModelError
from editcli.models.loading import BUNDLED, bundled_folder, open_model, resolve_model
from editcli.runs.history import History
from editcli.runs.state import RunFolder
from editcli.testing import tiny_model_folder


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[str, dict[str, Any]]]:
    """Make the hub give ``answer``, a folder or an error; return the list that the calls are kept in."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append((name, options))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


def refused(kind: type[Exception]) -> Exception:
    """Make a hub error without the response that a real one carries."""
    error = kind.__new__(kind)
    Exception.__init__(error, "made up")
    return error


def test_a_hub_id_is_fetched_and_opened_like_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "cache")
    calls = hub(monkeypatch, folder)
    source = resolve_model("someone/tiny-llama", revision="v1")
    assert (source.name, source.folder, source.revision) == ("someone/tiny-llama", folder, "v1")
    ((name, options),) = calls
    assert (name, options["revision"]) == ("someone/tiny-llama", "v1")
    assert "*.safetensors" in options["allow_patterns"]
    # Pickled weights are not even fetched.
    assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in options["allow_patterns"])
    assert open_model(source).architecture.layers


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LocalEntryNotFoundError("made up"), "the hub cannot be reached"),
        (refused(RepositoryNotFoundError), "cannot fetch someone/none from the hub"),
        (refused(GatedRepoError), "cannot fetch someone/none from the hub"),
        (HFValidationError("made up"), "cannot fetch someone/none from the hub"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    hub(monkeypatch, error)
    with pytest.raises(ModelError, match=said) as caught:
        resolve_model("someone/none")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["./none", "/none/at/all", "a/b/c", "no such model", "a/b@", "a/b@x y", "@v1"])
def test_what_cannot_be_a_hub_id_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    calls = hub(monkeypatch, AssertionError("the hub was asked"))
    with pytest.raises(ModelError, match="there is no model folder"):
        resolve_model(path)
    assert calls == []


@pytest.mark.parametrize("revision", ["v1", "refs/pr/3", "0" * 40])
def test_a_hub_id_may_name_its_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, revision: str) -> None:
    """Wherever a model can be named, so can its revision; the commit that it was is told by the hub's cache."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tiny_model_folder(tmp_path / "models--someone--tiny" / "snapshots" / commit)
    calls = hub(monkeypatch, folder)
    source = resolve_model(f"someone/tiny@{revision}")
    assert (source.name, source.revision, source.commit) == ("someone/tiny", revision, commit)
    assert [(name, options["revision"]) for name, options in calls] == [("someone/tiny", revision)]
    assert resolve_model(f"someone/tiny@{revision}", revision=revision) == source
    with pytest.raises(ModelError, match="give one of them"):
        resolve_model(f"someone/tiny@{revision}", revision="other")
    assert resolve_model(None).commit is None


def test_a_run_records_the_commit_and_finds_its_base_by_it(tmp_path: Path) -> None:
    base = {"name": "someone/tiny", "folder": str(tmp_path / "gone"), "revision": "v1", "commit": "0" * 40}
    assert History(RunFolder(tmp_path), {"provenance": {"base": base}}, ()).bases == (
        str(tmp_path / "gone"),
        "someone/tiny@" + "0" * 40,
    )


def test_no_model_and_its_name_are_the_bundled_one() -> None:
    assert resolve_model(None) == resolve_model(BUNDLED)
    assert resolve_model(None).folder == bundled_folder()


def test_a_file_and_a_folder_without_a_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(tmp_path / "file")
    with pytest.raises(ModelError, match=r"without config\.json"):
        resolve_model(tmp_path)


def test_a_run_that_has_written_no_model_yet_is_told_apart_from_a_folder_of_something_else(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create()
    run.state.touch()
    with pytest.raises(ModelError, match=r"has written no model yet.*--resume"):
        resolve_model(tmp_path)
    # As in an exported adapter, which has the record of its run.
    run.state.rename(run.record)
    with pytest.raises(ModelError, match=r"without config\.json"):
        resolve_model(tmp_path)
