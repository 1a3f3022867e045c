"""Strike every command that writes, over and over, start it again, and compare with commands that nobody struck.

``python -m benchmarks.soak`` strikes 500 times: SIGKILL and a full disk at a random write, sync or rename; SIGKILL,
SIGTERM and SIGSTOP at a random moment; and SIGKILL while a second process wants the same folder. Each command is
started again until it is done. Every file must then be there, no other may be, and all that two unbroken commands write
alike must be the same bytes. Any difference ends the soak with an error. ``--progress FILE`` keeps the counts, so that
a soak that was stopped goes on. Needs fork.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from benchmarks.common import write_result
from benchmarks.workshop import APPLY, STACKS, TARGETS, Child, Ended, Workshop
from editcli.records.recovery import recover
from editcli.records.state import RunFolder
from editcli.storage.checkpoint import file_digest
from editcli.storage.files import read_safetensors, tensor_digest

ROOT = Path(__file__).parents[1]
FAULTS = runpy.run_path(str(ROOT / "tests" / "support" / "faults.py"))
KILL_AT_WRITE, FULL, KILL, TERM, STOP = "killed at a write", "full disk", "SIGKILL", "SIGTERM", "SIGSTOP"
STRIKES = (KILL_AT_WRITE, KILL_AT_WRITE, FULL, KILL, TERM, STOP)
STRUCK = 4
"""Most strikes at one command before it is left in peace."""
FAILED = 1
INTERRUPTED = 130
PATIENCE = 1800.0
"""Seconds after which a command hangs, on a machine that others load as well."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A command that writes, what it needs, and how a user starts it again."""

    name: str
    needs: tuple[str, ...]
    command: tuple[str, ...]
    again: tuple[tuple[str, ...], ...] = ()
    """Commands that are tried in order once something is written, until one is done; else the command itself."""
    often: int = 1
    whole: bool = False
    """Whether its folder appears whole or not at all, and is refused once it is there."""
    exact: bool = True
    """Whether it writes the same after a strike: a search that was stopped draws other trials."""
    rivals: bool = False
    """Whether a second process wants the same folder."""

    def commands(self, work: Path) -> tuple[tuple[str, ...], ...]:
        """Return what a user starts now."""
        begun = (work / "out").exists()
        if begun and self.whole:
            return ()
        return self.again if self.again and begun else (self.command,)


