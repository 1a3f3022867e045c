"""Which runs can be exported: those whose folder is their result, on the base that they were made from."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from editcli.errors import EditError, OptionError, StateError
from editcli.export.recipe import FORMATS, ExportRecipe, PatchRecipe
from editcli.export.run import apply_patch
from editcli.runs.stream import Stream
from tests.support.exports import change_weight, files, model_files


def rewrite(run: Path, **fields: Any) -> None:
    path = run / "editcli" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("status", ["running", "interrupted"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_run_that_is_not_finished_is_refused(
    run: Path, make: Callable[..., Any], tmp_path: Path, status: str, form: str
) -> None:
    """Its model folder is of an earlier state, or is not there at all."""
    rewrite(run, status=status)
    with pytest.raises(StateError, match=f"is {status}, .* finish it with 'editcli apply --resume'"):
        make(run, form)
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_interrupted_is_exported_once_it_was_resumed(
    edit: Callable[..., Path],
    runs: Callable[[str], Path],
    make: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def apply(self: Stream, requests: Any, real: Any = Stream.apply) -> Any:
        report = real(self, requests)
        if report.step == 2:
            signal.raise_signal(signal.SIGINT)
        return report

    with monkeypatch.context() as patched:
        patched.setattr(Stream, "apply", apply)
        run = edit("linear", tmp_path / "cut", ends="interrupted")
    with pytest.raises(StateError, match="is interrupted"):
        make(run, "lora")
    edit("linear", run, resume=True)
    make(run, "patch", out="resumed")
    make(runs("linear"), "patch", out="unbroken")
    name = "patch.safetensors"
    assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_a_run_that_a_guard_stopped_is_exported(run: Path, make: Callable[..., Any]) -> None:
    rewrite(run, status="stopped")
    assert make(run, "patch").status == "stopped"


def test_what_is_no_run_is_refused(bases: Callable[[str], Path], make: Callable[..., Any], tmp_path: Path) -> None:
    for folder in (bases("linear"), tmp_path / "none"):
        with pytest.raises(StateError, match="is not a run of editcli"):
            make(folder, "lora")


@pytest.mark.parametrize("fields", [{"provenance": {}}, {"recipe": {}}, {"provenance": None}])
def test_a_record_that_does_not_say_how_the_run_was_made_is_refused(
    run: Path, make: Callable[..., Any], fields: dict[str, Any]
) -> None:
    rewrite(run, **fields)
    with pytest.raises(StateError, match=r"run.json (does not say how the run was made|is not a record)"):
        make(run, "full")


def test_a_base_that_moved_is_asked_for(
    run: Path, bases: Callable[[str], Path], make: Callable[..., Any], tmp_path: Path
) -> None:
    provenance = json.loads((run / "editcli/run.json").read_text())["provenance"]
    lost = {"base": {**provenance["base"], "folder": str(tmp_path / "gone"), "name": "./gone"}}
    rewrite(run, provenance={**provenance, **lost})
    with pytest.raises(EditError, match="--base MODEL"):
        make(run, "patch")
    # A plain folder needs no base.
    make(run, "full", out="full")
    make(run, "patch", base=str(bases("linear")))


def test_another_model_is_not_the_base(run: Path, bases: Callable[[str], Path], make: Callable[..., Any]) -> None:
    with pytest.raises(StateError, match=r"is not the model that .* was made from"):
        make(run, "lora", base=str(bases("tied")))


def test_a_folder_that_was_changed_since_is_refused(run: Path, make: Callable[..., Any]) -> None:
    change_weight(run, 0, lambda weight: weight + 1)
    with pytest.raises(StateError, match="though the run did not edit it"):
        make(run, "lora")
    with pytest.raises(StateError, match="though the run did not edit it"):
        make(run, "patch")


@pytest.mark.parametrize("form", FORMATS)
def test_an_edited_tensor_that_was_changed_since_is_refused(run: Path, make: Callable[..., Any], form: str) -> None:
    change_weight(run, 1, lambda weight: weight + 1)
    with pytest.raises(StateError, match="is not what the run wrote"):
        make(run, form)


def test_a_run_that_goes_on_meanwhile_is_not_exported(
    run: Path, make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from editcli.export import run as module

    def write_patch(*arguments: Any, real: Any = module.write_patch) -> None:
        real(*arguments)
        rewrite(run, status="running")

    monkeypatch.setattr(module, "write_patch", write_patch)
    with pytest.raises(StateError, match="changed by another process"):
        make(run, "patch")
    assert not (tmp_path / "out").exists()


def test_a_plain_folder_can_be_exported_again(
    run: Path, make: Callable[..., Any], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """It has the record and no state: what it changed is found in its weights."""
    make(run, "full", out="plain")
    plain = tmp_path / "plain"
    assert {path.name for path in (plain / "editcli").iterdir()} == {"run.json"}
    first, second = make(run, "lora", out="one"), make(plain, "lora", out="two", base=str(bases("linear")))
    assert [site.rank for site in first.sites] == [site.rank for site in second.sites]
    make(plain, "full", out="again")
    assert files(tmp_path / "again") == files(plain)


def test_a_base_of_the_hub_is_named_by_its_id_and_commit(
    edit: Callable[..., Path],
    bases: Callable[[str], Path],
    make: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / commit
    patch_of: dict[str, Path] = {}

    def snapshot_download(name: str, *, revision: str | None = None, **options: Any) -> str:
        assert revision in ("v1", commit)
        return str(patch_of.get(name, cached))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    shutil.copytree(bases("linear"), cached)
    run = edit("linear", tmp_path / "run", model="someone/tiny@v1")
    base = json.loads((run / "editcli/run.json").read_text())["provenance"]["base"]
    assert (base["name"], base["revision"], base["commit"]) == ("someone/tiny", "v1", commit)
    # The cache moved: the base is fetched again, at the commit that was edited.
    shutil.move(tmp_path / "hub", tmp_path / "moved")
    cached = tmp_path / "moved" / "models--someone--tiny" / "snapshots" / commit
    report = make(run, "lora")
    assert report.base == "someone/tiny"
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/tiny", commit)
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: someone/tiny" in card
    assert f'from_pretrained("someone/tiny", revision="{commit}")' in card
    make(run, "patch", out="patch")
    patch_of["someone/patch"] = tmp_path / "patch"
    recipe = PatchRecipe(base="someone/tiny@v1", patch="someone/patch@v1", out=str(tmp_path / "rebuilt"))
    assert apply_patch(recipe).different == ()
    assert model_files(tmp_path / "rebuilt") == model_files(run)


@pytest.mark.parametrize(
    "choices",
    [
        {"format": "gguf"},
        {"format": "patch", "rank": 4},
        {"rank": 0},
        {"sample": 0},
        {"private": True},
        {"revision": "v1"},
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(choices: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        ExportRecipe(run="none", **choices)


def test_the_folder_is_named_after_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ExportRecipe(run="some/where/facts-edited/").out == "facts-edited-lora"
    assert ExportRecipe(run=".", format="full").out == f"{tmp_path.name}-full"
    assert PatchRecipe(base="base", patch="some/facts-patch").out == "facts-patch-applied"
