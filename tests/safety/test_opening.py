"""Files that are none, in the place of every kind of file: one sentence, at once, and nothing written."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rights import without_rights
from benchmarks.special_files import SPARSE, a_socket, endless, folder, pipe, sparse
from editcli.__main__ import main
from editcli.errors import FileError, MissingFileError, StateError
from editcli.requests.reader import read_edits
from editcli.storage import opening
from editcli.storage.files import atomic, write_bytes
from editcli.storage.folders import new_folder
from editcli.storage.opening import EDITS, KINDS, RECORD, TEMPLATE, check, is_there, open_regular, read_bytes, read_text

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes and devices lie in folders on POSIX systems alone")

STRANGE = {
    "pipe": pipe,
    "endless": endless,
    "socket": a_socket,
    "folder": folder,
    "sparse": sparse,
}


@pytest.fixture
def impatient() -> Iterator[None]:
    """Fail instead of waiting for ever for somebody who writes to a pipe."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError("the command hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run(work: Path, model: Path, apply: Callable[..., int]) -> Path:
    """A finished run with a copy of its base beside it."""
    shutil.copytree(model, work / "base")
    assert apply("--out", "out", base=work / "base") == 0
    return work / "out"


@pytest.mark.usefixtures("impatient")
class TestOpener:
    @pytest.mark.parametrize("strange", STRANGE)
    @pytest.mark.parametrize("belongs", [True, False])
    def test_what_is_no_file_of_its_kind_is_refused_unread(self, strange: str, belongs: bool, tmp_path: Path) -> None:
        path = tmp_path / "run.json"
        STRANGE[strange](path)
        with pytest.raises(FileError, match=rf"^cannot read {re.escape(str(path))}: it is .*; .*") as caught:
            read_bytes(path, RECORD, folder=tmp_path if belongs else None)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 1

    def test_a_missing_file_is_both_of_our_tree_and_of_pythons(self, tmp_path: Path) -> None:
        with pytest.raises(MissingFileError) as caught:
            read_bytes(tmp_path / "none", RECORD)
        assert isinstance(caught.value, FileNotFoundError)
        assert caught.value.errno == errno.ENOENT
        with pytest.raises(FileError, match="its name cannot be one"):
            read_bytes("a\0b", RECORD)

    def test_a_file_without_permission_is_one_sentence(self, tmp_path: Path) -> None:
        path = tmp_path / "x"
        path.write_text("x")
        path.chmod(0)
        with without_rights() as hold:
            assert hold, "this test shows nothing where permissions do not hold"
            with pytest.raises(FileError, match="there is no permission to read it"):
                read_bytes(path, RECORD)
            tmp_path.chmod(0)
            with pytest.raises(FileError, match="there is no permission to read it"):
                is_there(path)
        tmp_path.chmod(0o755)
        assert (is_there(path), is_there(tmp_path / "none"), is_there("a\0b")) == (True, False, False)

    def test_the_limit_of_a_kind_is_exact(self, tmp_path: Path) -> None:
        path = tmp_path / "template.jinja"
        path.write_bytes(b"x" * TEMPLATE.limit)
        assert len(read_text(path, TEMPLATE)) == TEMPLATE.limit
        path.write_bytes(b"x" * (TEMPLATE.limit + 1))
        with pytest.raises(FileError, match=r"larger than 4,194,304 bytes, the most that a chat template may have"):
            check(path, TEMPLATE)

    def test_a_small_file_takes_no_memory_for_what_its_kind_allows(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"x")
        assert {read_bytes(tmp_path / "x", kind) for kind in KINDS} == {b"x"}

    def test_a_file_that_grows_is_refused_while_it_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "template.jinja"
        path.write_bytes(b"x")
        for read in (lambda file: file.read(), lambda file: list(iter(lambda: file.read(1 << 20), b""))):
            with open_regular(path, TEMPLATE) as file:
                with path.open("r+b") as growing:
                    growing.truncate(SPARSE)
                with pytest.raises(FileError, match="larger than"):
                    read(file)
            os.truncate(path, 1)

    def test_links_are_followed_within_a_folder_and_to_where_the_user_points(self, tmp_path: Path) -> None:
        inside, outside = tmp_path / "inside", tmp_path / "outside"
        inside.mkdir()
        outside.mkdir()
        (outside / "secret").write_text("secret")
        (inside / "plain").write_text("plain")
        (inside / "alias").symlink_to("plain")
        (inside / "out").symlink_to(outside / "secret")
        (inside / "circle").symlink_to("circle")
        (tmp_path / "named").symlink_to(inside)
        for named in (inside, tmp_path / "named"):
            assert read_text(named / "alias", RECORD, folder=named) == "plain"
            with pytest.raises(FileError, match=r"is a link to .*secret, out of its folder"):
                read_text(named / "out", RECORD, folder=named)
            with pytest.raises(FileError, match="circle"):
                read_text(named / "circle", RECORD, folder=named)
        assert read_text(inside / "out", RECORD) == "secret", "the user named it"

    def test_a_pipe_that_the_user_gives_as_edits_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "edits"
        os.mkfifo(path)
        edit = b'{"id": "a", "prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}\n'
        writer = threading.Thread(target=lambda: path.write_bytes(edit))
        writer.start()
        assert [request.id for request in read_edits(path).requests] == ["a"]
        writer.join()
        with pytest.raises(FileError, match="named pipe"):
            check(path, EDITS)

    def test_every_kind_stands_in_the_list(self) -> None:
        assert set(KINDS) == {value for value in vars(opening).values() if isinstance(value, opening.Kind)}


