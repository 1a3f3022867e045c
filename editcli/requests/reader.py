"""Read edits from JSON lines, and name the line that is wrong.

One JSON object a line, of the edits schema (:mod:`editcli.requests.schema`) or of a format that a plugin reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jsonlines

from editcli.errors import RequestError
from editcli.requests.schema import EditRequest, Neighbor, from_record, kind_of
from editcli.requests.superseding import supersede
from editcli.storage.lines import MAX_DEPTH, MAX_LINE_BYTES, Lines, is_deep, opened, strict_json

if TYPE_CHECKING:
    from editcli.requests.formats import Format

__all__ = [
    "MAX_LINE_BYTES",
    "Collector",
    "EditFile",
    "EditRequest",
    "Neighbor",
    "conflicts",
    "from_record",
    "read_edits",
]

_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*\{")


@dataclass(frozen=True, slots=True)
class EditFile:
    """The requests of one file, in order, with what was refused and what is worth a warning."""

    source: str
    sha256: str
    requests: tuple[EditRequest, ...]
    rejected: tuple[RequestError, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Those of the warnings that hold whichever of the edits can be used."""


def read_edits(
    source: str | Path,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    formats: Sequence[Format] = (),
) -> EditFile:
    """Read an edits file, or standard input for ``-``; records that one of ``formats`` knows are read by it.

    Raises :class:`RequestError` at the first unusable line, unless ``skip_bad``: then it is collected in ``rejected``.
    """
    name = "<stdin>" if str(source) == "-" else str(source)
    collected = Collector(skip_bad=skip_bad, limit=limit, formats=formats)
    with opened(source, name) as lines:
        if is_array(lines.head):
            hint = "'editcli convert' turns it into an edits file"
            raise RequestError(f"this is one JSON array, not one JSON object a line; {hint}", file=name, line=1)
        for number, load in read_objects(lines, name):
            collected.add(load, file=name, line=number)
            if collected.full:
                break
        digest = lines.sha256()
    if not collected.requests and not collected.rejected:
        raise RequestError("there is no edit in this file; write one JSON object a line", file=name)
    return collected.result(name, digest)


def is_array(data: bytes) -> bool:
    """Return whether a file that begins with ``data`` holds one JSON array of objects instead of one object a line."""
    return _ARRAY.match(data) is not None


class Collector:
    """Gathers requests from records one by one: refuses bad ones and repeated ids, or collects the refusals."""

    def __init__(
        self, *, skip_bad: bool, limit: int | None = None, formats: Sequence[Format] = (), form: Format | None = None
    ):
        """Read records of our schema and those that one of ``formats`` knows, or every record with ``form``."""
        self.requests: list[EditRequest] = []
        self.rejected: list[RequestError] = []
        self._skip_bad, self._limit, self._formats, self._form = skip_bad, limit, formats, form
        self._places: dict[str, str] = {}

    @property
    def full(self) -> bool:
        """True when the limit is reached."""
        return self._limit is not None and len(self.requests) >= self._limit

    def add(self, load: Callable[[], Mapping[str, Any]], *, file: str, line: int | None) -> None:
        """Take the edits of one record, which ``load`` returns or refuses."""
        try:
            record = load()
            form = self._form or _recognise(record, self._formats, file=file, line=line)
            records = [record] if form is None else translate(record, form, file=file, line=line)
        except RequestError as error:
            return self._refuse(error)
        for record in records:
            if self.full:
                break
            try:
                self._keep(from_record(record, file=file, line=line))
            except RequestError as error:
                self._refuse(error)
        return None

    def result(self, source: str, sha256: str) -> EditFile:
        """Return everything gathered."""
        notes = tuple(f"{request.place}: {note}" for request in self.requests for note in request.notes)
        warnings = (*notes, *conflicts(self.requests))
        return EditFile(source, sha256, tuple(self.requests), tuple(self.rejected), warnings, notes)

    def _keep(self, request: EditRequest) -> None:
        first = self._places.get(request.id)
        if first is not None:
            raise request.refusal(f"id {request.id!r} was already used on {first}")
        self._places[request.id] = request.line_name
        self.requests.append(request)

    def _refuse(self, error: RequestError) -> None:
        if not self._skip_bad:
            raise error
        self.rejected.append(error)


def _recognise(record: Mapping[str, Any], formats: Sequence[Format], *, file: str, line: int | None) -> Format | None:
    """Return the format that knows a record, None for one of our schema."""
    known = [form for form in formats if form.sniff(record)]
    if len(known) > 1:
        names = " and ".join(form.name for form in known)
        raise RequestError(f"this record looks like {names}; use 'editcli convert --from'", file=file, line=line)
    return known[0] if known else None


def translate(record: Mapping[str, Any], form: Format, *, file: str, line: int | None) -> list[Mapping[str, Any]]:
    """Return what ``form`` makes of a record; raise :class:`RequestError` when it is not one of that format."""
    try:
        return list(form.read(record))
    # A record that only looks like the format fails in the reader with one of these.
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"not a usable {form.name} record: {_reason(error)}", file=file, line=line) from error


def _reason(error: Exception) -> str:
    """Return what an error in a format's reader says about the record."""
    if isinstance(error, KeyError):
        return f"the field {error} is missing"
    return str(error) if isinstance(error, ValueError) else f"its fields have another shape ({error})"


def read_objects(lines: Lines, name: str) -> Iterator[tuple[int, Callable[[], Mapping[str, Any]]]]:
    """Yield the number of each line and a function that returns its JSON object.

    The function raises :class:`RequestError` with the place and the reason where the line holds none.
    """
    reader = jsonlines.Reader(lines, loads=strict_json)  # pyright: ignore[reportCallIssue] - attrs drops the underscore.
    while True:
        try:
            value = reader.read(allow_none=True)
        except EOFError:
            return
        except (RequestError, jsonlines.InvalidLineError, RecursionError) as error:
            yield lines.number, partial(_refuse_line, error, file=name, line=lines.number)
        else:
            yield lines.number, partial(_object, value, file=name, line=lines.number)


def _object(value: Any, *, file: str, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"an edit is a JSON object, not {kind_of(value)}", file=file, line=line)
    return refuse_deep(value, file=file, line=line)


def _refuse_line(error: Exception, *, file: str, line: int) -> NoReturn:
    """Raise :class:`RequestError` for an error of the line's reader."""
    if isinstance(error, RequestError):
        raise error
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        reason, column = "the line is not UTF-8 text; save the file as UTF-8", cause.start + 1
    elif isinstance(cause, json.JSONDecodeError):
        reason, column = f"not valid JSON: {cause.msg}", cause.colno
    else:
        reason, column = f"not valid JSON: {cause}", None
    raise RequestError(reason, file=file, line=line, column=column) from cause


def refuse_deep(record: dict[str, Any], *, file: str, line: int | None) -> dict[str, Any]:
    """Return a record; raise :class:`RequestError` when it is nested too deeply to be passed on."""
    if is_deep(record):
        raise RequestError(f"the record is nested more than {MAX_DEPTH} levels deep", file=file, line=line)
    return record


def conflicts(requests: Iterable[EditRequest]) -> Iterator[str]:
    """Yield a warning for every edit that a later one contradicts."""
    for one in supersede(requests)[1]:
        yield (
            f"{one.by.place}: {one.by.prompt!r} was already given the target {one.request.target_new!r} on "
            f"{one.request.line_name}; the later one wins"
        )
