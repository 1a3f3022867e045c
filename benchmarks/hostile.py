"""Change the records of runs, of a patch and of a model in every way that a stranger could, and read them.

``python -m benchmarks.hostile --examples 20000`` makes a run of each stack, then for each example changes one record
(with all hashes made right again), runs one command in this process, and puts the records back. Exit codes 0, 1 and 3
are right, with one sentence where it is not 0, and 2 with the line of an edit that the changed records cannot write.
Whatever ends otherwise, takes a minute of the processor's time, takes 1 GB of memory more than the command does
otherwise, or leaves a half folder or a temporary file, is counted by its kind and ends the benchmark with an error. An
example depends on the seed and its number alone: ``--only NUMBER`` repeats one with its traceback. ``--progress FILE``
keeps the counts, so that an attack that was stopped goes on. Memory is measured on Linux.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.common import peak_memory, write_result
from editcli import __main__ as program
from editcli.errors import EditError
from editcli.records.journal import START, consume
from editcli.records.state import snapshot_digest
from editcli.requests.schema import from_record
from editcli.storage.files import read_safetensors, write_safetensors
from editcli.testing import tiny_model_folder

EDITS = [
    {
        "id": name,
        "prompt": "The capital of {} is",
        "subject": name,
        "target_new": target,
        "target_true": true,
        "paraphrase_prompts": [f"The capital of {name} is called"],
        "neighborhood_prompts": ["The river in Spain is"],
    }
    for name, target, true in (
        ("France", "Rome", "Paris"),
        ("Italy", "Berlin", "Rome"),
        ("Spain", "Tokyo", "Paris"),
        ("Greece", "London", "Rome"),
        ("Berlin", "Paris", "Rome"),
        ("Tokyo", "Greece", "Paris"),
    )
]
QUICK = ("-o", "targets.steps=1", "-o", "targets.prefixes=1", "-o", "targets.prefix_tokens=2")
SITES = ("--layers", "1-2", "--device", "cpu", "--batch-size", "2", "-o", "spectra.every=1")
STACKS: Mapping[str, tuple[str, ...]] = {
    "run": ("--editor", "rlsedit", "--stabilizer", "nas"),
    "run-alphaedit": (
        *("--editor", "alphaedit", "--stabilizer", "nas", "--stabilizer", "revive"),
        *("-o", "alphaedit.nullspace_threshold=0.5", "-o", "alphaedit.threshold_kind=directions"),
    ),
    "run-ultraedit": (
        "--editor",
        "ultraedit",
        "--stabilizer",
        "clip",
        "-o",
        "ultraedit.lr=1e-4",
        "-o",
        "ultraedit.pilots=4",
    ),
}
"""The stack of each run, by its folder: every component that saves a state is in one of them."""
SECONDS, PATIENCE = 60, 900
"""A command that takes longer hangs: seconds of the processor's time, and of any, which others may have taken."""
MEMORY = 1 << 30
"""Bytes that a command may take beyond what it takes otherwise."""
MOST = 6 << 30
"""Bytes at which a command is refused memory."""
SPARSE = 12 << 30
"""Bytes of a file without content."""
DEEP = "\0deep\0"
"""Stands for 100,000 brackets, which Python's own encoder cannot write."""
EDIT_REFUSED = re.compile(r"^error: (\S+\.jsonl:\d+: |.*: cannot be read: )", re.MULTILINE)
"""The sentence that names a line of an edits file, or an edits file that is not there."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**64), 10**400, 0.5, -0.5, 1e-320, 1e300, -1e308),
    *(float("nan"), float("inf"), float("-inf"), "", " ", "x", "done", "batch", "undo", "1", "-1", "1e999", "auto"),
    *("\ud800", "a\udfffb", "\x00", "a\x00b", "\x1b[31mred", "\u202e", "\n\n", "../../x", "/", "~", ".", "-", "a/b"),
    *("long " * 20_000, [], [[]], [None], ["x"], [1, 2, 3], [0.5], {}, {"": None}, {"a": {"b": [1]}}, {"id": 1}, DEEP),
)
WHOLE: tuple[bytes | None, ...] = (
    *(b"", b"null", b"5", b"NaN", b'"x"', b"[]", b"{}", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"{", b"\x00" * 4096),
    *(
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a": "\\ud800"}',
        b"[0" + b",0" * 5_000_000,
    ),
    None,
)
"""What takes the place of a whole file; None is a file of :data:`SPARSE` bytes."""


class HangError(BaseException):
    """A command took longer than :data:`SECONDS`."""


@dataclass
class Files:
    """The files of a folder, to be changed and put back."""

    folder: Path
    content: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        self.content = {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}

    def put_back(self) -> None:
        """Make the folder what it was."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and path.stat().st_size < 1 << 26 and self.content.get(name) == path.read_bytes():
                continue
            if path.is_dir() and any(one.startswith(f"{name}/") for one in self.content):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, data in self.content.items():
            path = self.folder / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)


