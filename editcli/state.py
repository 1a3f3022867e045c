"""The files of a run: a snapshot to go on from, a journal of what was done, and a segment of factors per batch.

The journal is a chain: each line holds the sha256 of the line before it and of its own segment, so a torn tail is
recognised and cut and a flipped bit is refused, never trusted. The snapshot of a step is written before that step's
journal line, and carries the line, so that a crash between the two loses nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from editcli.edits import EditRequest, from_record
from editcli.errors import RequestError, StateError
from editcli.files import sync_folder, write_bytes, write_json, write_safetensors
from editcli.interfaces import Problem, Site, Update

FORMAT = 1
START = "0" * 64
"""What the first journal line names as its predecessor."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a stream needs to go on after ``step`` batches."""

    step: int
    sequence: int
    """Number of the last journal line."""
    consumed: str
    """Rolling hash over the edits that were read so far."""
    tensors: Mapping[str, Tensor]
    """``master/<module>`` (d_out, d_in) float32 and ``component/<name>/<key>``."""
    settings: Mapping[str, Any]
    """What must match on resume: base fingerprint, stack, options, layers, seed, prefixes."""
    line: str
    """The journal line of the last step; empty before the first."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the journal."""

    sequence: int
    kind: str
    step: int
    edits: tuple[str, ...] = ()
    segment: str | None = None
    sha256: str | None = None
    consumed: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)


