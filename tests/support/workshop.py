"""Streams through disk and new processes: a tiny model, a few edits, and children that can be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from editcli.records.recovery import recover
from editcli.records.state import RunFolder
from editcli.storage.checkpoint import file_digest
from editcli.testing import tiny_model_folder
from tests.support.facts import CAPITALS, write_lines

STACKS = {
    "memit": ("--editor", "memit", "--stabilizer", "nas", "--stabilizer", "revive"),
    "remembering": ("--editor", "memit", "-o", "memit.remember=true", "-s", "rect", "-o", "rect.feedback=true"),
    "alphaedit": (
        *("--editor", "alphaedit", "--stabilizer", "nas", "--stabilizer", "revive"),
        *("-o", "alphaedit.nullspace_threshold=0.9", "-o", "alphaedit.threshold_kind=relative"),
        *("-o", "targets.per_layer=true"),
    ),
    "rlsedit": ("--editor", "rlsedit", "--stabilizer", "nas", "--stabilizer", "revive"),
    "lyaplock": ("--editor", "lyaplock", "--stabilizer", "sphere", "-o", "sphere.every=2"),
    "nse": (
        *("--editor", "nse", "--stabilizer", "nas", "-o", "nse.bounds_kind=relative"),
        *("-o", "nse.met=0.01", "-o", "nse.passes=3"),
    ),
    "simie": ("--editor", "simie", "-o", "memit.mom2_update_weight=100", "-o", "targets.per_layer=true"),
    "crispedit": ("--editor", "crispedit", "-o", "crispedit.epochs=2", "-o", "crispedit.mini_batch=1"),
    "ultraedit": ("--editor", "ultraedit", "-o", "ultraedit.lr=1e-3", "-o", "ultraedit.pilots=4"),
}
QUICK = ("--layers", "1-2", "--device", "cpu", "--no-eval", "--batch-size", "2")
QUICKER = ("-o", "targets.steps=1", "-o", "targets.prefixes=1", "-o", "targets.prefix_tokens=2")

STOP_AFTER = """
import os, signal
from editcli.runs.stream import Stream
def apply(self, requests, real=Stream.apply):
    report = real(self, requests)
    if report.step == {step}:
        os.kill(os.getpid(), signal.{signal})
    return report
Stream.apply = apply
"""
"""A prelude: a signal arrives once a batch is recorded, before the program looks whether to go on."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the signal that killed it, and what it said."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Child:
    """A child that may still be running."""

    id: int
    log: Path
    ask: Callable[[dict[str, Any]], int]

    def wait(self) -> Ended:
        code = self.ask({"wait": self.id})
        return Ended(code, *(Path(f"{self.log}.{end}").read_text() for end in ("out", "err")))


class Workshop:
    """A folder with a model, edits and a corpus, in which commands run in processes of their own."""

    def __init__(self, folder: Path, model: Path, server: subprocess.Popen[str]):
        self.folder, self.model, self._server, self._jobs = folder, model, server, 0
        self.edits("facts.jsonl", CAPITALS)

    def edits(self, name: str, edits: Sequence[dict[str, Any]]) -> None:
        write_lines(self.folder / name, edits)

    def start(self, *arguments: str, prelude: str = "") -> Child:
        self._jobs += 1
        log = self.folder / f"log-{self._jobs}"
        job = {"start": ["-q", *arguments], "folder": str(self.folder), "log": str(log), "prelude": prelude}
        return Child(self._ask(job), log, self._ask)

    def run(self, *arguments: str, prelude: str = "") -> Ended:
        return self.start(*arguments, prelude=prelude).wait()

    def apply(self, out: str, *arguments: str, edits: str = "facts.jsonl", prelude: str = "") -> Ended:
        return self.run(*self.command(out, *arguments, edits=edits), prelude=prelude)

    def command(self, out: str, *arguments: str, edits: str = "facts.jsonl") -> tuple[str, ...]:
        given = ("--model", str(self.model), "--corpus", str(self.model / "corpus.txt"), "--out", out)
        return ("apply", edits, *given, *QUICK, *QUICKER, *arguments)

    def unbroken(self, out: str, *arguments: str, edits: str = "facts.jsonl") -> Path:
        ended = self.apply(out, *arguments, edits=edits)
        assert ended.code == 0, ended.err
        return self.folder / out

    def _ask(self, job: dict[str, Any]) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """The process whose children run the commands."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    home = str(tmp_path_factory.mktemp("server"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDITCLI_")}
    environment = {**kept, "HOME": home, "XDG_CACHE_HOME": home, "HF_HOME": home, "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("forkserver.py")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, corpus_text: str) -> Path:
    """A tiny model, with a text for its statistics beside it."""
    folder = tiny_model_folder(tmp_path_factory.mktemp("streams") / "model")
    (folder / "corpus.txt").write_text(corpus_text)
    return folder


@pytest.fixture(scope="session")
def shop_in(model: Path, server: subprocess.Popen[str]) -> Callable[[Path], Workshop]:
    """Return a workshop in a folder."""
    return lambda folder: Workshop(folder, model, server)


@pytest.fixture
def shop(tmp_path: Path, shop_in: Callable[[Path], Workshop]) -> Workshop:
    """A workshop for one test."""
    return shop_in(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, shop_in: Callable[[Path], Workshop]) -> Callable[[str], Path]:
    """Return the folder of an unbroken run of a stack, made when it is first asked for; not to be changed."""
    shop = shop_in(tmp_path_factory.mktemp("finished"))
    made: dict[str, Path] = {}

    def finished(stack: str) -> Path:
        if stack not in made:
            made[stack] = shop.unbroken(stack, *STACKS[stack])
        return made[stack]

    return finished


def weights(out: Path) -> str:
    return file_digest(out / "model.safetensors")


def same_stream(one: Path, other: Path) -> None:
    """Assert that two runs hold the same weights, component states and edits, bit by bit."""
    first, second = (recover(RunFolder(out)) for out in (one, other))
    assert [request.digest for request in first.requests] == [request.digest for request in second.requests]
    assert set(first.snapshot.tensors) == set(second.snapshot.tensors)
    for name, tensor in first.snapshot.tensors.items():
        assert torch.equal(tensor, second.snapshot.tensors[name]), name
    assert weights(one) == weights(other)


def again(shop: Workshop, out: str) -> tuple[str, ...]:
    """Return ``--resume`` if there is something to go on with."""
    return ("--resume",) if (shop.folder / out).exists() else ()
