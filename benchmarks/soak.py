"""Kill streams on the bundled model over and over, resume them, and compare with streams that nobody killed.

``python -m benchmarks.soak`` kills 200 processes, half of them at a random moment and half at a random write, sync or
rename, and writes benchmarks/results/soak.json. Any difference in the saved weights ends it with an error. Needs fork.
"""

from __future__ import annotations

import itertools
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.common import write_result
from editcli.__main__ import main as run_editcli

ROOT = Path(__file__).parents[1]
FAULTS = runpy.run_path(str(ROOT / "tests" / "streams" / "faults.py"))
BASES = ("--stabilizer", "nas", "--stabilizer", "revive")
STACKS: Mapping[str, tuple[str, ...]] = {
    "memit": ("--editor", "memit", *BASES),
    "alphaedit": ("--editor", "alphaedit", *BASES),
    "rlsedit": ("--editor", "rlsedit", *BASES),
}
QUICK = ("-o", "targets.steps=5", "-o", "nas.pilots=16")
"""What is written does not matter here, so the targets are only roughly optimised."""

CALLS = 120
"""A process is struck at one of its first so many writes, syncs and renames; a stream makes about as many."""


@click.command()
@click.option("--kills", default=200, show_default=True)
@click.option("--edits", default=48, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(kills: int, edits: int, batch_size: int, seed: int, out: Path | None) -> None:
    """Kill, resume, compare."""
    # The children compute; a parent that never does can be forked safely.
    torch.set_num_threads(1)
    chooser, counts, started = random.Random(seed), Counter[str](), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        soak = _Soak(Path(name), ("--limit", str(edits), "--batch-size", str(batch_size)), chooser, counts)
        for stack in itertools.cycle(STACKS):
            soak.stream(stack, until=kills)
            if counts["killed"] >= kills:
                break
        sizes = soak.sizes(edits)
    result = {"edits": edits, "batch_size": batch_size, **counts, **sizes}
    write_result("soak", {**result, "seconds": round(time.perf_counter() - started)}, out)
    click.echo(result)


class _Soak:
    def __init__(self, folder: Path, options: tuple[str, ...], chooser: random.Random, counts: Counter[str]):
        self.folder, self.options, self.chooser, self.counts = folder, options, chooser, counts
        self.unbroken: dict[str, tuple[bytes, float]] = {}

    def stream(self, stack: str, *, until: int) -> None:
        """Run one stream to its end through kills, and compare it."""
        if stack not in self.unbroken:
            begun = time.perf_counter()
            self._require(self._fork(stack, f"{stack}-unbroken", lambda: None, None), 0)
            self.unbroken[stack] = (self._weights(f"{stack}-unbroken"), time.perf_counter() - begun)
        wanted, seconds = self.unbroken[stack]
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        ended = -signal.SIGKILL
        while ended == -signal.SIGKILL:
            moment = self.chooser.uniform(0, seconds) if self.chooser.random() < 0.5 else None
            calm = self.counts["killed"] >= until
            ended = self._fork(stack, "out", lambda: None, None) if calm else self._strike(stack, moment)
            if ended == -signal.SIGKILL:
                self.counts["killed"] += 1
                self.counts["killed at a random moment" if moment is not None else "killed at a write"] += 1
        self._require(ended, 0)
        self.counts["streams finished"] += 1
        if self._weights("out") != wanted:
            sys.exit(f"{stack}: a stream that was killed differs from one that was not; see {out}")
        self.counts["byte-identical"] += 1
        click.echo(f"{self.counts['killed']} killed, {self.counts['byte-identical']} streams byte-identical", err=True)

    def sizes(self, edits: int) -> dict[str, Any]:
        """Return what a run takes on disk, per edit and in all."""
        out = self.folder / "memit-unbroken" / "editcli"
        segments = sum(path.stat().st_size for path in (out / "updates").iterdir())
        state = (out / "state.safetensors").stat().st_size
        return {"segment_bytes_per_edit": round(segments / edits), "state_bytes": state}

    def _strike(self, stack: str, moment: float | None) -> int:
        call = self.chooser.randint(1, CALLS)
        prelude = (lambda: None) if moment is not None else (lambda: FAULTS["arm"](call, FAULTS["kill"]))
        return self._fork(stack, "out", prelude, moment)

    def _fork(self, stack: str, out: str, prelude: Callable[[], None], moment: float | None) -> int:
        """Run the command in a child; kill it after ``moment`` seconds unless it has ended."""
        resume = ("--resume",) if (self.folder / out).exists() else ()
        edits = str(ROOT / "sample_edits" / "stream.jsonl")
        common = ("--out", str(self.folder / out), "--no-eval", "--device", "cpu", "-q")
        child = os.fork()
        if not child:
            code = 70
            try:
                said = os.open(self.folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(said, 1)
                os.dup2(said, 2)
                prelude()
                code = run_editcli(["apply", edits, *common, *QUICK, *self.options, *STACKS[stack], *resume])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        if moment is not None:
            time.sleep(moment)
            # A child that has ended stays ours to ask about until it is waited for, so its id is still its own.
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _weights(self, out: str) -> bytes:
        return (self.folder / out / "model.safetensors").read_bytes()

    def _require(self, code: int, wanted: int) -> None:
        if code != wanted:
            sys.exit(f"a run ended with code {code}:\n{(self.folder / 'said.txt').read_text()}")


if __name__ == "__main__":
    main()
