"""Files and folders without permissions: every command says so in one sentence, and goes on once they are given."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.rights import without_rights
from editcli.__main__ import main
from editcli.storage.checkpoint import file_digest
from tests.support.commands import COMMANDS, CPU

READ_ONLY = {
    "inspect": ("inspect", "run", "--norms", "--base", "base"),
    "diff": ("diff", "base", "run", *CPU),
    "check": ("check", "facts.jsonl", "--model", "base"),
    "eval": ("eval", "run", "facts.jsonl", "--base=base", "--text", "text.txt", *CPU),
}
MODEL = ("base", "base/config.json", "base/tokenizer.json", "base/model.safetensors")
RUN = (
    *("run", "run/editcli", "run/editcli/run.json", "run/editcli/journal.jsonl", "run/editcli/state.safetensors"),
    *("run/editcli/updates", "run/editcli/updates/000001.safetensors"),
)
RESULT = ("run", "run/editcli", "run/editcli/run.json", "run/model.safetensors")
READ: Mapping[str, tuple[str, ...]] = {
    "apply": ("facts.jsonl", "corpus.txt", *MODEL),
    "resume": ("more.jsonl", *RUN),
    "undo": RUN,
    "export lora": (*RESULT, *MODEL),
    "export patch": RESULT,
    "export full": RESULT,
    "apply-patch": ("patch", "patch/manifest.json", "patch/patch.safetensors", "patch/editcli/run.json", *MODEL),
    "stats": ("corpus.txt", *MODEL),
    "bench": ("facts.jsonl", *MODEL),
    "tune": ("facts.jsonl", "corpus.txt", "text.txt", *MODEL),
    "convert": ("array.json",),
    "report": ("run", "run/editcli", "run/model.safetensors", "base", "base/model.safetensors"),
    "inspect": ("run", "run/editcli", "run/model.safetensors", "base", "base/model.safetensors"),
    "diff": (*MODEL[1:2], "run", "run/model.safetensors", "base", "base/model.safetensors"),
    "check": ("facts.jsonl", *MODEL),
    "eval": ("facts.jsonl", "text.txt", "run", "run/config.json", "run/tokenizer.json", "run/model.safetensors"),
}
"""What each command needs to read."""
WRITTEN: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(COMMANDS, (".",)),
    **dict.fromkeys(("resume", "undo"), ("run", "run/editcli", "run/editcli/updates")),
}
"""The folders that each command writes into."""


@contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    """Give a file or folder other permissions for a while."""
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        yield
    finally:
        path.chmod(before)


def tree(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.name != ".lock")
    return {path.relative_to(folder).as_posix(): file_digest(path) if path.is_file() else "" for path in paths}


@pytest.mark.parametrize("name", READ)
def test_what_may_not_be_read_or_written_is_one_sentence(
    name: str, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = shutil.copytree(template, tmp_path / "work")
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command, before = {**COMMANDS, **READ_ONLY}[name], tree(work)
    denied = [(path, 0) for path in READ[name]] + [(path, 0o555) for path in WRITTEN.get(name, ())]
    for path, bits in denied:
        capsys.readouterr()
        with without_rights() as hold, mode(work / path, bits):
            assert hold, "this test shows nothing where permissions do not hold"
            code = main(["-q", *command])
        said = capsys.readouterr().err
        sentences = [line for line in said.splitlines() if line.startswith("error: ")]
        # An edits file that cannot be used has an exit code of its own.
        assert (code, len(sentences)) in [(1, 1), (2 if path.endswith((".jsonl", ".json")) else 1, 1)], (path, said)
        assert "permission" in sentences[0].lower(), (path, said)
        assert tree(work) == before, path
        assert not [path for path in work.rglob(".*") if path.suffix in (".tmp", ".partial")]
    assert main(["-q", *command]) == 0, capsys.readouterr().err


def test_a_cache_that_may_not_be_written_costs_time_alone(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "work"))
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for bits in (0o555, 0):
        with without_rights() as hold, mode(cache, bits):
            assert hold
            assert main(["-q", *COMMANDS["apply"][:-1], f"out-{bits}"]) == 0, capsys.readouterr().err
