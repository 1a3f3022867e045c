"""A tiny model with edits, runs and results made from it, and commands that run on copies of them in forked children.

The soak and the special files share it: both start hundreds of commands, and a fork of a process that has imported
everything costs no start-up. Needs fork.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import editcli.api
import editcli.render.run
import editcli.runs.undo  # noqa: F401 - imported once for all children.
from editcli.__main__ import main as run_editcli
from editcli.testing import tiny_model_folder

PLACES = ("France", "Italy", "Spain", "Greece", "London", "Berlin", "Tokyo", "Paris")
BASES = ("--stabilizer", "nas", "--stabilizer", "revive")
STACKS: Mapping[str, tuple[str, ...]] = {
    "memit": ("--editor", "memit", *BASES),
    "alphaedit": (
        *("--editor", "alphaedit", *BASES),
        *("-o", "alphaedit.nullspace_threshold=0.9", "-o", "alphaedit.threshold_kind=relative"),
    ),
    "rlsedit": ("--editor", "rlsedit", *BASES),
}
TARGETS = ("-o", "targets.steps=1", "-o", "targets.prefixes=1", "-o", "targets.prefix_tokens=2")
"""What is written does not matter here, so the targets are only roughly optimised."""
APPLY = (
    *("apply", "facts.jsonl", "--model", "model", "--corpus", "corpus.txt", "--layers", "1-2", "--device", "cpu"),
    *("--no-eval", "--batch-size", "2", *TARGETS),
)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit code or minus a signal, what it said, how long it took and its peak memory."""

    code: int
    said: str
    seconds: float
    peak: int
    """Bytes."""
    timed_out: bool = False


@dataclass(frozen=True, slots=True)
class Child:
    """A command that may still run."""

    id: int
    log: Path
    started: float

    def strike(self, number: int) -> None:
        """Send a signal; a child that has ended keeps its id until it is waited for."""
        os.kill(self.id, number)

    @property
    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return os.waitid(os.P_PID, self.id, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self, timeout: float | None = None) -> Ended:
        """Wait for the end; after ``timeout`` seconds end it."""
        late = False
        while timeout is not None and self.runs:
            if time.perf_counter() - self.started > timeout:
                late = True
                self.strike(signal.SIGKILL)
                break
            time.sleep(0.005)
        _, status, usage = os.wait4(self.id, 0)
        said = self.log.read_text("utf-8", "replace")
        seconds, peak = time.perf_counter() - self.started, usage.ru_maxrss * 1024
        return Ended(os.waitstatus_to_exitcode(status), said, seconds, peak, late)


class Workshop:
    """A folder with a template of everything, of which every command gets a copy."""

    def __init__(self, folder: Path, corpus: str):
        # The children compute; a parent that never does can be forked safely.
        torch.set_num_threads(1)
        # The classes of the tiny model and the drawing of pages are imported when they are first asked for.
        transformers.LlamaForCausalLM  # noqa: B018
        import matplotlib.pyplot  # noqa: F401

        self.folder, self._jobs = folder, 0
        self.template = folder / "template"
        self.template.mkdir(parents=True)
        self._make(corpus)

    def _make(self, corpus: str) -> None:
        edits = [
            {"id": name, "prompt": "The capital of {} is", "subject": name, "target_new": PLACES[index - 3]}
            for index, name in enumerate(PLACES)
        ]
        place = self.template
        (place / "facts.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits), "utf-8")
        (place / "facts.json").write_text(json.dumps(edits), "utf-8")
        (place / "corpus.txt").write_text(corpus, "utf-8")
        child = os.fork()
        if not child:
            # The library draws a bar while it saves.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            tiny_model_folder(place / "model")
            os._exit(0)
        os.waitpid(child, 0)
        export = ("export", "run", "--base", "model", "--no-eval", "--device", "cpu")
        for command in (
            (*APPLY, *STACKS["memit"], "--out", "run"),
            (*APPLY, *STACKS["memit"], "--limit", "4", "--out", "half"),
            (*export, "--format", "patch", "--out", "patch"),
            (*export, "--format", "lora", "--out", "lora"),
            ("stats", "compute", "model", "--corpus", "corpus.txt", "--layers", "1-2", "--out", "moments.safetensors"),
        ):
            ended = self.run(place, *command)
            if ended.code:
                sys.exit(f"{' '.join(command)} ended with {ended.code}: {ended.said}")

    def copy(self, *names: str) -> Path:
        """Return a new working folder with copies of parts of the template, its cache included."""
        self._jobs += 1
        work = self.folder / f"work-{self._jobs}"
        work.mkdir()
        for name in (*names, "cache"):
            source = self.template / name
            if source.is_dir():
                shutil.copytree(source, work / name, symlinks=True)
            else:
                shutil.copyfile(source, work / name)
        return work

    def start(self, work: Path, command: Sequence[str], prelude: Callable[[], object] = lambda: None) -> Child:
        """Start a command in a child that works in a folder."""
        self._jobs += 1
        log = self.folder / f"log-{self._jobs}"
        log.touch()
        started, child = time.perf_counter(), os.fork()
        if child:
            return Child(child, log, started)
        code = 70
        try:
            os.chdir(work)
            os.environ["XDG_CACHE_HOME"] = str(work / "cache")
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            said = os.open(log, os.O_WRONLY | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            prelude()
            code = run_editcli(["-q", *command])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def run(self, work: Path, *command: str, timeout: float | None = None) -> Ended:
        """Run a command to its end."""
        child = self.start(work, command)
        ended = child.wait(timeout)
        child.log.unlink()
        return ended