class Workshop:
    """A folder with a model, edits, runs of them with one undo each, and a patch of the first run."""

    def __init__(self, folder: Path):
        self.folder = folder
        tiny_model_folder(folder / "base")
        text = "The capital of France is Paris. The river in Spain is long. " * 200
        (folder / "corpus.txt").write_text(text)
        (folder / "facts.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in EDITS))
        bad = '{"id": "bad", "prompt": "no subject {}", "target_new": "x"}\n'
        first = "".join(json.dumps(edit) + "\n" for edit in EDITS[:4])
        (folder / "first.jsonl").write_text(first + bad)
        os.chdir(folder)
        for run in STACKS:
            self._made(*self.apply(run, "first.jsonl", "--on-error", "skip"))
            self._made("undo", run, "--edit", "Italy")
        self._made("export", "run", "--format", "patch", "--out", "patch")
        self.files = {name: Files(folder / name) for name in (*STACKS, "patch", "base")}

    def _made(self, *words: str) -> None:
        code, text = self.run(words)
        assert code == 0, text

    def apply(self, run: str, edits: str, *words: str) -> tuple[str, ...]:
        """Return the command line of a run."""
        given = ("apply", edits, "--model", "base", "--corpus", "corpus.txt", "--out", run)
        return (*given, *SITES, *STACKS[run], *QUICK, *words)

    def run(self, words: tuple[str, ...]) -> tuple[int, str]:
        """Run one command in this process; return its exit code and what it said on stderr."""
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = program.main(["-q", *words])
        return code, said.getvalue()

    def put_back(self, *folders: str) -> None:
        """Undo what an example did."""
        for name in folders:
            self.files[name].put_back()
        for name in ("out", "page.html"):
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def leftovers(self) -> list[str]:
        """Return temporary files and half folders."""
        return [str(path) for path in self.folder.rglob(".*") if path.name.endswith((".tmp", ".partial"))]


# How records are changed.


def replaced(value: Any, chooser: random.Random) -> Any:
    """Return a JSON value in which one value, at any depth, is another one or gone."""
    places = list(_places(value))
    path = chooser.choice(places)
    if not path:
        return chooser.choice(VALUES)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    if chooser.random() < 0.25:
        del parent[path[-1]]
    elif isinstance(parent, dict) and chooser.random() < 0.1:
        parent[chooser.choice(("", "x", "a.b", "\ud800"))] = parent.pop(path[-1])
    else:
        parent[path[-1]] = chooser.choice(VALUES)
    return value


def to_text(value: Any) -> str:
    """Return a JSON text, also of what JSON does not know."""
    brackets = "[" * 100_000 + "]" * 100_000
    return json.dumps(value).replace(json.dumps(DEEP), brackets)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def one_value(folder: Path, name: str, chooser: random.Random) -> None:
    """Change one value of a JSON file."""
    path = folder / name
    path.write_text(to_text(replaced(json.loads(path.read_text("utf-8")), chooser)))


def one_line(folder: Path, name: str, chooser: random.Random) -> None:
    """Change one value in one line of a JSONL file, or put strange lines into it."""
    path = folder / name
    lines = path.read_text("utf-8").splitlines()
    number = chooser.randrange(len(lines))
    lines[number] = to_text(replaced(json.loads(lines[number]), chooser))
    path.write_text("\n".join(lines) + "\n")


def whole(folder: Path, name: str, chooser: random.Random) -> None:
    """Put something else in the place of a file, or nothing."""
    path, content = folder / name, chooser.choice(WHOLE)
    path.unlink(missing_ok=True)
    if content is None:
        with path.open("wb") as file:
            file.truncate(SPARSE)
    elif content:
        path.write_bytes(content)


def journal(folder: Path, name: str, chooser: random.Random) -> None:
    """Change one value of a journal line, and make the chain and the snapshot right again."""
    lines = [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]
    number = chooser.randrange(len(lines))
    lines[number] = replaced(lines[number], chooser)
    relink(folder, lines)


def segment(folder: Path, name: str, chooser: random.Random) -> None:
    """Change the edits or the tensors of a batch, and make every hash right again."""
    path = chooser.choice(sorted((folder / "editcli/updates").glob("*.safetensors")))
    tensors, metadata = read_safetensors(path)
    if chooser.random() < 0.5:
        key = chooser.choice(("edits", "edits", "places"))
        metadata[key] = to_text(replaced(json.loads(metadata[key]), chooser))
    elif chooser.random() < 0.2:
        key = chooser.choice(sorted(metadata))
        _drop_or_set(metadata, key, chooser)
    else:
        one_tensor(tensors, chooser)
    digest = write_safetensors(path, tensors, metadata)
    lines = [json.loads(line) for line in (folder / "editcli/journal.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        if line["segment"] == path.name:
            line["sha256"] = digest
    relink(folder, lines)


def state(folder: Path, name: str, chooser: random.Random) -> None:
    """Change the metadata or the tensors of the snapshot, and make its hash right again."""
    tensors, metadata = read_safetensors(folder / name)
    if chooser.random() < 0.4:
        metadata["settings"] = to_text(replaced(json.loads(metadata["settings"]), chooser))
    elif chooser.random() < 0.4:
        _drop_or_set(metadata, chooser.choice(sorted(metadata)), chooser)
    else:
        one_tensor(tensors, chooser)
    write_state(folder / name, tensors, metadata)


def one_tensor(tensors: dict[str, torch.Tensor], chooser: random.Random) -> None:
    """Remove a tensor, or give it another shape, type or content."""
    name = chooser.choice(sorted(tensors))
    tensor = tensors[name]
    changes: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: tensor.T.contiguous() if tensor.ndim == 2 else tensor[None],
        lambda: tensor.reshape(-1),
        lambda: tensor[None].clone(),
        lambda: tensor[..., :-1].clone() if tensor.ndim else tensor[None].repeat(3),
        lambda: torch.cat([tensor, tensor]) if tensor.ndim else tensor.double(),
        lambda: torch.empty(0),
        lambda: torch.tensor(0.0),
        lambda: tensor.to(torch.int64) if tensor.is_floating_point() else tensor.float(),
        lambda: tensor.to(torch.bfloat16),
        lambda: torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor - 1,
        lambda: torch.full_like(tensor, 1e38) if tensor.is_floating_point() else tensor + 2**40,
    )
    if chooser.random() < 0.2:
        del tensors[name]
    else:
        tensors[name] = chooser.choice(changes)()


def _drop_or_set(metadata: dict[str, str], key: str, chooser: random.Random) -> None:
    texts = [value for value in VALUES if isinstance(value, str) and value.isprintable()]
    if chooser.random() < 0.4:
        del metadata[key]
    else:
        metadata[key] = chooser.choice([*texts, "9" * 30, "\u0661", "null", "[]", "{}", '"x"', "[[[]]]", "[" * 100_000])


def relink(folder: Path, lines: list[Any]) -> None:
    """Write journal lines so that each names the hash of the one before it, and the last one into the snapshot."""
    texts: list[str] = []
    for line in lines:
        if isinstance(line, dict) and "previous" in line:
            line["previous"] = hashlib.sha256(texts[-1].encode()).hexdigest() if texts else START
        texts.append(to_text(line))
    (folder / "editcli/journal.jsonl").write_text("\n".join(texts) + "\n")
    path = folder / "editcli/state.safetensors"
    tensors, metadata = read_safetensors(path)
    metadata["line"] = texts[-1]
    with contextlib.suppress(EditError, ValueError, KeyError, TypeError, OSError, AttributeError, RecursionError):
        metadata["consumed"] = consume(START, list(_live(folder, lines)))
    write_state(path, tensors, metadata)


def _live(folder: Path, lines: list[Any]) -> Iterator[Any]:
    """Yield the edits in force, as far as the changed journal and segments tell."""
    live: list[Any] = []
    for line in lines:
        live = [*live, line] if line["kind"] == "batch" else [one for one in live if one["step"] <= line["step"]]
    for line in live:
        metadata = read_safetensors(folder / "editcli/updates" / line["segment"])[1]
        for record, (file, number) in zip(json.loads(metadata["edits"]), json.loads(metadata["places"]), strict=True):
            yield from_record(record, file=file, line=number)


def header(folder: Path, name: str, chooser: random.Random) -> None:
    """Change one value in the header of a safetensors file."""
    path = folder / name
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    text = to_text(replaced(json.loads(data[8:start]), chooser)).encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def write_state(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a snapshot with the hash of what it holds."""
    rest = {name: text for name, text in metadata.items() if name != "sha256"}
    write_safetensors(path, tensors, {**rest, "sha256": snapshot_digest(tensors, rest)})


RECORD, JOURNAL, STATE = "editcli/run.json", "editcli/journal.jsonl", "editcli/state.safetensors"
OUTCOMES, REJECTED = "editcli/outcomes.jsonl", "editcli/rejected.jsonl"
READERS = ("inspect", "report", "export lora", "export patch", "export full", "undo", "undo edit", "resume", "repeat")
RESUMERS = ("undo", "undo edit", "undo all", "resume", "undo dry", "inspect")
OPENERS = ("inspect model", "check", "diff", "eval", "apply", "apply-patch")
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
WEIGHTS = "model.safetensors"
RUNS = tuple(STACKS)


@dataclass(frozen=True)
class Row:
    """One kind of change: how, to which files of which folders, read by which commands."""

    change: Callable[[Path, str, random.Random], None]
    files: tuple[str, ...]
    commands: tuple[str, ...]
    folders: tuple[str, ...] = RUNS


ROWS: Mapping[str, Row] = {
    "one value of run.json": Row(one_value, (RECORD,), READERS),
    "a whole record": Row(whole, (RECORD, JOURNAL, STATE, OUTCOMES, REJECTED), READERS),
    "the snapshot": Row(state, (STATE,), RESUMERS),
    "a journal line": Row(journal, (JOURNAL,), (*RESUMERS, "report", "export lora", "export full")),
    "a segment": Row(segment, ("",), (*RESUMERS, "report", "export lora")),
    "a line of outcomes or rejected": Row(one_line, (OUTCOMES, REJECTED), ("report", "resume", "undo")),
    "a patch": Row(one_value, ("manifest.json", RECORD), ("apply-patch",), ("patch",)),
    "a whole file of a patch": Row(whole, ("manifest.json", RECORD, "patch.safetensors"), ("apply-patch",), ("patch",)),
    "one value of a model's file": Row(one_value, SETTINGS, OPENERS, ("base",)),
    "a whole file of a model": Row(whole, (*SETTINGS, WEIGHTS), OPENERS, ("base",)),
    "the header of a model's weights": Row(header, (WEIGHTS,), OPENERS, ("base",)),
}
"""What is changed; examples take turns."""


def commands(shop: Workshop, run: str) -> Mapping[str, tuple[str, ...]]:
    """Return the command lines that read a run, the patch or the model, by name."""
    cpu = ("--device", "cpu")
    memit = ("apply", "facts.jsonl", "--model", "base", "--editor", "memit", "--corpus", "corpus.txt")
    quick = ("--limit", "1", "--no-eval", "--layers", "1", *cpu, *QUICK)
    return {
        "inspect": ("inspect", run, "--norms"),
        "report": ("report", run, "--out", "page.html"),
        "export lora": ("export", run, "--out", "out", "--no-eval", *cpu),
        "export patch": ("export", run, "--out", "out", "--format", "patch"),
        "export full": ("export", run, "--out", "out", "--format", "full"),
        "undo": ("undo", run),
        "undo edit": ("undo", run, "--edit", "France"),
        "undo all": ("undo", run, "--to", "0"),
        "undo dry": ("undo", run, "--dry-run"),
        "resume": shop.apply(run, "facts.jsonl", "--resume"),
        "repeat": ("apply", "--repeat", f"{run}/editcli/run.json", "--out", "out", "--dry-run"),
        "apply-patch": ("apply-patch", "base", "patch", "--out", "out"),
        "inspect model": ("inspect", "base", "--norms"),
        "check": ("check", "facts.jsonl", "--model", "base"),
        "diff": ("diff", "base", run, *cpu),
        "eval": ("eval", "base", "facts.jsonl", "--sample", "1", *cpu),
        "apply": (*memit, "--out", "out", *quick),
    }


@dataclass
class Counts:
    """What came out of the examples so far."""

    examples: int = 0
    codes: dict[str, Counter[str]] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    """The number of the first example of each failure."""
    slowest: float = 0.0
    beyond: int = 0
    """Most bytes that a command took beyond what it takes otherwise."""

    def add(self, kind: str, failure: str, code: str, number: int) -> None:
        """Count one example: ``failure`` is empty where it ended as it should."""
        self.examples += 1
        self.codes.setdefault(kind, Counter())["failed" if failure else code] += 1
        if failure:
            self.failures[failure] += 1
            self.first.setdefault(failure, number)

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        return {
            "examples": self.examples,
            "failures": sum(self.failures.values()),
            "exit_codes": {name: dict(sorted(codes.items())) for name, codes in self.codes.items()},
            "kinds": {kind: {"times": n, "example": self.first[kind]} for kind, n in self.failures.most_common()},
            "slowest_seconds_of_the_processor": round(self.slowest, 2),
            "most_memory_beyond_the_ordinary_mib": self.beyond >> 20,
        }

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Counts:
        """Take back what :meth:`to_json` returned."""
        return cls(
            figures["examples"],
            {name: Counter(codes) for name, codes in figures["exit_codes"].items()},
            Counter({kind: entry["times"] for kind, entry in figures["kinds"].items()}),
            {kind: entry["example"] for kind, entry in figures["kinds"].items()},
            figures["slowest_seconds_of_the_processor"],
            figures["most_memory_beyond_the_ordinary_mib"] << 20,
        )


class Attack:
    """Runs examples and counts what came out."""

    def __init__(self, shop: Workshop, seed: int, counts: Counts | None = None):
        self.shop, self.seed, self.counts = shop, seed, counts or Counts()
        self.commands = {run: commands(shop, run) for run in RUNS}
        self._ordinary = {run: {name: self._peak(run, name) for name in self.commands[run]} for run in RUNS}

    def _peak(self, run: str, name: str) -> int:
        """Run a command on records that nobody changed, which must succeed; return its peak memory in bytes."""
        _forget_peak()
        code, text = self.shop.run(self.commands[run][name])
        assert code == 0, f"{name}: {text}"
        self.shop.put_back(run)
        return peak_memory()

    def example(self, number: int, *, loud: bool = False) -> None:
        """Change one record, run one command, count what came out, and put everything back."""
        chooser = random.Random(f"{self.seed} {number}")
        name = list(ROWS)[number % len(ROWS)]
        row = ROWS[name]
        command = chooser.choice(row.commands)
        if command == "report" and chooser.random() < 0.8:
            # Drawing would take most of the time of all examples together.
            command = "inspect"
        folder = chooser.choice(row.folders)
        run = folder if folder in RUNS else chooser.choice(RUNS)
        row.change(self.shop.folder / folder, chooser.choice(row.files), chooser)
        code, fault = self._outcome(run, command, loud=loud)
        self.counts.add(name, f"{name}, {command}: {fault}" if fault else "", code, number)
        self.shop.put_back(*{folder, run})

    def _outcome(self, run: str, command: str, *, loud: bool) -> tuple[str, str]:
        """Run a command; return its exit code and what was wrong, each empty where there is none."""
        started, before = time.process_time(), _forget_peak()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(PATIENCE)
        try:
            code, text = self.shop.run(self.commands[run][command])
        except BaseException as error:
            if loud:
                traceback.print_exc()
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return "", f"{Path(frame.filename).name}:{frame.name}: {type(error).__name__}: {str(error)[:80]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            self.counts.slowest = max(self.counts.slowest, time.process_time() - started)
        if loud:
            print(code, text)
        beyond = peak_memory() - max(before, self._ordinary[run][command])
        self.counts.beyond = max(self.counts.beyond, beyond)
        if beyond > MEMORY:
            return str(code), f"takes {beyond >> 20} MiB more than otherwise"
        return str(code), self._fault(command, code, text)

    def _fault(self, command: str, code: int, text: str) -> str:
        """Return what is wrong with the end of a command; empty where nothing is."""
        if code == 2 and (command == "check" or EDIT_REFUSED.search(text)):
            # An edit that a changed tokenizer has no tokens for, or that a changed editor cannot write, is refused with
            # its line, as documented; check lists all of them on stdout.
            return ""
        if code not in (0, 1, 3):
            return f"exit code {code}: {text[-80:]}"
        if code and len([line for line in text.splitlines() if line.startswith("error: ")]) != 1:
            return f"exit code {code} without a sentence: {text[-80:]}"
        if self.shop.leftovers():
            return "a temporary file or a half folder is left"
        # A run that fails while it writes its model has its records there, so that it can be resumed.
        left = self.shop.folder / "out"
        return "a folder is left" if code and left.exists() and not (left / "editcli" / "run.json").exists() else ""


def _forget_peak() -> int:
    """Have the system measure the peak memory of this process anew; return the bytes that it takes now."""
    if not sys.platform.startswith("linux"):
        return peak_memory()
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


@contextlib.contextmanager
def attacking(folder: Path, seed: int, counts: Counts | None = None) -> Iterator[Attack]:
    """Make the runs to attack in ``folder``, and work there."""
    home = Path.cwd()
    sync, before = os.fsync, {number: signal.signal(number, _hang) for number in (signal.SIGALRM, signal.SIGPROF)}
    # Nothing here must survive a power cut.
    os.fsync = lambda descriptor: None
    # Nothing here changes what is installed, and looking for it takes a quarter of a quick command's time.
    discover, program.load_plugins = program.load_plugins, cache(program.load_plugins)
    try:
        yield Attack(Workshop(folder), seed, counts)
    finally:
        os.fsync, program.load_plugins = sync, discover
        for number, handler in before.items():
            signal.signal(number, handler)
        os.chdir(home)


def _hang(number: int, frame: Any) -> None:
    raise HangError(f"more than {SECONDS} seconds of the processor's time, or {PATIENCE} of any")


@click.command()
@click.option("--examples", default=2000, show_default=True)
@click.option("--first", default=0, show_default=True, help="Number of the first example.")
@click.option("--kind", type=click.Choice(list(ROWS)), help="Run the examples of one kind of change alone.")
@click.option("--only", type=int, help="Repeat one example and show its traceback.")
@click.option("--seed", default=0, show_default=True)
@click.option("--progress", type=click.Path(path_type=Path), help="Keep the counts here, and go on from them.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(
    examples: int, first: int, kind: str | None, only: int | None, seed: int, progress: Path | None, out: Path | None
) -> None:
    """Change records, read them, count."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MOST, resource.RLIM_INFINITY))
    started = time.perf_counter()
    out, progress = (None if path is None else path.absolute() for path in (out, progress))
    saved: dict[str, Any] = {"next": first, "seconds": 0.0}
    if progress is not None and progress.is_file():
        saved = json.loads(progress.read_text("utf-8"))
    counts = Counts.of(saved["counts"]) if "counts" in saved else None
    turns = [number for number in range(len(ROWS)) if kind in (None, list(ROWS)[number])]
    with tempfile.TemporaryDirectory() as name, attacking(Path(name), seed, counts) as attack:
        if only is not None:
            attack.example(only, loud=True)
            return
        for number in range(saved["next"], first + examples):
            if number % len(ROWS) not in turns:
                continue
            attack.example(number)
            if attack.counts.examples % 100 == 0:
                figures = attack.counts.to_json()
                print(f"{figures['examples']} examples, {figures['failures']} failures", file=sys.stderr)
                if progress is not None:
                    seconds = saved["seconds"] + time.perf_counter() - started
                    state = {"next": number + 1, "seconds": seconds, "counts": figures}
                    progress.write_text(json.dumps(state, indent=1), "utf-8")
        seconds = saved["seconds"] + time.perf_counter() - started
        result = {**attack.counts.to_json(), "seed": seed, "seconds": round(seconds)}
    print(json.dumps(result, indent=2))
    write_result("hostile", result, out)
    if result["failures"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
