"""Put something that is no file in the place of every file that editcli reads, and run every command that reads it.

``python -m benchmarks.special_files`` puts a named pipe, a link to an endless device, a socket, a folder, a link out of
the folder, a sparse file of 12 GB and a file without permissions in the place of each record, and runs the commands on
copies of a tiny model, a run of it and its results. Each must end in one sentence with a documented exit code, within
seconds and within 1 GB of the memory that the same command takes otherwise. Those that do not are listed, and end the
benchmark with an error. ``--progress FILE`` keeps the counts, so that a benchmark that was stopped goes on. Needs fork.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.common import write_result
from benchmarks.rights import give_up_rights, permissions_hold
from benchmarks.workshop import APPLY, STACKS, TARGETS, Ended, Workshop

ROOT = Path(__file__).parents[1]
SPARSE = 12 << 30
"""Bytes that the sparse file claims."""
MEMORY = 1 << 30
"""Bytes that a command may take beyond what it takes otherwise."""
MOST = 4 << 30
"""Bytes at which a command is refused memory."""
PATIENCE = 900.0
"""Seconds after which a command hangs, on a machine that others load as well."""
CODES = (0, 1, 3)
EDITS = "facts."
"""Begins the names of edits files."""

MEMIT = (*APPLY, *STACKS["memit"])
CPU = ("--device", "cpu")
OF_MODEL: Mapping[str, tuple[str, ...]] = {
    "inspect": ("inspect", "model", "--norms", *CPU),
    "apply": (*MEMIT, "--out", "out"),
    "export": ("export", "run", "--base", "model", "--format", "lora", "--no-eval", *CPU, "--out", "out"),
    "apply-patch": ("apply-patch", "model", "patch", "--out", "out"),
    "eval": ("eval", "model", "facts.jsonl", "--sample", "1", *CPU),
    "diff": ("diff", "model", "run", *CPU),
    "check": ("check", "facts.jsonl", "--model", "model"),
    "stats": ("stats", "compute", "model", "--corpus", "corpus.txt", *CPU, "--tokens", "100", "--layers", "1"),
}
OF_RUN: Mapping[str, tuple[str, ...]] = {
    "inspect": ("inspect", "run", "--norms", "--base", "model", *CPU),
    "report": ("report", "run", "--base", "model", "--no-spectra", "--out", "page.html"),
    "export": ("export", "run", "--base", "model", "--format", "patch", *CPU, "--out", "out"),
    "undo": ("undo", "run"),
    "resume": (*MEMIT, "--out", "run", "--resume"),
    "repeat": ("apply", "--repeat", "run/editcli/run.json", "--out", "out"),
    "eval": ("eval", "run", "facts.jsonl", "--base", "--sample", "1", "--text", "text.txt", *CPU),
    "diff": ("diff", "model", "run", *CPU),
}
OF_PATCH = {"apply-patch": OF_MODEL["apply-patch"]}
TUNE = ("tune", "model", "facts.jsonl", "--sample", "2", "--trials", "1", "--corpus", "corpus.txt", *TARGETS)
OF_USER: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "facts.jsonl": {
        "apply": (*MEMIT, "--out", "out"),
        "check": OF_MODEL["check"],
        "convert": ("convert", "facts.jsonl", "--out", "converted.jsonl"),
        "eval": OF_MODEL["eval"],
    },
    "facts.json": {"convert": ("convert", "facts.json", "--out", "converted.jsonl")},
    "corpus.txt": {"apply": (*MEMIT, "--out", "out"), "stats": OF_MODEL["stats"]},
    "moments.safetensors": {"apply": (*MEMIT, "--stats", "moments.safetensors", "--out", "out")},
    "preset.toml": {"apply": (*MEMIT, "--preset", "preset.toml", "--out", "out")},
    "editcli.toml": {"check": OF_MODEL["check"], "inspect": OF_MODEL["inspect"]},
    "text.txt": {"eval": ("eval", "run", "facts.jsonl", "--base=model", "--sample", "1", "--text", "text.txt", *CPU)},
    "page.html": {"report": OF_RUN["report"]},
    "tune/study.jsonl": {"tune": (*TUNE, "--out", "tune", "--resume")},
    "tune/.lock": {"tune": (*TUNE, "--out", "tune", "--resume")},
}
MODEL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("additional_chat_templates/more.jinja", "model.safetensors", "model.safetensors.index.json", "README.md"),
    *("adapter_config.json", "notes.txt", "special_tokens_map.json"),
)
RUN_FILES = (
    *("editcli/run.json", "editcli/journal.jsonl", "editcli/state.safetensors", "editcli/outcomes.jsonl"),
    *("editcli/rejected.jsonl", "editcli/updates", "editcli/updates/000001.safetensors", "editcli/.lock", "editcli"),
    *("model.safetensors", "config.json", "tokenizer.json"),
)
PATCH_FILES = ("manifest.json", "patch.safetensors", "editcli/run.json")


@dataclass(frozen=True, slots=True)
class Case:
    """Something strange in the place of one file, and a command that meets it."""

    file: str
    strange: str
    name: str
    command: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.strange} as {self.file} through {self.name}"


def pipe(path: Path) -> None:
    """Put a named pipe that nobody writes to."""
    os.mkfifo(path)


def endless(path: Path) -> None:
    """Put a link to a device that never ends."""
    path.symlink_to("/dev/zero")


def a_socket(path: Path) -> None:
    """Put a socket that nobody listens to; its address is short, since systems allow a hundred characters."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def folder(path: Path) -> None:
    """Put a folder."""
    path.mkdir()


