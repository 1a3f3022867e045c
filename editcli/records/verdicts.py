"""The verdicts of a judge, one JSON object a line; each is on disk before the next answer is sent."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from editcli.errors import OptionError
from editcli.records.decoding import UnreadableError, decode, encode, later
from editcli.storage.opening import TABLE, is_there, read_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a judge said of one answer."""

    key: str
    """Hash of everything that was sent, and of the judge's name: an answer with a verdict is not sent again."""
    id: str
    """The edit."""
    group: str
    """efficacy, paraphrases, neighbors, portability or locality."""
    prompt: str
    expected: str
    rival: str | None
    """The answer that is no longer right; null where there is none."""
    text: str
    """The answer that was judged."""
    judge: str
    """Name of the judge's model."""
    rubric: int
    """Version of the rubric."""
    verdict: Literal["CORRECT", "INCORRECT"] | None
    """Null where the judge gave none."""
    reply: str = later("")
    """The judge's reply, as it came."""
    error: str = later("")
    """Why there is no verdict."""


class VerdictFile:
    """A file of verdicts that grows line by line; raises :class:`OptionError` for a file that holds something else."""

    def __init__(self, path: Path):
        self.path = path
        self._known: dict[str, Verdict] = {}
        self._torn = False
        content = self._read()
        lines = content.splitlines()
        for line in lines:
            # A torn or damaged line costs its verdict, which is asked for again.
            with suppress(UnreadableError):
                verdict = decode(line, Verdict)
                if verdict.verdict is not None or verdict.key not in self._known:
                    self._known[verdict.key] = verdict
        if lines and not self._known:
            raise OptionError(f"{path} holds no verdicts of a judge; name another file for --verdicts")
        self._torn = bool(content) and not content.endswith(b"\n")

    def given(self, key: str) -> Verdict | None:
        """Return the verdict with this key; None where there is none yet."""
        known = self._known.get(key)
        return known if known is not None and known.verdict is not None else None

    def append(self, verdict: Verdict) -> None:
        """Write one line, and wait until it is on disk; raise :class:`OptionError` where that fails."""
        line = json.dumps(encode(verdict), ensure_ascii=False).encode() + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                # What a killed process left of a line stays a line of its own.
                file.write(b"\n" + line if self._torn else line)
                os.fsync(file.fileno())
        except OSError as error:
            raise OptionError(f"cannot write the verdicts to {self.path}: {error.strerror or error}") from error
        self._torn = False
        self._known[verdict.key] = verdict

    def _read(self) -> bytes:
        try:
            return read_bytes(self.path, TABLE) if is_there(self.path) else b""
        except OSError as error:
            raise OptionError(f"the verdicts {self.path} cannot be read: {error}") from error
