"""A reporter that writes down what the library says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from editcli.reporting import Silent


class Listener(Silent):
    """A reporter that keeps notes, warnings, both of them as ``said``, and the names of phases, as they come."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.said: list[str] = []
        self.phases: list[str] = []

    @contextmanager
    def phase(self, name: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        self.phases.append(name)
        yield lambda count: None

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.said.append(text)