OF_MODEL = ("config.json", "tokenizer.json", "generation_config.json", "model.safetensors", "chat_template.jinja")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("strange", STRANGE)
def test_a_strange_file_of_a_model_is_one_sentence(
    strange: str, model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in OF_MODEL:
        copy = shutil.copytree(model, work / "copy")
        (copy / name).unlink(missing_ok=True)
        STRANGE[strange](copy / name)
        for command in (("inspect", "copy"), ("check", "facts.jsonl", "--model", "copy")):
            code = main([*command])
            said = capsys.readouterr().err
            # Edits are checked without the weights.
            assert code == 1 or (name, command[0]) == ("model.safetensors", "check"), (name, command)
            assert said.count("error: ") == (code == 1), (name, command)
            assert "copy" in said or code == 0
        shutil.rmtree(copy)


OF_RUN = ("run.json", "journal.jsonl", "state.safetensors", "updates/000001.safetensors", "updates", ".lock")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("strange", STRANGE)
def test_a_strange_record_of_a_run_is_one_sentence_and_stays(
    strange: str, run: Path, capsys: pytest.CaptureFixture[str], apply: Callable[..., int]
) -> None:
    weights = (run / "model.safetensors").read_bytes()
    capsys.readouterr()
    for name in OF_RUN:
        path, aside = run / "editcli" / name, run.parent / "aside"
        # A folder is what updates is, and a lock is held without a look at its content, so its size does no harm.
        if (strange, name) in (("folder", "updates"), ("sparse", ".lock")):
            continue
        if path.exists():
            path.rename(aside)
        STRANGE[strange](path)
        kind = os.lstat(path).st_mode
        # A run that is resumed writes its run.json anew.
        resume = ((),) if name != "run.json" else ()
        for command in (*resume, ("undo", "out"), ("inspect", "out", "--norms")):
            code = main(["-q", *command]) if command else apply("--out", "out", "--resume", base=run.parent / "base")
            said = capsys.readouterr().err
            # A table does without what it cannot read; what would write cannot.
            assert code == 1 or command[:1] == ("inspect",), (name, command)
            assert said.count("error: ") == (code == 1), (name, command, said)
            assert "Traceback" not in said
        assert os.lstat(path).st_mode == kind
        shutil.rmtree(path) if strange == "folder" else path.unlink()
        if aside.exists():
            aside.rename(path)
    assert (run / "model.safetensors").read_bytes() == weights
    assert not list(run.rglob(".*.tmp"))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("strange", STRANGE)
def test_a_strange_file_of_the_user_is_one_sentence(
    strange: str, work: Path, apply: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for option, code in (("--stats", 1), ("--corpus", 1), ("--preset", 1)):
        STRANGE[strange](work / "given")
        assert apply("--out", "out", option, "given") == code, option
        assert capsys.readouterr().err.count("error: ") == 1
        assert not (work / "out").exists()
        shutil.rmtree(work / "given") if strange == "folder" else (work / "given").unlink()
    STRANGE[strange](work / "editcli.toml")
    assert main(["inspect", "nothing"]) == 1
    assert "editcli.toml" in capsys.readouterr().err


# What is written.


def test_what_a_killed_process_left_of_a_file_is_cleared_by_the_next_and_what_a_living_one_writes_stays(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.json"
    (tmp_path / ".x.json.abandoned.tmp").write_text("half")
    (tmp_path / ".y.json.abandoned.tmp").write_text("of another file")
    with atomic(path) as file:
        file.write(b"one")
        write_bytes(path, b"two")
        assert len(list(tmp_path.glob(".x.json.*.tmp"))) == 1, "the file that is still being written"
    assert path.read_bytes() == b"one"
    assert sorted(item.name for item in tmp_path.iterdir()) == [".y.json.abandoned.tmp", "x.json"]


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    path = tmp_path / "null"
    path.symlink_to("/dev/null")
    with pytest.raises(OSError, match="it is no regular file"):
        write_bytes(path, b"x")
    assert path.is_symlink()


def test_a_new_folder_holds_no_lock_and_is_held_while_it_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as partial:
        (partial / "file").write_text("x")
        assert [path.name for path in partial.iterdir()] == ["file"]
        with pytest.raises(StateError, match="being written by another"), new_folder(out):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["file"]
