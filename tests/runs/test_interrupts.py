"""Ctrl-C and SIGTERM: once finishes the batch, twice stops at once; nothing is lost either way."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from editcli.records.recovery import recover
from editcli.records.state import RunFolder
from editcli.reporting import Silent
from editcli.runs.context import Interrupts
from tests.support.reporters import Listener
from tests.support.workshop import STACKS, STOP_AFTER, same_stream

TWICE = """
import os, signal
import editcli.runs.stream
def edit_batch(*arguments, real=editcli.runs.stream.edit_batch, **named):
    written = real(*arguments, **named)
    if arguments[0].written and calls.append(1) is None and len(calls) == 2:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    return written
calls = []
editcli.runs.stream.edit_batch = edit_batch
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("step", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_with_its_state_saved(
    shop: Any, finished: Callable[[str], Path], name: str, step: int
) -> None:
    prelude = STOP_AFTER.format(step=step, signal=name)
    ended = shop.apply("out", *STACKS["alphaedit"], "--checkpoint-every", "100", "--json", prelude=prelude)
    assert ended.code == 130, ended.err
    assert json.loads(ended.out)["status"] == "interrupted"
    assert json.loads((shop.folder / "out/editcli/run.json").read_text())["status"] == "interrupted"
    assert recover(RunFolder(shop.folder / "out")).snapshot.step == step
    assert shop.apply("out", *STACKS["alphaedit"], "--resume").code == 0
    same_stream(shop.folder / "out", finished("alphaedit"))


@pytest.mark.slow
def test_a_second_signal_stops_at_once(shop: Any, finished: Callable[[str], Path]) -> None:
    ended = shop.apply("out", *STACKS["memit"], "--checkpoint-every", "1", prelude=TWICE)
    assert ended.code == 130, ended.err
    assert ended.err.splitlines()[-1] == "error: interrupted"
    recovered = recover(RunFolder(shop.folder / "out"))
    assert (recovered.snapshot.step, recovered.lost) == (1, 0)
    assert shop.apply("out", *STACKS["memit"], "--resume").code == 0
    same_stream(shop.folder / "out", finished("memit"))


def test_handlers_are_put_back_and_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Interrupts(listener := Listener()) as interrupts:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not interrupts.asked
            signal.raise_signal(signal.SIGINT)
            assert interrupts.asked
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert len(listener.notes) == 1
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_note_that_cannot_be_written_inside_a_handler_does_no_harm() -> None:
    class Busy(Silent):
        def note(self, text: str) -> None:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    with Interrupts(Busy()) as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked


def test_other_threads_keep_their_hands_off_signals() -> None:
    seen: list[Any] = []

    def work() -> None:
        with Interrupts(Silent()):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
