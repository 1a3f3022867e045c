"""Killing a stream at any moment, filling its disk, cutting its files: what is finished later is what never broke."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from editcli.records.recovery import recover
from editcli.records.state import RunFolder
from tests.support.workshop import STACKS, STOP_AFTER, again, same_stream

pytestmark = pytest.mark.slow

KILL = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


def faults(call: int, strike: str) -> str:
    """Return a prelude that strikes at the n-th write, sync or rename; the children find the module beside theirs."""
    return f"import faults; faults.arm({call}, faults.{strike})"


@pytest.mark.parametrize("stack", ["memit", "alphaedit", "rlsedit"])
def test_a_stream_killed_again_and_again_ends_as_if_unbroken(
    shop: Any, finished: Callable[[str], Path], stack: str
) -> None:
    unbroken = finished(stack)
    chooser, kills = random.Random(stack), 0
    # What a run does at its end is few of its calls, so the last kills are aimed at it.
    for call in [*(chooser.randint(1, 40) for _ in range(5)), *(chooser.randint(1, 12) for _ in range(3))]:
        ended = shop.apply("out", *STACKS[stack], *again(shop, "out"), prelude=faults(call, "kill"))
        assert ended.code in (0, -9), ended.err
        kills += ended.code == -9
    ended = shop.apply("out", *STACKS[stack], "--resume")
    assert ended.code == 0, ended.err
    assert kills >= 7
    same_stream(shop.folder / "out", unbroken)
    assert not list((shop.folder / "out").rglob(".*.tmp"))


@pytest.mark.parametrize("call", [1, 5, 12, 20, 28, 40, 55])
def test_a_full_disk_is_one_sentence_and_loses_nothing(shop: Any, finished: Callable[[str], Path], call: int) -> None:
    # The statistics are cached by then; a cache that cannot be written is no reason to fail.
    unbroken = finished("memit")
    ended = shop.apply("out", *STACKS["memit"], prelude=faults(call, "fill"))
    assert ended.code == 1
    assert "No space left on device" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err
    ended = shop.apply("out", *STACKS["memit"], *again(shop, "out"))
    assert ended.code == 0, ended.err
    same_stream(shop.folder / "out", unbroken)


def test_a_run_killed_before_its_first_snapshot_is_no_obstacle(shop: Any, finished: Callable[[str], Path]) -> None:
    prelude = f"from editcli.runs.stream import Stream\ndef begin(self): {KILL}\nStream.begin = begin"
    for arguments in ((), ("--resume",)):
        assert shop.apply("out", *STACKS["memit"], prelude=prelude).code == -9
        assert shop.apply("out", *STACKS["memit"], *arguments).code == 0
        same_stream(shop.folder / "out", finished("memit"))
        shutil.rmtree(shop.folder / "out")


def test_a_kill_is_mended_by_a_process_of_its_own(shop: Any, finished: Callable[[str], Path]) -> None:
    prelude = STOP_AFTER.format(step=2, signal="SIGKILL")
    assert shop.apply("out", *STACKS["rlsedit"], prelude=prelude).code == -9
    command = shop.command("out", *STACKS["rlsedit"], "--resume")
    subprocess.run([sys.executable, "-m", "editcli", *command], cwd=shop.folder, check=True, capture_output=True)
    same_stream(shop.folder / "out", finished("rlsedit"))


def test_batches_after_the_last_snapshot_are_done_again(shop: Any, finished: Callable[[str], Path]) -> None:
    prelude = STOP_AFTER.format(step=3, signal="SIGKILL")
    spaced = ("--checkpoint-every", "100")
    assert shop.apply("out", *STACKS["alphaedit"], *spaced, prelude=prelude).code == -9
    recovered = recover(RunFolder(shop.folder / "out"))
    assert (recovered.snapshot.step, recovered.lost) == (0, 3)
    assert shop.apply("out", *STACKS["alphaedit"], *spaced, "--resume").code == 0
    same_stream(shop.folder / "out", finished("alphaedit"))


def test_a_kill_while_an_old_run_is_overwritten_can_be_repeated(shop: Any, finished: Callable[[str], Path]) -> None:
    shutil.copytree(finished("memit"), shop.folder / "out")
    prelude = (
        "import os, pathlib, signal\n"
        "def unlink(path, *rest, real=pathlib.Path.unlink, **options):\n"
        "    if path.name == 'model.safetensors': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(path, *rest, **options)\n"
        "pathlib.Path.unlink = unlink"
    )
    assert shop.apply("out", *STACKS["rlsedit"], "--overwrite", prelude=prelude).code == -9
    assert shop.apply("out", *STACKS["rlsedit"], "--overwrite").code == 0
    same_stream(shop.folder / "out", finished("rlsedit"))


def test_a_second_process_is_refused_and_the_first_is_unharmed(shop: Any, finished: Callable[[str], Path]) -> None:
    wait = (
        "import pathlib, time\nfrom editcli.runs.stream import Stream\n"
        "def apply(self, requests, real=Stream.apply):\n"
        "    pathlib.Path('begun').touch()\n"
        "    while not pathlib.Path('go').exists(): time.sleep(0.01)\n"
        "    return real(self, requests)\n"
        "Stream.apply = apply"
    )
    first = shop.start(*shop.command("out", *STACKS["memit"]), prelude=wait)
    while not (shop.folder / "begun").exists():
        pass
    for arguments in (("--resume",), ("--overwrite",)):
        second = shop.apply("out", *STACKS["memit"], *arguments)
        assert second.code == 1
        assert "in use by another editcli process" in second.err
    (shop.folder / "go").touch()
    assert first.wait().code == 0
    same_stream(shop.folder / "out", finished("memit"))