class RunFolder:
    """The ``editcli`` folder inside an output folder."""

    def __init__(self, out: Path):
        self.out = Path(out)
        self.folder = self.out / "editcli"
        self.journal = self.folder / "journal.jsonl"
        self.state = self.folder / "state.safetensors"
        self.updates = self.folder / "updates"
        self.record = self.folder / "run.json"
        self.rejected = self.folder / "rejected.jsonl"

    @property
    def is_run(self) -> bool:
        """Whether this is an output folder of ours."""
        return self.record.is_file() or self.journal.is_file() or self.state.is_file()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock; raise :class:`StateError` when another process does.

        The lock is the operating system's, so it ends with its process however that ends: there is no stale lock.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StateError(f"{self.out} is in use by another editcli process; wait for it or stop it") from error
        try:
            yield
        finally:
            lock.release()

    def create(self) -> None:
        """Make the folders of a new run."""
        self.updates.mkdir(parents=True, exist_ok=True)

    def write_snapshot(self, snapshot: Snapshot) -> None:
        """Write the snapshot atomically; its tensors are hashed so that a flipped bit is found on reading."""
        metadata = {
            "format": str(FORMAT),
            "step": str(snapshot.step),
            "sequence": str(snapshot.sequence),
            "consumed": snapshot.consumed,
            "settings": json.dumps(snapshot.settings, sort_keys=True),
            "line": snapshot.line,
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in snapshot.tensors.items()}
        write_safetensors(self.state, tensors, {**metadata, "sha256": _digest(tensors, metadata)})

    def read_snapshot(self) -> Snapshot:
        """Read the snapshot; raise :class:`StateError` when it is missing, damaged or of another format."""
        if not self.state.is_file():
            raise StateError(f"{self.out} has no {self.state.name}: there is nothing to resume from; start a new run")
        try:
            data = self.state.read_bytes()
            tensors, metadata = load(data), _metadata(data)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise StateError(f"{self.state} is damaged ({error}); restore a backup or start a new run") from error
        if metadata.get("format") != str(FORMAT):
            raise StateError(
                f"{self.state} has format {metadata.get('format')!r}, this editcli reads format {FORMAT}; "
                "use the editcli version named in run.json"
            )
        stated = metadata.pop("sha256", "")
        if stated != _digest(tensors, metadata):
            raise StateError(f"{self.state} is damaged: its content does not match its hash; start a new run")
        return Snapshot(
            step=int(metadata["step"]),
            sequence=int(metadata["sequence"]),
            consumed=metadata["consumed"],
            tensors=tensors,
            settings=json.loads(metadata["settings"]),
            line=metadata["line"],
        )

    def write_segment(
        self,
        sequence: int,
        requests: Sequence[EditRequest],
        problems: Mapping[Site, Problem],
        updates: Mapping[Site, Update],
    ) -> tuple[str, str]:
        """Write the factors of one batch; return the segment's name and sha256."""
        tensors: dict[str, Tensor] = {}
        for site, update in updates.items():
            tensors[f"{site.module}.keys"] = problems[site].keys.float()
            tensors[f"{site.module}.left"] = update.left
            tensors[f"{site.module}.right"] = update.right
        name = f"{sequence:06d}.safetensors"
        records = json.dumps([request.to_json() for request in requests], ensure_ascii=False)
        data = write_safetensors(self.updates / name, tensors, {"format": str(FORMAT), "edits": records})
        return name, hashlib.sha256(data).hexdigest()

    def read_segment(self, entry: Entry) -> tuple[list[EditRequest], dict[str, Tensor]]:
        """Read one batch's edits and factors; raise :class:`StateError` unless it is what the journal says."""
        path = self.updates / str(entry.segment)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StateError(f"cannot read {path}, which the journal names: {error.strerror or error}") from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise StateError(f"{path} is damaged: its content does not match the journal; restore it from a backup")
        try:
            records = json.loads(_metadata(data)["edits"])
            return [from_record(record, file=str(path)) for record in records], load(data)
        except (SafetensorError, ValueError, KeyError, RequestError) as error:
            raise StateError(f"{path} cannot be read: {error}") from error

    def append(self, line: str) -> None:
        """Append one line to the journal and make it durable."""
        new = not self.journal.exists()
        with self.journal.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(self.folder)

    def read_journal(self) -> list[tuple[Entry, str]]:
        """Return the journal's good lines with their text; a torn last line is left out.

        Raises :class:`StateError` when a line before the last is damaged: then history itself is in doubt.
        """
        if not self.journal.is_file():
            return []
        lines = self.journal.read_bytes().split(b"\n")
        # A line counts only with its line feed; what follows the last one is the torn tail of a crash.
        return list(_chain(lines[:-1], self.journal))

    def cut_journal(self, keep: Sequence[str]) -> None:
        """Rewrite the journal with the given lines only."""
        write_bytes(self.journal, b"".join(line.encode() + b"\n" for line in keep))

    def drop_unnamed_segments(self, named: Sequence[str]) -> None:
        """Remove segments that no journal line names: a crash came before their line was written."""
        for path in self.updates.glob("*.safetensors"):
            if path.name not in named:
                path.unlink()

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write run.json."""
        write_json(self.record, record)

    def read_record(self) -> dict[str, Any]:
        """Read run.json; empty when a crash came before it was first written."""
        try:
            return json.loads(self.record.read_text("utf-8")) if self.record.is_file() else {}
        except (OSError, ValueError) as error:
            raise StateError(f"{self.record} cannot be read: {error}") from error


def journal_line(entry: Entry, previous: str) -> str:
    """Return the text of a journal line that follows the line ``previous`` (empty for the first)."""
    fields: dict[str, Any] = {"sequence": entry.sequence, "kind": entry.kind, "step": entry.step}
    fields |= {"edits": list(entry.edits), "segment": entry.segment, "sha256": entry.sha256}
    fields |= {"consumed": entry.consumed, **entry.body, "previous": _line_digest(previous)}
    return json.dumps(fields, ensure_ascii=False, allow_nan=False)


def consume(digest: str, requests: Sequence[EditRequest]) -> str:
    """Advance the rolling hash over the edits of a stream."""
    for request in requests:
        digest = hashlib.sha256(f"{digest}{request.digest}".encode()).hexdigest()
    return digest


def _chain(lines: Sequence[bytes], path: Path) -> Iterator[tuple[Entry, str]]:
    previous = ""
    for number, raw in enumerate(lines, start=1):
        try:
            text = raw.decode("utf-8")
            fields = json.loads(text)
            entry = Entry(
                sequence=int(fields.pop("sequence")),
                kind=str(fields.pop("kind")),
                step=int(fields.pop("step")),
                edits=tuple(fields.pop("edits")),
                segment=fields.pop("segment"),
                sha256=fields.pop("sha256"),
                consumed=fields.pop("consumed"),
                body=fields,
            )
            linked = fields.pop("previous") == _line_digest(previous)
        except (ValueError, KeyError, TypeError) as error:
            raise StateError(f"{path}:{number} is damaged ({error}); restore it from a backup") from error
        if not linked:
            raise StateError(f"{path}:{number} does not follow the line before it: the journal was changed; restore it")
        yield entry, text
        previous = text


def _line_digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest() if line else START


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    import torch

    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length]).get("__metadata__", {}))
