"""The commands ``export`` and ``apply-patch``: tables, JSON, exit codes, help."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from editcli.__main__ import main

KEYS = {"format", "run", "status", "out", "base", "exact", "bytes", "files", "tensors", "sites", "efficacy", "pushed"}


@pytest.fixture
def editcli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command in a folder of the test's own; return its exit code and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str | Path) -> SimpleNamespace:
        capsys.readouterr()
        code = main([*map(str, arguments)])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run


def test_an_adapter_ends_with_one_table(editcli: Any, runs: Callable[[str], Path]) -> None:
    done = editcli("export", runs("linear"), "--device", "cpu", "--out", "adapter")
    assert done.code == 0
    for shown in ("lora", "adapter_model.safetensors", "efficacy_accuracy", "rank", "relative error", "adapter/"):
        assert shown in done.out
    assert "model.layers.1.mlp.down_proj" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert "\x1b" not in done.out


@pytest.mark.parametrize("form", ["lora", "patch", "full"])
def test_json_is_one_document(editcli: Any, runs: Callable[[str], Path], tmp_path: Path, form: str) -> None:
    done = editcli("export", runs("linear"), "--format", form, "--no-eval", "--device", "cpu", "--json", "--out", "out")
    assert done.code == 0
    document = json.loads(done.out)
    assert set(document) == KEYS
    assert (document["format"], document["out"], document["exact"]) == (form, "out", True)
    sizes = {file["name"]: file["bytes"] for file in document["files"]}
    there = {p.relative_to(tmp_path / "out").as_posix(): p.stat().st_size for p in Path("out").absolute().rglob("*.*")}
    assert sizes == there
    assert document["bytes"] == sum(sizes.values())
    assert len(document["tensors"]) == 2
    assert [site["exact"] for site in document["sites"]] == ([True, True] if form == "lora" else [])


def test_a_patch_is_applied(editcli: Any, runs: Callable[[str], Path], bases: Callable[[str], Path]) -> None:
    done = editcli("export", runs("linear"), "-f", "patch", "--out", "patch")
    assert done.code == 0
    assert "2 tensors" in done.out
    done = editcli("apply-patch", bases("linear"), "patch")
    assert (done.code, done.err) == (0, "")
    assert "byte for byte" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert Path("patch-applied/model.safetensors").is_file()
    document = json.loads(editcli("apply-patch", bases("linear"), "patch", "--out", "two", "--json").out)
    assert set(document) == {"base", "patch", "out", "bytes", "identical", "different", "files", "tensors"}
    assert document["identical"] is True


def test_what_cannot_be_done_is_one_line_and_an_exit_code(
    editcli: Any, runs: Callable[[str], Path], bases: Callable[[str], Path]
) -> None:
    for code, arguments, said in (
        (1, ("export", bases("linear")), bases("linear").name),
        (1, ("export", runs("linear"), "--format", "patch", "--rank", "3"), "--rank"),
        (1, ("apply-patch", bases("linear"), runs("linear")), "is no patch"),
        (1, ("apply-patch", "someone/none", "none"), "is no patch"),
        (2, ("export", runs("linear"), "--format", "gguf"), "--format"),
        (2, ("export", runs("linear"), "--rank", "0"), "--rank"),
        (2, ("apply-patch", bases("linear")), "PATCH"),
    ):
        done = editcli(*arguments)
        assert (done.code, done.out) == (code, ""), done.err
        (line,) = done.err.splitlines()
        assert said in line
    assert not list(Path().iterdir())