def scenes() -> tuple[Scene, ...]:
    """Return every command that writes."""
    common = ("facts.jsonl", "corpus.txt", "model")
    applies = [
        Scene(f"apply {stack}", common, command, ((*command, "--resume"),))
        for stack, command in ((stack, (*APPLY, *options, "--out", "out")) for stack, options in STACKS.items())
    ]
    memit = (*APPLY, *STACKS["memit"], "--out", "out", "--resume")
    to, edit = ("undo", "out", "--to", "2"), ("undo", "out", "--edit", "Italy")
    export = ("export", "run", "--base", "model", "--no-eval", "--device", "cpu", "--out", "out", "--format")
    forms = ("lora", "patch", "full")
    exports = [Scene(f"export {form}", ("model", "run"), (*export, form), often=3, whole=True) for form in forms]
    stats = ("stats", "compute", "model", "--corpus", "corpus.txt", "--device", "cpu", "--layers", "1-2")
    bench = ("bench", "--stacks", "memit,rlsedit+nas", "--edits", "facts.jsonl", "--model", "model", "--out", "out")
    tune = ("tune", "model", "facts.jsonl", "--sample", "2", "--trials", "2", "--corpus", "corpus.txt", "--out", "out")
    tune = (*tune, "--text", "text.txt", *TARGETS)
    return (
        *applies,
        Scene("resume", (*common, "half"), memit, (memit,)),
        Scene("undo --to", (*common, "run"), to, (to, (*memit, "--limit", "4"))),
        Scene("undo --edit", (*common, "run"), edit, (edit, memit)),
        *exports,
        Scene(
            "apply-patch", ("model", "patch"), ("apply-patch", "model", "patch", "--out", "out"), often=3, whole=True
        ),
        Scene("stats", ("model", "corpus.txt"), (*stats, "--tokens", "500", "--out", "out.safetensors"), often=2),
        Scene("bench", common, (*bench, "--limit", "4", "--batch-size", "2", "--device", "cpu", *TARGETS)),
        Scene("tune", (*common, "text.txt"), tune, ((*tune, "--resume"),), exact=False),
        Scene("convert", ("facts.json",), ("convert", "facts.json", "--overwrite", "--out", "out.jsonl"), often=2),
        Scene("report", ("model", "run"), ("report", "run", "--base", "model", "--no-spectra", "--out", "out.html")),
        Scene("two processes", common, (*memit[:-1],), (memit,), rivals=True),
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command that is done has left: a digest of each file, and the edits of each run."""

    files: Mapping[str, str]
    edits: Mapping[str, tuple[str, ...]]


@dataclass(slots=True)
class Unbroken:
    """What a scene leaves when nobody strikes."""

    outcome: Outcome
    alike: frozenset[str]
    """Files that two unbroken commands write with the same bytes: the others hold times."""
    seconds: float
    calls: int
    """Writes, syncs and renames."""


@dataclass(slots=True)
class Soak:
    """The scenes with what they leave unbroken, and the counts so far."""

    shop: Workshop
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    unbroken: dict[str, Unbroken] = field(default_factory=dict)

    @property
    def struck(self) -> int:
        """How many strikes fell."""
        return sum(sum(counter[kind] for kind in set(STRIKES)) for counter in self.counts.values())

    def round(self, scene: Scene, chooser: random.Random) -> None:
        """Strike one command until it is done in spite of it, and compare what it leaves."""
        counter = self.counts.setdefault(scene.name, Counter())
        unbroken = self._unbroken(scene)
        work = self._fresh(scene)
        for _ in range(chooser.randint(1, STRUCK)):
            kind = chooser.choice(STRIKES)
            if self._strike(scene, work, kind, chooser, unbroken):
                counter[kind] += 1
            else:
                break
        self._finish(scene, work)
        self._compare(scene, work, unbroken)
        counter["finished"] += 1
        counter["byte-identical files"] += len(unbroken.alike)
        shutil.rmtree(work)

    def _fresh(self, scene: Scene) -> Path:
        work = self.shop.copy(*(name for name in scene.needs if name != "text.txt"))
        if "text.txt" in scene.needs:
            (work / "text.txt").write_text((self.shop.template / "corpus.txt").read_text("utf-8")[:600], "utf-8")
        for name in ("half", "run"):
            if scene.command[0] in ("apply", "undo") and name in scene.needs:
                (work / name).rename(work / "out")
        return work

    def _unbroken(self, scene: Scene) -> Unbroken:
        if scene.name not in self.unbroken:
            outcomes, seconds, calls = [], 0.0, 0
            for _ in range(2):
                work = self._fresh(scene)
                log = self.shop.folder / "calls"
                child = self.shop.start(work, scene.command, lambda log=log: _count_calls(log))
                ended = child.wait(PATIENCE)
                self._require(scene, ended)
                outcomes.append(_outcome(work))
                seconds, calls = ended.seconds, int(log.read_text())
                shutil.rmtree(work)
            one, other = outcomes
            if one.files.keys() != other.files.keys():
                sys.exit(f"{scene.name}: two unbroken commands wrote different files")
            same = (name for name, digest in one.files.items() if other.files[name] == digest)
            alike = frozenset(same if scene.exact else ())
            self.unbroken[scene.name] = Unbroken(one, alike, seconds, calls)
        return self.unbroken[scene.name]

    def _strike(self, scene: Scene, work: Path, kind: str, chooser: random.Random, unbroken: Unbroken) -> bool:
        """Start a command and strike it; say whether the strike fell before the command was done."""
        call = chooser.randint(1, max(unbroken.calls, 1))
        prelude: Callable[[], object] = lambda: None  # noqa: E731
        if kind in (KILL_AT_WRITE, FULL):
            blow = FAULTS["kill" if kind == KILL_AT_WRITE else "fill"]
            prelude = lambda: FAULTS["arm"](call, blow)  # noqa: E731
        commands = scene.commands(work)
        if not commands:
            return False
        child = self.shop.start(work, commands[0], prelude)
        rival = None
        if kind not in (KILL_AT_WRITE, FULL):
            time.sleep(chooser.uniform(0, unbroken.seconds))
            rival = self.shop.start(work, scene.commands(work)[0]) if scene.rivals else None
            fell = _send(child, kind, chooser)
        else:
            fell = True
        ended = child.wait(PATIENCE)
        if rival is not None:
            self._check(scene, KILL, rival.wait(PATIENCE), work)
        if ended.timed_out:
            sys.exit(f"{scene.name}: hangs after {kind}; see {work}")
        self._check(scene, kind, ended, work)
        return fell and (ended.code != 0 or kind == STOP)

    def _check(self, scene: Scene, kind: str, ended: Ended, work: Path) -> None:
        """Exit with an error where a struck command ended in another way than it may."""
        allowed = {0, FAILED, INTERRUPTED, -signal.SIGKILL, -signal.SIGTERM}
        if ended.code not in allowed or "Traceback" in ended.said:
            sys.exit(f"{scene.name}: ended with {ended.code} after {kind}; see {work}:\n{ended.said}")
        if ended.code == FAILED and (left := _left_over(work)):
            sys.exit(f"{scene.name}: failed after {kind} and left {left} behind; see {work}:\n{ended.said}")

    def _finish(self, scene: Scene, work: Path) -> None:
        """Start the command again in peace, as a user would."""
        ended = None
        for command in scene.commands(work):
            ended = self.shop.run(work, *command, timeout=PATIENCE)
            if ended.code == 0:
                return
        if ended is not None:
            self._require(scene, ended, work)

    def _require(self, scene: Scene, ended: Ended, work: Path | None = None) -> None:
        if ended.code:
            sys.exit(f"{scene.name}: ended with code {ended.code}; see {work}:\n{ended.said}")

    def _compare(self, scene: Scene, work: Path, unbroken: Unbroken) -> None:
        found, wanted = _outcome(work), unbroken.outcome
        if found.edits != wanted.edits:
            sys.exit(f"{scene.name}: lost edits; see {work}")
        if found.files.keys() != wanted.files.keys():
            sys.exit(f"{scene.name}: left over or lost {sorted(found.files.keys() ^ wanted.files.keys())}; see {work}")
        different = sorted(name for name in unbroken.alike if found.files[name] != wanted.files[name])
        if different:
            sys.exit(f"{scene.name}: differs in {different}; see {work}")

    def result(self) -> dict[str, Any]:
        """Return the counts, in all and by command; a soak that gets here has lost nothing."""
        total = sum(self.counts.values(), Counter[str]())
        strikes = {kind: total[kind] for kind in dict.fromkeys(STRIKES)}
        commands = {name: sum(counter[kind] for kind in set(STRIKES)) for name, counter in self.counts.items()}
        return {
            "strikes": self.struck,
            **strikes,
            "by command": commands,
            "commands finished": total["finished"],
            "files compared byte for byte": total["byte-identical files"],
        }


def _send(child: Child, kind: str, chooser: random.Random) -> bool:
    """Send a signal; say whether the command still ran. One that was stopped goes on, or is killed as it stands."""
    if not child.runs:
        return False
    if kind == STOP:
        child.strike(signal.SIGSTOP)
        time.sleep(0.05)
        child.strike(chooser.choice((signal.SIGCONT, signal.SIGKILL)))
        return True
    child.strike(signal.SIGKILL if kind == KILL else signal.SIGTERM)
    return True


def _count_calls(log: Path) -> None:
    """Have the process write how many writes, syncs and renames it has made so far."""
    count = itertools.count(1)
    write = Path(log).write_text

    class Count:
        def falls(self, prepare: object = None) -> None:
            write(str(next(count)))

    write("0")
    FAULTS["arm"].__globals__["Blow"] = lambda call, strike: Count()
    FAULTS["arm"](0, FAULTS["fill"])


def _outcome(work: Path) -> Outcome:
    files, edits = {}, {}
    for path in sorted(path for path in work.rglob("*") if path.is_file()):
        name = path.relative_to(work).as_posix()
        if name.startswith("cache/"):
            # The cache may or may not have been written before a strike; nothing unfinished may be left in it.
            if path.name.endswith(".tmp"):
                files[name] = ""
        elif path.parent.name == "updates":
            # A command that was struck may have numbered its lines otherwise; each segment has a line all the same.
            lines = RunFolder(path.parents[2]).read_journal()
            if path.name not in {entry.segment for entry, _ in lines}:
                files[name] = ""
        elif path.name == "state.safetensors":
            files[name] = _state_digest(path)
            edits[name] = tuple(request.id for request in recover(RunFolder(path.parents[1])).requests)
        else:
            if path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
            files[name] = _card_digest(path) if path.name == "README.md" else file_digest(path)
    return Outcome(files, edits)


def _state_digest(path: Path) -> str:
    """Return a digest of a snapshot's tensors; what else is in it holds times."""
    tensors, _ = read_safetensors(path)
    parts = "".join(f"{name} {tensor_digest(tensor)}\n" for name, tensor in sorted(tensors.items()))
    return hashlib.sha256(parts.encode()).hexdigest()


def _card_digest(path: Path) -> str:
    """Return a digest of a card without the command line, which says --resume where a run was resumed."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("editcli ")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _left_over(work: Path) -> list[str]:
    """Return the unfinished files and folders of a command that failed."""
    return [str(path.relative_to(work)) for path in work.rglob(".*") if path.suffix in (".tmp", ".partial")]


def _rounds(seed: int) -> Iterator[tuple[Scene, random.Random]]:
    most = max(scene.often for scene in scenes())
    order = [scene for turn in range(most) for scene in scenes() if turn < scene.often]
    for number in itertools.count():
        chooser = random.Random(f"{seed} {number}")
        yield order[number % len(order)], chooser


@click.command()
@click.option("--kills", default=500, show_default=True, help="Strikes in all.")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", metavar="COMMAND", help="Strike this command alone, such as 'undo'.")
@click.option("--progress", type=click.Path(path_type=Path), help="Keep the counts here, and go on from them.")
@click.option("--out", type=click.Path(path_type=Path))
def main(kills: int, seed: int, only: str | None, progress: Path | None, out: Path | None) -> None:
    """Strike, start again, compare."""
    kept: dict[str, Any] = {"round": 0, "seconds": 0.0, "counts": {}}
    if progress is not None and progress.is_file():
        kept = json.loads(progress.read_text("utf-8"))
    folder, started = Path(tempfile.mkdtemp(prefix="soak-")), time.perf_counter()
    corpus = (ROOT / "editcli" / "corpora" / "english.txt").read_text("utf-8")[:20_000]
    soak = Soak(Workshop(folder, corpus), {name: Counter(counts) for name, counts in kept["counts"].items()})
    for number, (scene, chooser) in enumerate(_rounds(seed)):
        if soak.struck >= kills:
            break
        if number < kept["round"] or (only is not None and only not in scene.name):
            continue
        soak.round(scene, chooser)
        seconds = kept["seconds"] + time.perf_counter() - started
        if progress is not None:
            state = {"round": number + 1, "seconds": seconds, "counts": soak.counts}
            progress.write_text(json.dumps(state, indent=1), "utf-8")
        click.echo(f"{soak.struck} struck; {scene.name} is as if nobody had", err=True)
    result = {**soak.result(), "seconds": round(kept["seconds"] + time.perf_counter() - started)}
    write_result("soak", result, out)
    shutil.rmtree(folder)
    click.echo(result)


if __name__ == "__main__":
    main()
