"""The files of a run: a snapshot to go on from, a journal of what was done, and a segment of factors per batch.

The snapshot of a step is written before that step's journal line, and carries the line, so that a crash between the two
loses nothing.
"""

from __future__ import annotations

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

from editcli.errors import EditError, FileError, ModelError, RequestError, StateError
from editcli.plugin.interfaces import Dense, LowRank, Problem, Site, Update
from editcli.plugin.saved import misfit
from editcli.records.decoding import (
    Count,
    Options,
    UnreadableError,
    encode,
    later,
    optional,
    parse,
)
from editcli.records.journal import BatchRecord, Entry, read_lines
from editcli.records.record import RunRecord, read_record, record_text, refuse_link
from editcli.requests.schema import EditRequest, from_record
from editcli.storage.checkpoint import file_digest, read_header
from editcli.storage.conversion import convert
from editcli.storage.files import (
    is_leftover,
    read_metadata,
    read_safetensors,
    sync_folder,
    tensors_digest,
    write_bytes,
    write_safetensors,
)
from editcli.storage.folders import may_write
from editcli.storage.opening import JOURNAL, is_there, read_bytes

FORMAT = 1
_ROWS, _MIX = 256, 0x9E3779B97F4A7C15 - 2**64
"""Rows that are summed at once, and the increment of SplitMix64."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state that a stream continues from after ``step`` batches."""

    step: int
    sequence: int
    """Number of the last journal line."""
    consumed: str
    """Rolling hash over the edits that were read so far."""
    tensors: Mapping[str, Tensor]
    """``master/<module>`` (d_out, d_in) float32 and ``component/<name>/<key>``."""
    settings: Mapping[str, Any]
    """Settings that must match on resume: base fingerprint, stack, options, layers, seed, prefixes."""
    line: str
    """The journal line of the last step; empty before the first."""
    json: Mapping[str, Any] = field(default_factory=dict)
    """JSON state of the components beside their tensors, by ``component/<name>``."""

    def master(self, module: str, shape: Sequence[int]) -> Tensor:
        """Return the float32 weight of a module; raise :class:`StateError` unless it is one of ``shape``."""
        return _matrix(self.tensors, f"master/{module}", shape, "the snapshot")