def sparse(path: Path) -> None:
    """Put a file that claims 12 GB and takes no room."""
    with path.open("wb") as file:
        file.truncate(SPARSE)


def link_out(path: Path) -> None:
    """Put a link to the file's own content, out of every folder that is passed around."""
    elsewhere = Path(tempfile.mkdtemp(dir=_work_of(path).parent)) / path.name
    aside = _aside(path)
    if aside.exists():
        aside.rename(elsewhere)
    else:
        elsewhere.write_text("{}", "utf-8")
    path.symlink_to(elsewhere)


def unreadable(path: Path) -> None:
    """Put the file's own content without permission to read it."""
    aside = _aside(path)
    if aside.exists():
        aside.rename(path)
    else:
        path.write_text("{}", "utf-8")
    path.chmod(0)


STRANGE: Mapping[str, Callable[[Path], None]] = {
    "a named pipe": pipe,
    "an endless device": endless,
    "a socket": a_socket,
    "a folder": folder,
    "a sparse file": sparse,
    "a link out": link_out,
    "a file without permissions": unreadable,
}


def cases() -> Iterator[Case]:
    """Yield every case."""
    for strange in STRANGE:
        for root, files, commands in (
            ("model", MODEL_FILES, OF_MODEL),
            ("run", RUN_FILES, OF_RUN),
            ("patch", PATCH_FILES, OF_PATCH),
        ):
            for file in files:
                yield from (Case(f"{root}/{file}", strange, name, command) for name, command in commands.items())
        for file, commands in OF_USER.items():
            # A pipe that the user gives as edits is read, however long its other end takes.
            if strange != "a named pipe" or not file.startswith("facts"):
                yield from (Case(file, strange, name, command) for name, command in commands.items())


