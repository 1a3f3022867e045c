"""The journal of a run: one line for each batch or undo, in a chain.

Each line holds the sha256 of the line before it and of its own segment, so a torn tail is recognised and cut and a
flipped bit is refused, never trusted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from editcli.errors import StateError
from editcli.formatting import shorten
from editcli.records.decoding import Count, Figures, Size, UnreadableError, decode, encode, later, optional
from editcli.requests.schema import EditRequest
from editcli.storage.choice import is_plain_name

BATCH, UNDO = "batch", "undo"
"""Kinds of journal lines."""
START = "0" * 64
"""The hash that the first line names as its predecessor."""
IMMEDIATE, RETAINED, DIAGNOSTICS = "immediate", "retained", "diagnostics"
"""Groups of figures that are measured after a batch."""

Line = Annotated[int, Meta(ge=1, le=2**53)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFigures:
    """An edited matrix after a batch."""

    module: str
    """Path of the module in the model."""
    layer: Count
    """Its layer, counted from 0."""
    ratio: Size | None
    """R_n = ||W_n||_F / ||W_0||_F; null for a base of zeros."""
    drift: Size | None
    """||W_n - W_0||_F / ||W_0||_F; null for a base of zeros."""
    update_norm: Size | None = later()
    """||D||_F of the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """One batch that was written, as its journal line holds it."""

    sequence: Line
    """Number of the line, counted from 1."""
    kind: Literal["batch"] = BATCH
    """batch."""
    step: Line
    """Batches in force after this line."""
    edits: Annotated[tuple[str, ...], Meta(min_length=1)]
    """Ids of the batch's edits."""
    segment: str = ""
    """File in updates/ that holds the batch."""
    sha256: str = ""
    """Hash of that file."""
    consumed: str = ""
    """Rolling hash over all edits that were read so far."""
    sites: tuple[SiteFigures, ...] = later(())
    """The edited matrices after the batch."""
    metrics: Mapping[str, Figures | None] = later(factory=dict)
    """immediate, retained and diagnostics, each as far as they were measured."""
    dropped: Mapping[str, str] = later(factory=dict)
    """Edits that a stabilizer gave up, with the reason."""
    targets: Mapping[str, Count] = later(factory=dict)
    """How many targets were optimised, reached the stop loss and ended clamped; empty if not counted."""
    superseded: Mapping[str, str] | None = optional()
    """Edits of the batch that were not written, each with the later edit that gives the same prompt another target."""
    released: tuple[str, ...] | None = optional()
    """Edits of earlier batches that the batch contradicts and whose keys left the editor's memory."""
    already_true: tuple[str, ...] | None = optional()
    """Edits whose target the model gave before the batch."""
    seconds: Mapping[str, Size] = later(factory=dict)
    """Time of the batch per phase."""
    weights: str | None = optional()
    """Checksum of the edited matrices after the batch."""

    @property
    def idle(self) -> bool:
        """Whether the batch asked for nothing that the model did not do already."""
        return set(self.edits) <= set(self.already_true or ())

    @property
    def duration(self) -> float | None:
        """Seconds that the batch took; None where it is not known."""
        return float(sum(self.seconds.values())) if self.seconds else None

    @property
    def diagnostics(self) -> Figures:
        """The figures of the diagnostics."""
        return self.metrics.get(DIAGNOSTICS) or {}

    @property
    def largest_ratio(self) -> float | None:
        """The largest R_n of any site; None where every base is a matrix of zeros."""
        return max((site.ratio for site in self.sites if site.ratio is not None), default=None)

    def measured(self, when: str) -> Figures:
        """Return the efficacies that were measured: :data:`IMMEDIATE` or :data:`RETAINED`; empty where none were."""
        return self.metrics.get(when) or {}

    def site(self, module: str) -> SiteFigures | None:
        """Return the figures of one matrix; None where the batch did not write it."""
        return next((site for site in self.sites if site.module == module), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoRecord:
    """Batches or edits that were taken back, as the journal line holds them."""

    sequence: Line
    """Number of the line, counted from 1."""
    kind: Literal["undo"] = UNDO
    """undo."""
    step: Count
    """Batches in force after this line."""
    edits: tuple[str, ...] = ()
    """Ids of the edits that were taken back one by one."""
    segment: None = None
    """An undo has none."""
    sha256: None = None
    """As above."""
    consumed: str = ""
    """Rolling hash over the edits of the batches in force."""
    removed: Mapping[str, str] = later(factory=dict)
    """Edits that are never to be written again, id to digest."""
    redo: tuple[Line, ...] = later(())
    """Lines of the batches that are to be written again."""
    undone: Count = later(0)
    """Batches that were taken back."""


Entry = BatchRecord | UndoRecord
"""One line of the journal."""


@dataclass(frozen=True, slots=True)
class _Head:
    """The fields that give the kind of a line and its place in the journal."""

    sequence: int
    kind: str
    previous: str


def journal_line(entry: Entry, previous: str) -> str:
    """Return the text of a journal line that follows the line ``previous`` (empty for the first).

    Raises :class:`StateError` for a figure that is not finite.
    """
    fields = {**encode(entry), "previous": _digest(previous)}
    try:
        return json.dumps(fields, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise StateError(
            f"batch {entry.step} has a figure that is not finite, so it is not recorded: the weights before it are "
            "too large; undo batches or restore the run from a backup"
        ) from error


def read_lines(lines: Sequence[bytes], path: Path) -> Iterator[tuple[Entry, str]]:
    """Decode journal lines, each with its text, and check their chain; raise :class:`StateError` at a damaged one."""
    previous, live, earlier = "", 0, []
    for number, raw in enumerate(lines, start=1):
        place = f"{path}:{number}"
        try:
            # Also the names and texts that no type has.
            text = raw.decode("utf-8")
            entry = _entry(raw, number, live, earlier)
            linked = decode(raw, _Head).previous == _digest(previous)
        except (UnreadableError, UnicodeDecodeError) as error:
            raise StateError(f"{place} is damaged ({error}); restore it from a backup") from error
        if isinstance(entry, BatchRecord) and not is_plain_name(entry.segment):
            name = shorten(repr(entry.segment))
            raise StateError(f"{place} names the segment {name}, which is not a plain file name; refused")
        if not linked:
            raise StateError(f"{place} does not follow the line before it: the journal was changed; restore it")
        yield entry, text
        previous, live = text, entry.step
        earlier.append(entry)


def live_batches(entries: Sequence[Entry]) -> list[BatchRecord]:
    """Return the batches that are in force: an undo line takes back what came after its step."""
    live: list[BatchRecord] = []
    for entry in entries:
        if isinstance(entry, BatchRecord):
            live.append(entry)
        else:
            live = [batch for batch in live if batch.step <= entry.step]
    return live


def removed_edits(entries: Sequence[Entry]) -> dict[str, str]:
    """Return the edits that undo lines took back one by one, id to digest; they are not written again."""
    undone = (entry for entry in entries if isinstance(entry, UndoRecord))
    return {id: digest for entry in undone for id, digest in entry.removed.items()}


def consume(digest: str, requests: Sequence[EditRequest]) -> str:
    """Advance the rolling hash over the edits of a stream."""
    for request in requests:
        digest = hashlib.sha256(f"{digest}{request.digest}".encode()).hexdigest()
    return digest


def _entry(raw: bytes, number: int, live: int, earlier: Sequence[Entry]) -> Entry:
    """Decode one line; ``live`` batches are in force before it, after the lines ``earlier``."""
    head = decode(raw, _Head)
    if head.sequence != number:
        raise UnreadableError(f"it is numbered {head.sequence}")
    if head.kind == BATCH:
        batch = decode(raw, BatchRecord)
        if batch.step != live + 1:
            raise UnreadableError(f"step: it is {batch.step} after {live} batches")
        return batch
    if head.kind != UNDO:
        raise UnreadableError(f"kind: {shorten(head.kind)!r} is none that this version knows")
    undo = decode(raw, UndoRecord)
    if undo.step > live:
        raise UnreadableError(f"step: it is {undo.step} after {live} batches")
    if any(line >= number or not isinstance(earlier[line - 1], BatchRecord) for line in undo.redo):
        raise UnreadableError("redo: it names a line that is no earlier batch")
    return undo


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest() if line else START
