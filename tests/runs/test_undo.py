"""Taking back batches and edits: bit by bit the stream that never had them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from editcli.errors import OptionError, StateError
from editcli.records.recovery import recover
from editcli.records.state import RunFolder
from editcli.runs.undo import Undo, plan_undo
from tests.support.facts import CAPITALS
from tests.support.workshop import STACKS, STOP_AFTER, same_stream, weights

pytestmark = pytest.mark.slow


@pytest.fixture
def stopped(shop: Any) -> Callable[..., Path]:
    """Return the folder of a run whose guard stopped it after ``step`` batches, so that its model is saved."""

    def stopped(stack: str, step: int) -> Path:
        prelude = (
            "from editcli.errors import GuardError\nfrom editcli.runs.stream import Stream\n"
            "def apply(self, requests, real=Stream.apply):\n"
            f"    if self.position.step == {step}: raise GuardError('stopped')\n"
            "    return real(self, requests)\n"
            "Stream.apply = apply"
        )
        ended = shop.apply(f"stopped-{step}", *STACKS[stack], prelude=prelude)
        assert ended.code == 3, ended.err
        return shop.folder / f"stopped-{step}"

    return stopped


@pytest.fixture
def run(shop: Any, finished: Callable[[str], Path]) -> Callable[[str], Path]:
    """Return a copy of a finished run of four batches."""
    return lambda stack: Path(shutil.copytree(finished(stack), shop.folder / "out"))


def undo(shop: Any, *arguments: str, prelude: str = "") -> Any:
    ended = shop.run("undo", "out", *arguments, prelude=prelude)
    assert ended.code == 0, ended.err
    return ended


def history(out: Path) -> list[bytes]:
    return (out / "editcli/journal.jsonl").read_bytes().splitlines()


@pytest.mark.parametrize("stack", list(STACKS))
def test_undone_batches_leave_a_stream_that_stopped_there(
    shop: Any,
    run: Callable[[str], Path],
    stopped: Callable[..., Path],
    finished: Callable[[str], Path],
    stack: str,
) -> None:
    out = run(stack)
    before = history(out)
    undo(shop)
    same_stream(out, stopped(stack, 3))
    undo(shop, "--to", "1")
    same_stream(out, stopped(stack, 1))
    assert history(out)[:4] == before
    assert [json.loads(line)["kind"] for line in history(out)[4:]] == ["undo", "undo"]
    assert shop.apply("out", *STACKS[stack], "--resume").code == 0
    same_stream(out, finished(stack))


def test_everything_can_be_taken_back(
    shop: Any, run: Callable[[str], Path], finished: Callable[[str], Path], model: Path
) -> None:
    out = run("alphaedit")
    undo(shop, "--batches", "4")
    assert weights(out) == weights(model)
    assert shop.apply("out", *STACKS["alphaedit"], "--resume").code == 0
    same_stream(out, finished("alphaedit"))


def without(edits: Sequence[dict[str, Any]], *ids: str) -> list[dict[str, Any]]:
    return [edit for edit in edits if edit["id"] not in ids]


@pytest.mark.parametrize("stack", ["alphaedit", "rlsedit"])
def test_an_edit_in_the_middle_goes_and_what_followed_is_computed_again(shop: Any, stack: str) -> None:
    """One edit a batch, so that the stream that never had the edit has the same batches."""
    options = (*STACKS[stack], "--batch-size", "1", "-o", "nas.anchor=5", "-o", "nas.guard=100")
    edits = CAPITALS[:5]
    shop.edits("facts.jsonl", edits)
    shop.edits("fewer.jsonl", without(edits, "Spain"))
    out = shop.unbroken("out", *options)
    shown = json.loads(undo(shop, "--edit", "Spain", "--dry-run", "--json").out)
    assert shown["batches"] == {"kept": 2, "undone": 3, "redone": 2}
    assert shown["edits"] == {"undone": ["Spain"], "redone": 2}
    undo(shop, "--edit", "Spain")
    never = shop.unbroken("never", *options, edits="fewer.jsonl")
    same_stream(out, never)
    # The file still has the edit; going on with it must not bring it back.
    assert shop.apply("out", *options, "--resume").code == 0
    same_stream(out, never)


def test_an_undo_that_is_killed_while_it_computes_again_is_finished_by_resuming(
    shop: Any, run: Callable[[str], Path]
) -> None:
    out = run("rlsedit")
    twin = shutil.copytree(out, shop.folder / "twin")
    killed = STOP_AFTER.format(step=2, signal="SIGKILL")
    assert shop.run("undo", "out", "--edit", "France", prelude=killed).code == -9
    assert shop.apply("out", *STACKS["rlsedit"], "--resume").code == 0
    assert shop.run("undo", "twin", "--edit", "France").code == 0
    same_stream(out, twin)


def test_an_undo_that_is_killed_before_it_computes_again_is_finished_by_asking_again(
    shop: Any, run: Callable[[str], Path]
) -> None:
    out = run("memit")
    twin = shutil.copytree(out, shop.folder / "twin")
    prelude = (
        "import os, signal\nfrom editcli.runs.stream import Stream\n"
        "def snapshot(self, position, real=Stream._snapshot):\n"
        "    real(self, position)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Stream._snapshot = snapshot"
    )
    assert shop.run("undo", "out", "--edit", "Italy", prelude=prelude).code == -9
    for name in ("out", "twin"):
        ended = shop.run("undo", name, "--edit", "Italy")
        assert ended.code == 0, ended.err
    same_stream(out, twin)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_undo_that_is_killed_at_its_snapshot_happened_or_did_not(
    shop: Any, run: Callable[[str], Path], when: str
) -> None:
    out = run("memit")
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    calls = {"before": f"{kill}", "after": f"real(self, position); {kill}"}
    prelude = (
        "from editcli.runs.stream import Stream\n"
        f"def snapshot(self, position, real=Stream._snapshot):\n    {calls[when]}\n"
        "Stream._snapshot = snapshot"
    )
    assert shop.run("undo", "out", prelude=prelude).code == -9
    assert recover(RunFolder(out)).snapshot.step == {"before": 4, "after": 3}[when]
    undo(shop, "--to", "2")
    assert recover(RunFolder(out)).snapshot.step == 2


def test_a_dry_run_changes_nothing(shop: Any, run: Callable[[str], Path]) -> None:
    out = run("memit")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "Tokyo, Paris" in undo(shop, "--dry-run").out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"batches": 5}, "has 4 batches in force"),
        ({"to": 4}, "no way back to 4 from there"),
        ({"edits": ("Parris",)}, "did you mean 'Paris'"),
    ],
)
def test_what_is_not_there_cannot_be_taken_back(finished: Callable[[str], Path], request_: Any, said: str) -> None:
    with pytest.raises(StateError, match=said):
        plan_undo(Undo(run=str(finished("memit")), **request_))


def test_wishes_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="exclude each other"):
        Undo(run="out", batches=1, to=2)
    with pytest.raises(StateError, match="not a run of editcli"):
        plan_undo(Undo(run=str(tmp_path)))


def test_pilots_that_are_gone_are_missed_only_by_who_needs_them(shop: Any) -> None:
    for stack in ("ultraedit", "memit"):
        shop.unbroken(stack, *STACKS[stack])
    shop.edits("facts.jsonl", CAPITALS[1:])
    assert shop.run("undo", "memit").code == 0
    ended = shop.run("undo", "ultraedit")
    assert ended.code == 1
    assert "facts.jsonl, which the run calibrated on, is gone or was changed" in ended.err
    assert recover(RunFolder(shop.folder / "ultraedit")).snapshot.step == 4
