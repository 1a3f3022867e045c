"""Change the records of a run and of its patch in every way that a stranger could, and read them by every command.

``python -m benchmarks.hostile --examples 20000`` makes one run, then for each example changes one record (with all
hashes made right again), runs one command in this process, and puts the records back. Whatever is not exit code 0 to 3
with one sentence, or takes a minute, or leaves a half folder or a temporary file, is counted by its kind and ends the
command with an error. An example depends on the seed and its number alone: ``--only NUMBER`` repeats one with its
traceback.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
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
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.common import write_result
from editcli.__main__ import main as run_editcli
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
STACK = ("--layers", "1-2", "--device", "cpu", "--batch-size", "2", "--editor", "rlsedit", "--stabilizer", "nas")
SECONDS = 60
"""A command that takes longer hangs."""
SPARSE = 12 << 30
"""Bytes of a file without content."""
DEEP = "\0deep\0"
"""Stands for 100,000 brackets, which Python's own encoder cannot write."""
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


class HangError(Exception):
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
    """A folder with a model, edits, a run of them with one undo, and a patch of that run."""

    def __init__(self, folder: Path):
        self.folder, self.home = folder, Path.cwd()
        tiny_model_folder(folder / "base")
        text = "The capital of France is Paris. The river in Spain is long. " * 200
        (folder / "corpus.txt").write_text(text)
        (folder / "facts.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in EDITS))
        bad = '{"id": "bad", "prompt": "no subject {}", "target_new": "x"}\n'
        first = "".join(json.dumps(edit) + "\n" for edit in EDITS[:4])
        (folder / "first.jsonl").write_text(first + bad)
        os.chdir(folder)
        for words in (
            self.apply("first.jsonl", "--on-error", "skip", "-o", "rlsedit.deletion=1")[:-2],
            ("undo", "run", "--edit", "Italy"),
            ("export", "run", "--format", "patch", "--out", "patch"),
        ):
            code, text = self.run(words)
            assert code == 0, text
        self.run_files, self.patch_files = Files(folder / "run"), Files(folder / "patch")

    def apply(self, edits: str, *words: str) -> tuple[str, ...]:
        """Return the command line of a run."""
        return ("apply", edits, "--model", "base", "--corpus", "corpus.txt", "--out", "run", *STACK, *QUICK, *words)

    def run(self, words: tuple[str, ...]) -> tuple[int, str]:
        """Run one command in this process; return its exit code and what it said on stderr."""
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = run_editcli(["-q", *words])
        return code, said.getvalue()

    def put_back(self) -> None:
        """Undo what an example did."""
        self.run_files.put_back()
        self.patch_files.put_back()
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
    path.unlink()
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


def write_state(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a snapshot with the hash of what it holds."""
    rest = {name: text for name, text in metadata.items() if name != "sha256"}
    write_safetensors(path, tensors, {**rest, "sha256": snapshot_digest(tensors, rest)})


RECORD, JOURNAL, STATE = "editcli/run.json", "editcli/journal.jsonl", "editcli/state.safetensors"
OUTCOMES, REJECTED = "editcli/outcomes.jsonl", "editcli/rejected.jsonl"
READERS = ("inspect", "report", "export lora", "export patch", "export full", "undo", "undo edit", "resume", "repeat")
RESUMERS = ("undo", "undo edit", "undo all", "resume", "undo dry", "inspect")


@dataclass(frozen=True)
class Row:
    """One kind of change: how, to which files of which folder, read by which commands."""

    change: Callable[[Path, str, random.Random], None]
    files: tuple[str, ...]
    commands: tuple[str, ...]
    folder: str = "run"


ROWS: Mapping[str, Row] = {
    "one value of run.json": Row(one_value, (RECORD,), READERS),
    "a whole record": Row(whole, (RECORD, JOURNAL, STATE, OUTCOMES, REJECTED), READERS),
    "the snapshot": Row(state, (STATE,), RESUMERS),
    "a journal line": Row(journal, (JOURNAL,), (*RESUMERS, "report", "export lora", "export full")),
    "a segment": Row(segment, ("",), (*RESUMERS, "report", "export lora")),
    "a line of outcomes or rejected": Row(one_line, (OUTCOMES, REJECTED), ("report", "resume", "undo")),
    "a patch": Row(one_value, ("manifest.json", RECORD), ("apply-patch",), "patch"),
    "a whole file of a patch": Row(whole, ("manifest.json", RECORD, "patch.safetensors"), ("apply-patch",), "patch"),
}


class Attack:
    """Runs examples and counts what came out."""

    def __init__(self, shop: Workshop, seed: int):
        self.shop, self.seed = shop, seed
        self.codes: dict[str, Counter[str]] = {name: Counter() for name in ROWS}
        self.failures: Counter[str] = Counter()
        self.examples: dict[str, int] = {}
        self.slowest = 0.0
        resume = shop.apply("facts.jsonl", "--resume")
        lora = ("export", "run", "--out", "out", "--no-eval", "--device", "cpu")
        self.commands: Mapping[str, tuple[str, ...]] = {
            "inspect": ("inspect", "run", "--norms"),
            "report": ("report", "run", "--out", "page.html"),
            "export lora": lora,
            "export patch": ("export", "run", "--out", "out", "--format", "patch"),
            "export full": ("export", "run", "--out", "out", "--format", "full"),
            "undo": ("undo", "run"),
            "undo edit": ("undo", "run", "--edit", "France"),
            "undo all": ("undo", "run", "--to", "0"),
            "undo dry": ("undo", "run", "--dry-run"),
            "resume": resume,
            "repeat": ("apply", "--repeat", "run/editcli/run.json", "--out", "out", "--dry-run"),
            "apply-patch": ("apply-patch", "base", "patch", "--out", "out"),
        }

    def example(self, number: int, *, loud: bool = False) -> None:
        """Change one record, run one command, count what came out, and put everything back."""
        chooser = random.Random(f"{self.seed} {number}")
        name = list(ROWS)[number % len(ROWS)]
        row = ROWS[name]
        command = chooser.choice(row.commands)
        if command == "report" and chooser.random() < 0.5:
            # Drawing takes most of the time of all examples together.
            command = "inspect"
        row.change(self.shop.folder / row.folder, chooser.choice(row.files), chooser)
        outcome = self._outcome(command, loud=loud)
        self.codes[name][outcome if outcome.isdigit() else "failed"] += 1
        if not outcome.isdigit():
            self.failures[f"{name}, {command}: {outcome}"] += 1
            self.examples.setdefault(f"{name}, {command}: {outcome}", number)
        self.shop.put_back()

    def _outcome(self, command: str, *, loud: bool) -> str:
        """Return the exit code, or what was wrong."""
        started = time.perf_counter()
        signal.alarm(SECONDS)
        try:
            code, text = self.shop.run(self.commands[command])
        except BaseException as error:
            if loud:
                traceback.print_exc()
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return f"{Path(frame.filename).name}:{frame.name}: {type(error).__name__}: {str(error)[:80]}"
        finally:
            signal.alarm(0)
            self.slowest = max(self.slowest, time.perf_counter() - started)
        if loud:
            print(code, text)
        if code not in (0, 1, 2, 3):
            return f"exit code {code}"
        if code and len([line for line in text.splitlines() if line.startswith("error: ")]) != 1:
            return f"exit code {code} without a sentence: {text[-80:]}"
        if self.shop.leftovers():
            return "a temporary file or a half folder is left"
        return "a folder is left" if code and (self.shop.folder / "out").exists() else str(code)

    def result(self) -> dict[str, Any]:
        """Return the figures."""
        return {
            "examples": sum(sum(codes.values()) for codes in self.codes.values()),
            "failures": sum(self.failures.values()),
            "exit_codes": {name: dict(sorted(codes.items())) for name, codes in self.codes.items()},
            "kinds": {kind: {"times": n, "example": self.examples[kind]} for kind, n in self.failures.most_common()},
            "slowest_seconds": round(self.slowest, 2),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        }


@contextlib.contextmanager
def attacking(folder: Path, seed: int) -> Iterator[Attack]:
    """Make the run to attack in ``folder``, and work there."""
    home = Path.cwd()
    sync, before = os.fsync, signal.signal(signal.SIGALRM, _hang)
    # Nothing here must survive a power cut.
    os.fsync = lambda descriptor: None
    try:
        yield Attack(Workshop(folder), seed)
    finally:
        os.fsync = sync
        signal.signal(signal.SIGALRM, before)
        os.chdir(home)


def _hang(number: int, frame: Any) -> None:
    raise HangError(f"longer than {SECONDS} seconds")


@click.command()
@click.option("--examples", default=2000, show_default=True)
@click.option("--first", default=0, show_default=True, help="Number of the first example.")
@click.option("--only", type=int, help="Repeat one example and show its traceback.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(examples: int, first: int, only: int | None, seed: int, out: Path | None) -> None:
    """Change records, read them, count."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    out = None if out is None else out.absolute()
    with tempfile.TemporaryDirectory() as name, attacking(Path(name), seed) as attack:
        if only is not None:
            attack.example(only, loud=True)
            return
        for number in range(first, first + examples):
            attack.example(number)
            if number % 100 == 99:
                print(f"{number + 1 - first} examples, {attack.result()['failures']} failures", file=sys.stderr)
        result = {**attack.result(), "seed": seed, "seconds": round(time.perf_counter() - started)}
    print(json.dumps(result, indent=2))
    write_result("hostile", result, out)
    if result["failures"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
