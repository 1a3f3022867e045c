"""Let a run finish its batch when it is asked to stop, and stop at once when it is asked twice."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from editcli.reporting import Reporter


class Interrupts:
    """A context in which the first SIGINT or SIGTERM only sets ``asked``; the second acts as usual."""

    def __init__(self, reporter: Reporter):
        self.asked = False
        self._reporter = reporter
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        # Python lets only the main thread handle signals; elsewhere the caller's own handlers stay in force.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # Whoever started us in the background with signals ignored wants them ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()
        # The signal may have come while the same stream was being written to, which Python refuses; better no note.
        with suppress(RuntimeError):
            self._reporter.note("Stopping after this batch; once more to stop at once (the last snapshot stays whole)")

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None stands for a handler that was not set from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
