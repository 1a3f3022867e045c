"""The files of a run: a snapshot to go on from, a journal of what was done, and a segment of factors per batch.

The journal is a chain: each line holds the sha256 of the line before it and of its own segment, so a torn tail is
recognised and cut and a flipped bit is refused, never trusted. The snapshot of a step is written before that step's
journal line, and carries the line, so that a crash between the two loses nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from editcli.errors import EditError, FileError, ModelError, StateError
from editcli.formatting import shorten
from editcli.plugin.interfaces import Problem, Site, Update
from editcli.requests.schema import EditRequest, from_record
from editcli.storage.checkpoint import file_digest, opened_tensors, read_header
from editcli.storage.choice import is_plain_name
from editcli.storage.files import (
    is_leftover,
    read_metadata,
    read_safetensors,
    sync_folder,
    tensor_bytes,
    write_bytes,
    write_json,
    write_safetensors,
)
from editcli.storage.opening import JOURNAL, RECORD, is_there, read_bytes, read_text

FORMAT = 1
_ROWS, _MIX = 256, 0x9E3779B97F4A7C15 - 2**64
"""Rows that are summed at once, and the increment of SplitMix64."""
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
        self.outcomes = self.folder / "outcomes.jsonl"
        self.rejected = self.folder / "rejected.jsonl"
        self.lock = self.folder / ".lock"

    @property
    def is_run(self) -> bool:
        """Whether this is an output folder of ours."""
        return any(is_there(path) for path in (self.record, self.journal, self.state))

    def require(self) -> None:
        """Raise :class:`StateError` unless this is an output folder of ours."""
        if not self.is_run:
            raise StateError(f"{self.out} is not a run of editcli; pass the folder that 'editcli apply' wrote")

    @property
    def is_fresh(self) -> bool:
        """Whether a run was begun here and was killed before it kept anything."""
        if self.is_run or not self.folder.is_dir() or set(_kept(self.out)) != {self.folder}:
            return False
        return set(_kept(self.folder)) <= {self.lock, self.updates} and not set(_kept(self.updates))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock; raise :class:`StateError` when another process does.

        The lock is the operating system's, so it ends with its process however that ends: there is no stale lock. An
        output folder that is made here is removed again when the block fails before the journal was begun.
        """
        self.refuse_links()
        created = not self.out.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.lock)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StateError(f"{self.out} is in use by another editcli process; wait for it or stop it") from error
        try:
            self._sweep()
            yield
        except BaseException:
            if created and not self.journal.exists():
                shutil.rmtree(self.out, ignore_errors=True)
            raise
        finally:
            lock.release()

    def refuse_links(self) -> None:
        """Raise :class:`StateError` where a part of the record is a link: what it leads to would be written to."""
        for path in (self.folder, self.lock, self.journal, self.state, self.record, self.updates):
            if path.is_symlink():
                raise StateError(f"{path} is a symbolic link, which editcli does not follow to write; put a copy there")
        for path, is_right, kind in (
            (self.folder, self.folder.is_dir, "folder"),
            (self.updates, self.updates.is_dir, "folder"),
            (self.lock, self.lock.is_file, "file"),
        ):
            if is_there(path) and not is_right():
                raise StateError(f"{path} is no {kind}, so it is not what editcli wrote; remove it")

    def _sweep(self) -> None:
        """Remove the unfinished files of a process that was killed."""
        for folder in (self.out, self.folder, self.updates):
            for path in folder.glob(".*"):
                if is_leftover(path):
                    path.unlink()

    def create(self) -> None:
        """Make the folders of a new run."""
        self.updates.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder)
        sync_folder(self.out)

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
        write_safetensors(self.state, snapshot.tensors, {**metadata, "sha256": _digest(snapshot.tensors, metadata)})

    def read_snapshot(self) -> Snapshot:
        """Read the snapshot; raise :class:`StateError` when it is missing, damaged or of another format."""
        tensors, metadata = self._read_state(lambda path: read_safetensors(path, folder=self.out))
        stated = metadata.pop("sha256", "")
        if stated != _digest(tensors, metadata):
            raise StateError(f"{self.state} is damaged: its content does not match its hash; {self._advice}")
        return Snapshot(
            step=int(metadata["step"]),
            sequence=int(metadata["sequence"]),
            consumed=metadata["consumed"],
            tensors=tensors,
            settings=json.loads(metadata["settings"]),
            line=metadata["line"],
        )

    def read_settings(self) -> dict[str, Any]:
        """Return the settings of the snapshot without reading its tensors; raises as :meth:`read_snapshot` does."""
        _, metadata = self._read_state(lambda path: ({}, read_metadata(path, folder=self.out)))
        try:
            return dict(json.loads(metadata["settings"]))
        except (ValueError, KeyError, TypeError) as error:
            raise StateError(f"{self.state} is damaged ({error}); {self._advice}") from error

    def _read_state(
        self, read: Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Read tensors and metadata of the snapshot; raise :class:`StateError` where there is none of this format."""
        if not is_there(self.state):
            raise StateError(f"{self.out} has no {self.state.name}: there is nothing to resume from; start a new run")
        try:
            tensors, metadata = read(self.state)
        except FileError as error:
            raise StateError(f"{error}; {self._advice}") from error
        except (SafetensorError, OSError, ValueError, KeyError, EditError) as error:
            raise StateError(f"{self.state} is damaged ({error}); {self._advice}") from error
        if metadata.get("format") != str(FORMAT):
            raise StateError(
                f"{self.state} has format {metadata.get('format')!r}, this editcli reads format {FORMAT}; "
                "use the editcli version named in run.json"
            )
        return tensors, metadata

    @property
    def _advice(self) -> str:
        """What to do about a lost snapshot: the model beside it is whole, but the stream cannot go on from it."""
        again = f"editcli apply --recipe {self.record}"
        return f"the model in {self.out} is not concerned; restore a backup, or repeat a run that had ended: {again}"

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
            parts = {"keys": problems[site].keys, "residual": problems[site].residual}
            for name, tensor in {**parts, "left": update.left, "right": update.right}.items():
                # Copies, because an editor may use the keys themselves as a factor, and the format shares nothing.
                tensors[f"{site.module}.{name}"] = tensor.clone()
        name = f"{sequence:06d}.safetensors"
        metadata = {
            "format": str(FORMAT),
            "edits": json.dumps([request.to_json() for request in requests], ensure_ascii=False),
            "places": json.dumps([[request.file, request.line] for request in requests], ensure_ascii=False),
        }
        return name, write_safetensors(self.updates / name, tensors, metadata)

    def read_segment(self, entry: Entry) -> tuple[list[EditRequest], dict[str, Tensor]]:
        """Read one batch's edits and factors; raise :class:`StateError` unless it is what the journal says."""
        path = self._checked_segment(entry)
        try:
            tensors, metadata = read_safetensors(path, folder=self.out)
            return _requests(metadata), tensors
        except (SafetensorError, OSError, ValueError, KeyError, EditError) as error:
            raise StateError(f"{path} cannot be read: {error}") from error

    def read_requests(self, entry: Entry) -> list[EditRequest]:
        """Read one batch's edits without its factors; raise as :meth:`read_segment` does."""
        path = self._checked_segment(entry)
        try:
            with opened_tensors(path, folder=self.out) as file:
                return _requests(dict(file.metadata() or {}))
        except (SafetensorError, OSError, ValueError, KeyError, EditError) as error:
            raise StateError(f"{path} cannot be read: {error}") from error

    def _checked_segment(self, entry: Entry) -> Path:
        path = self.updates / str(entry.segment)
        try:
            # A file of terabytes is refused by its header before its content is hashed.
            read_header(path, folder=self.out)
            found = file_digest(path, folder=self.out)
        except ModelError:
            found = ""
        except OSError as error:
            raise StateError(f"cannot read {path}, which the journal names: {error.strerror or error}") from error
        if found != entry.sha256:
            raise StateError(f"{path} is damaged: its content does not match the journal; restore it from a backup")
        return path

    def append(self, line: str) -> None:
        """Append one line to the journal and make it durable; a line that does not fit is taken back."""
        new = not self.journal.exists()
        data = line.encode() + b"\n"
        # Unbuffered, because a buffer that could not be written is written again on closing, behind what was cut.
        with self.journal.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                # A part of a line would swallow the next one; what cannot be cut now is cut on resuming.
                with suppress(OSError):
                    os.truncate(self.journal, size)
                raise
        if new:
            sync_folder(self.folder)

    def journal_bytes(self) -> list[bytes]:
        """Return the journal's complete lines, unchecked: what follows the last line feed is the tear of a crash."""
        if not is_there(self.journal):
            return []
        try:
            return read_bytes(self.journal, JOURNAL, folder=self.out).split(b"\n")[:-1]
        except FileError as error:
            raise StateError(str(error)) from error

    def read_journal(self) -> list[tuple[Entry, str]]:
        """Return the journal's lines with their text; a torn last line is left out.

        Raises :class:`StateError` when a line is damaged or does not follow the one before it.
        """
        return self.check_lines(self.journal_bytes())

    def check_lines(self, lines: Sequence[bytes]) -> list[tuple[Entry, str]]:
        """Parse journal lines and check their chain; raises as :meth:`read_journal` does."""
        return list(_chain(lines, self.journal))

    def cut_journal(self, keep: Sequence[str]) -> None:
        """Rewrite the journal with the given lines only, unless it holds just these."""
        data = b"".join(line.encode() + b"\n" for line in keep)
        if not is_there(self.journal) or read_bytes(self.journal, JOURNAL, folder=self.out) != data:
            write_bytes(self.journal, data)

    def drop_unnamed_segments(self, named: Iterable[str]) -> None:
        """Remove segments that no journal line names: a crash came before their line was written."""
        known = set(named)
        for path in self.updates.glob("*.safetensors"):
            if path.name not in known:
                path.unlink()

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write run.json."""
        write_json(self.record, record)

    def read_record(self) -> dict[str, Any]:
        """Read run.json; empty when a crash came before it was first written."""
        try:
            return json.loads(read_text(self.record, RECORD, folder=self.out)) if is_there(self.record) else {}
        except FileError as error:
            raise StateError(str(error)) from error
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
        if entry.segment is not None and not is_plain_name(entry.segment):
            name = shorten(repr(entry.segment))
            raise StateError(f"{path}:{number} names the segment {name}, which is not a plain file name; refused")
        if entry.sequence != number:
            raise StateError(f"{path}:{number} is damaged: it is numbered {entry.sequence}; restore it from a backup")
        if not linked:
            raise StateError(f"{path}:{number} does not follow the line before it: the journal was changed; restore it")
        yield entry, text
        previous = text


def _line_digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest() if line else START


def weights_digest(weights: Iterable[Tensor]) -> str:
    """Return a checksum of float32 matrices that tells every difference in their bits but for accidents of 2^-64.

    It is a sum of integers modulo 2^64, so it is the same on every device and in every order of summation.
    """
    total = 0
    for number, weight in enumerate(weights, start=1):
        bits = weight.contiguous().view(torch.int32)
        columns = _scattered(torch.arange(bits.shape[1], device=bits.device))
        rows = _scattered(torch.arange(len(bits)) + (number << 32))
        # A few rows at a time, since the 64-bit copies take twice the room of the matrix.
        for start in range(0, len(bits), _ROWS):
            sums = (bits[start : start + _ROWS].long() * columns).sum(dim=1).cpu()
            total += int((sums * rows[start : start + len(sums)]).sum())
    return f"{total % 2**64:016x}"


def _scattered(numbers: Tensor) -> Tensor:
    """Return odd 64-bit numbers that no small multiples relate: what rounding changes must not cancel in a sum.

    The last steps of SplitMix64 (Steele et al., 2014), with shifts that keep the sign.
    """
    numbers = (numbers + 1) * _MIX
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        numbers = (numbers ^ (numbers >> shift)) * factor
    return (numbers ^ (numbers >> 31)) | 1


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _requests(metadata: Mapping[str, str]) -> list[EditRequest]:
    if metadata.get("format") != str(FORMAT):
        raise ValueError(f"it has format {metadata.get('format')!r}, this editcli reads format {FORMAT}")
    records, places = json.loads(metadata["edits"]), json.loads(metadata["places"])
    return [from_record(record, file=file, line=line) for record, (file, line) in zip(records, places, strict=True)]


def _kept(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder but for unfinished files."""
    return (path for path in folder.glob("*") if not is_leftover(path))
