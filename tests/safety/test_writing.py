"""A disk that is full, or may not be written: one sentence, and nothing half written stays."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from editcli.__main__ import main
from editcli.storage.checkpoint import file_digest
from tests.support.commands import COMMANDS


@contextmanager
def files_of(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes, as a disk that is full lets none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in folder.rglob("*") if path.is_file()}


SLOW = [pytest.param(size, marks=pytest.mark.slow) for size in (3_000, 100_000)]


@pytest.mark.parametrize("size", [10, *SLOW])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    name: str,
    size: int,
    template: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = shutil.copytree(template, tmp_path / "work")
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = tree(work)
    capsys.readouterr()
    with files_of(size):
        code = main(["-q", *COMMANDS[name]])
    said = capsys.readouterr().err
    assert code in (0, 1), said
    assert code == 1 or size > 10
    assert said.count("error: ") == code, said
    assert not [path for path in tmp_path.rglob(".*") if path.suffix in (".tmp", ".partial")]
    if code == 0:
        return
    if name not in ("apply", "resume", "undo", "bench", "tune"):
        assert tree(work) == before
        assert not (work / "new").exists()
    # A stream or a search keeps what was done, and goes on from there.
    begun = name in ("apply", "tune") and (work / "new").exists()
    assert main(["-q", *COMMANDS[name], *(["--resume"] if begun else [])]) == 0