class Exhibition:
    """Runs cases, and knows how much memory each command takes where nothing is strange."""

    def __init__(self, shop: Workshop):
        self.shop = shop
        self._peaks: dict[tuple[str, ...], int] = {}

    def show(self, case: Case) -> Shown:
        """Run one case; return how it ended."""
        work = self._work()
        path = work / case.file
        if path.exists():
            path.rename(_aside(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        STRANGE[case.strange](path)
        ended = self._run(work, case.command)
        beyond = ended.peak - self._peak(case.command)
        fault = fault_of(case, ended, work, beyond)
        shutil.rmtree(work)
        return Shown(ended, beyond, fault)

    def _work(self) -> Path:
        work = self.shop.copy("model", "run", "patch", "facts.jsonl", "facts.json", "corpus.txt", "moments.safetensors")
        (work / "text.txt").write_text("The river is long.\nThe capital is old.\n", "utf-8")
        (work / "preset.toml").write_text("layers = [1, 2]\n", "utf-8")
        return work

    def _peak(self, command: tuple[str, ...]) -> int:
        if command not in self._peaks:
            work = self._work()
            self._peaks[command] = self._run(work, command).peak
            shutil.rmtree(work)
        return self._peaks[command]

    def _run(self, work: Path, command: tuple[str, ...]) -> Ended:
        return self.shop.start(work, command, _bounded).wait(PATIENCE)


@dataclass(frozen=True, slots=True)
class Shown:
    """How a case ended."""

    ended: Ended
    beyond: int
    """Bytes beyond what the command takes where nothing is strange."""
    fault: str | None
    """What is wrong with it."""


def _may_be_usage(case: Case, ended: Ended) -> bool:
    """Tell whether exit code 2 is documented: of an edits file, and of a name that an option does not take."""
    return case.file.startswith(EDITS) or "Invalid value for" in ended.said


def fault_of(case: Case, ended: Ended, work: Path, beyond: int) -> str | None:
    """Return what is wrong with the end of a case; None where it is as documented."""
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    left = [path.name for path in work.rglob(".*") if path.suffix in (".tmp", ".partial")]
    faults = {
        "hangs": ended.timed_out,
        f"ends with {ended.code}": ended.code not in CODES and not (ended.code == 2 and _may_be_usage(case, ended)),
        "shows a traceback": "Traceback" in ended.said,
        f"says {len(errors)} sentences": len(errors) != (ended.code != 0),
        f"leaves {left}": bool(left),
        f"takes {beyond:,} bytes more than the command does otherwise": beyond > MEMORY,
    }
    fault = next((fault for fault, there in faults.items() if there), None)
    return None if fault is None else f"{case} {fault}: {ended.said[-300:]}"


def _aside(path: Path) -> Path:
    """Return where what was in the place of a file waits."""
    return _work_of(path).parent / f"{_work_of(path).name}-aside"


def _work_of(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name.startswith("work-"))


def _bounded() -> None:
    """Give up what a command needs in no case: rights of root, and memory that the whole machine would miss."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST, MOST))
    give_up_rights()
    if not permissions_hold():
        sys.exit("permissions do not hold for this user, so files without them show nothing; run it as another")


@click.command()
@click.option("--sample", default=0, help="Run so many cases, drawn by --seed; 0 for all.")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", metavar="TEXT", help="Run the cases whose names hold a text, such as 'sparse'.")
@click.option("--minutes", type=float, help="Stop after so many minutes; the result says how many cases were run.")
@click.option("--progress", type=click.Path(path_type=Path), help="Keep the counts here, and go on from them.")
@click.option("--out", type=click.Path(path_type=Path))
def main(
    sample: int, seed: int, only: str | None, minutes: float | None, progress: Path | None, out: Path | None
) -> None:
    """Run the cases."""
    chosen = [case for case in cases() if only is None or only in str(case)]
    random.Random(seed).shuffle(chosen)
    place, started = Path(tempfile.mkdtemp(prefix="special-")), time.perf_counter()
    corpus = (ROOT / "editcli" / "corpora" / "english.txt").read_text("utf-8")[:20_000]
    exhibition = Exhibition(Workshop(place, corpus))
    result: dict[str, Any] = {
        "cases": len(chosen),
        "run": 0,
        "by exit code": {},
        "failures": [],
        "most memory beyond the ordinary, bytes": 0,
        "longest seconds": 0.0,
        "seconds": 0.0,
    }
    if progress is not None and progress.is_file():
        result = json.loads(progress.read_text("utf-8"))
    before = result["seconds"]
    for case in chosen[result["run"] : sample or None]:
        if minutes is not None and time.perf_counter() - started > 60 * minutes:
            break
        _count(result, exhibition.show(case))
        result["seconds"] = round(before + time.perf_counter() - started)
        if progress is not None:
            progress.write_text(json.dumps(result), "utf-8")
        click.echo(f"{result['run']} of {len(chosen)}: {case}", err=True)
    write_result("special_files", result, out)
    shutil.rmtree(place, ignore_errors=True)
    click.echo(json.dumps(result, indent=1))
    if result["failures"]:
        sys.exit(1)


def _count(result: dict[str, Any], shown: Shown) -> None:
    """Count one case in the result."""
    code, codes = str(shown.ended.code), result["by exit code"]
    result["run"] += 1
    result["by exit code"] = dict(sorted({**codes, code: codes.get(code, 0) + 1}.items()))
    result["failures"] += [] if shown.fault is None else [shown.fault]
    beyond, longest = "most memory beyond the ordinary, bytes", "longest seconds"
    result[beyond] = max(result[beyond], shown.beyond)
    result[longest] = max(result[longest], round(shown.ended.seconds, 1))


if __name__ == "__main__":
    main()