@dataclass(frozen=True, slots=True)
class Segment:
    """One batch as its file holds it: of every matrix the update and, if the editor had targets, the problem."""

    name: str
    requests: tuple[EditRequest, ...]
    tensors: Mapping[str, Tensor]

    def update(self, module: str, shape: Sequence[int]) -> Update:
        """Return the update of a (d_out, d_in) matrix; raise :class:`StateError` where it does not fit."""
        if f"{module}.dense" in self.tensors:
            return Dense(_matrix(self.tensors, f"{module}.dense", shape, self.name))
        return LowRank(*self._pair(module, ("left", "right"), shape))

    def problem(self, site: Site, shape: Sequence[int]) -> Problem:
        """Return the problem of a site with a (d_out, d_in) matrix; raise :class:`StateError` where it does not fit."""
        residual, keys = self._pair(site.module, ("residual", "keys"), shape)
        more = {name: self._keys(site.module, name, (shape[1], None)) for name in ("released", "held")}
        held = more["held"]
        if held is not None and held.shape[1] != len(self.requests):
            raise StateError(f"the keys of {site.module} in {self.name} do not fit together; restore it from a backup")
        return Problem(site, keys, residual, **more)

    def remembered(self, modules: Iterable[str], column: int) -> dict[str, Tensor]:
        """Return the keys by which an edit was remembered, (d_in,) by module; raise :class:`StateError`."""
        edits, columns = len(self.requests), {}
        for module in modules:
            held = self._keys(module, "held", (None, edits))
            keys = _matrix(self.tensors, f"{module}.keys", (None, edits), self.name) if held is None else held
            columns[module] = keys[:, column]
        return columns

    def _keys(self, module: str, name: str, shape: Sequence[int | None]) -> Tensor | None:
        """Return keys that only some segments hold."""
        part = f"{module}.{name}"
        return _matrix(self.tensors, part, shape, self.name) if part in self.tensors else None

    def _pair(self, module: str, parts: Sequence[str], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        outer, inner = (
            _matrix(self.tensors, f"{module}.{part}", (size, None), self.name)
            for part, size in zip(parts, shape, strict=True)
        )
        if outer.shape[1] != inner.shape[1]:
            raise StateError(f"the factors of {module} in {self.name} do not fit together; restore it from a backup")
        return outer, inner


@dataclass(frozen=True, slots=True, kw_only=True)
class _SnapshotMetadata:
    """The metadata of ``state.safetensors``."""

    step: Count
    sequence: Count
    consumed: str
    settings: str
    line: str
    components: str = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _SegmentMetadata:
    """The metadata of a segment: the edits of the batch and the file and line of each, both as JSON."""

    edits: str
    places: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSettings:
    """Settings of the second moments besides the model: a file by its hash, or a text and how it is read."""

    file: str | None = optional()
    corpus: str | None = optional()
    options: Mapping[str, Any] | None = optional()


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSettings:
    """Settings that a resumed stream must share with its first run; the number of processes may differ."""

    base: str
    """Fingerprint of the base."""
    editor: str
    stabilizers: tuple[str, ...]
    options: Options
    """Every option of the components."""
    targets: Mapping[str, Any]
    layers: tuple[Count, ...]
    seed: int
    tokenizer: str
    """Hash of the tokenizer."""
    reference: ReferenceSettings
    save_dtype: str
    dtype: str
    chat_template: bool = later(False)
    chat: Mapping[str, Any] | None = later()
    """The chat template by its hash, with its settings."""
    prefixes: tuple[str, ...]

    @classmethod
    def from_json(cls, saved: Mapping[str, Any], file: Path) -> StreamSettings:
        """Decode the settings of a snapshot; raise :class:`StateError`."""
        try:
            return convert(dict(saved), cls)
        except UnreadableError as error:
            raise StateError(f"the settings in {file} are damaged ({error}); restore it from a backup") from error

    def to_json(self) -> dict[str, Any]:
        """Return the object that a snapshot holds."""
        return encode(self)


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
        self.evaluation = self.folder / "evaluation.json"
        self.answers = self.folder / "answers.jsonl"
        self.lock = self.folder / ".lock"

    @property
    def is_run(self) -> bool:
        """Whether this is an output folder of editcli."""
        return any(is_there(path) for path in (self.record, self.journal, self.state))

    def require(self) -> None:
        """Raise :class:`StateError` unless this is an output folder of editcli."""
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
        self.refuse_unwritable()
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
            refuse_link(path)
        for path, is_right, kind in (
            (self.folder, self.folder.is_dir, "folder"),
            (self.updates, self.updates.is_dir, "folder"),
            (self.lock, self.lock.is_file, "file"),
        ):
            if is_there(path) and not is_right():
                raise StateError(f"{path} is no {kind}, so it is not what editcli wrote; remove it")

    def refuse_unwritable(self) -> None:
        """Raise :class:`StateError` where a folder of the run may not be written, before any part of it changes."""
        for path in (self.out, self.folder, self.updates):
            if path.is_dir() and not may_write(path):
                raise StateError(f"{path} cannot be written: there is no permission; change it, or work on a copy")

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
        if snapshot.json:
            metadata["components"] = json.dumps(snapshot.json, sort_keys=True, allow_nan=False)
        write_safetensors(
            self.state, snapshot.tensors, {**metadata, "sha256": snapshot_digest(snapshot.tensors, metadata)}
        )

    def read_snapshot(self) -> Snapshot:
        """Read the snapshot; raise :class:`StateError` when it is missing, damaged or of another format."""
        tensors, metadata = self._read_state(lambda path: read_safetensors(path, folder=self.out))
        stated = metadata.pop("sha256", "")
        if stated != snapshot_digest(tensors, metadata):
            raise StateError(f"{self.state} is damaged: its content does not match its hash; {self._advice}")
        known, settings, components = self._metadata(metadata)
        return Snapshot(known.step, known.sequence, known.consumed, tensors, settings, known.line, components)

    def read_settings(self) -> dict[str, Any]:
        """Return the settings of the snapshot without reading its tensors; raises as :meth:`read_snapshot` does."""
        return self._metadata(self._read_state(lambda path: ({}, read_metadata(path, folder=self.out)))[1])[1]

    def _metadata(
        self, metadata: Mapping[str, str]
    ) -> tuple[_SnapshotMetadata, dict[str, Any], dict[str, dict[str, Any]]]:
        try:
            known = convert(dict(metadata), _SnapshotMetadata, texts=True)
            settings = convert(parse(known.settings), dict[str, Any])
            return known, settings, convert(parse(known.components), dict[str, dict[str, Any]])
        except UnreadableError as error:
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
        """Advice about a lost snapshot: the model beside it is whole, but the stream cannot go on from it."""
        again = f"editcli apply --repeat {self.record}"
        return f"the model in {self.out} is not concerned; restore a backup, or repeat a run that had ended: {again}"

    def write_segment(
        self,
        sequence: int,
        requests: Sequence[EditRequest],
        problems: Mapping[Site, Problem],
        updates: Mapping[Site, Update],
    ) -> tuple[str, str]:
        """Write the update of one batch, with its problem if it has one; return the segment's name and sha256."""
        tensors: dict[str, Tensor] = {}
        for site, update in updates.items():
            # An editor without target values solves no problem.
            problem = problems[site].parts if site in problems else {}
            for name, tensor in {**problem, **update.parts}.items():
                # Copies, because an editor may use the keys themselves as a factor, and the format shares nothing.
                tensors[f"{site.module}.{name}"] = tensor.clone()
        name = f"{sequence:06d}.safetensors"
        metadata = {
            "format": str(FORMAT),
            "edits": json.dumps([request.to_json() for request in requests], ensure_ascii=False),
            "places": json.dumps([[request.file, request.line] for request in requests], ensure_ascii=False),
        }
        return name, write_safetensors(self.updates / name, tensors, metadata)

    def read_segment(self, entry: BatchRecord) -> Segment:
        """Read one batch's edits and factors; raise :class:`StateError` unless it is what the journal says."""
        tensors, metadata = self._read_segment(entry, lambda path: read_safetensors(path, folder=self.out))
        return Segment(entry.segment, self._requests(entry, metadata), tensors)

    def read_requests(self, entry: BatchRecord) -> tuple[EditRequest, ...]:
        """Read one batch's edits without its factors; raise as :meth:`read_segment` does."""
        _, metadata = self._read_segment(entry, lambda path: ({}, read_metadata(path, folder=self.out)))
        return self._requests(entry, metadata)

    def _read_segment(
        self, entry: BatchRecord, read: Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        path = self.updates / entry.segment
        try:
            # A file of terabytes is refused by its header before its content is hashed.
            read_header(path, folder=self.out)
            digest = file_digest(path, folder=self.out)
        except ModelError:
            digest = ""
        except OSError as error:
            raise StateError(f"cannot read {path}, which the journal names: {error.strerror or error}") from error
        if digest != entry.sha256:
            raise StateError(f"{path} is damaged: its content does not match the journal; restore it from a backup")
        try:
            return read(path)
        except (SafetensorError, OSError, ValueError, KeyError, EditError) as error:
            raise StateError(f"{path} cannot be read: {error}; restore it from a backup") from error

    def _requests(self, entry: BatchRecord, metadata: Mapping[str, str]) -> tuple[EditRequest, ...]:
        path = self.updates / entry.segment
        try:
            requests = requests_of(metadata)
        except UnreadableError as error:
            raise StateError(f"{path} cannot be read: {error}; restore it from a backup") from error
        if tuple(request.id for request in requests) != entry.edits:
            raise StateError(f"{path} holds other edits than the journal says; restore it from a backup")
        return requests

    def refuse_full(self, line: str) -> None:
        """Raise :class:`StateError` where the journal with one more line would be larger than what is read of it."""
        size = self.journal.stat().st_size if self.journal.exists() else 0
        if size + len(line.encode()) + 1 > JOURNAL.limit:
            raise StateError(
                f"{self.journal} would be larger than {JOURNAL.limit:,} bytes, the most that is read of it; end this "
                "run, and start another one from its model with the edits that are left, in larger batches"
            )

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
        return list(read_lines(lines, self.journal))

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
        """Write run.json; raise :class:`StateError` before the first byte where it could not be read again."""
        try:
            text = record_text(record)
        except UnreadableError as error:
            raise StateError(f"{self.record} would not be readable: {error}; report it with the command") from error
        write_bytes(self.record, text.encode())

    def read_record(self) -> RunRecord | None:
        """Read run.json; None when a crash came before it was first written. Raises :class:`StateError`."""
        return read_record(self.out)


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


def snapshot_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the hash over the tensors and the metadata of a snapshot, that of the hash itself left out."""
    return tensors_digest(sorted(tensors.items()), salt=json.dumps(dict(metadata), sort_keys=True))


def requests_of(metadata: Mapping[str, str]) -> tuple[EditRequest, ...]:
    """Return the edits that the metadata of a segment hold; raise :class:`UnreadableError`."""
    if metadata.get("format") != str(FORMAT):
        raise UnreadableError(f"it has format {metadata.get('format')!r}, this editcli reads format {FORMAT}")
    known = convert(dict(metadata), _SegmentMetadata)
    records = convert(parse(known.edits), list[dict[str, Any]])
    places = convert(parse(known.places), list[tuple[str, Count | None]])
    if len(records) != len(places):
        raise UnreadableError(f"it has {len(records)} edits and {len(places)} places")
    try:
        return tuple(from_record(r, file=file, line=line) for r, (file, line) in zip(records, places, strict=True))
    except RequestError as error:
        raise UnreadableError(str(error)) from error


def _matrix(tensors: Mapping[str, Tensor], name: str, shape: Sequence[int | None], where: str) -> Tensor:
    """Return a matrix of finite numbers; ``shape`` is its size, None where any will do."""
    tensor = tensors.get(name)
    if tensor is None:
        raise StateError(f"{name} is not in {where}; restore it from a backup")
    fault = misfit(tensor, shape)
    if fault is not None:
        raise StateError(f"{name} in {where} {fault}; restore it from a backup")
    return tensor


def _kept(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder but for unfinished files."""
    return (path for path in folder.glob("*") if not is_leftover(path))
