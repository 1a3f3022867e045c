"""Turn edit files of other formats into our JSONL: one JSON array, or one object a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from editcli.errors import RequestError, StateError
from editcli.formatting import plural
from editcli.requests.formats import Format
from editcli.requests.reader import Collector, EditFile, is_array, read_objects, refuse_deep
from editcli.storage.lines import Lines, opened, strict_json

MAX_ARRAY_BYTES = 1 << 30
"""One JSON array is read whole; a larger file has to be written one record a line."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """The result of converting a file."""

    records: int
    """Records read, usable or not."""
    edits: EditFile
    repeated: int
    """Edits that write what an earlier one writes: MQuAKE's records share many."""

    def lines(self) -> Iterator[str]:
        """Yield the edits as lines of JSON."""
        for request in self.edits.requests:
            yield json.dumps(request.to_json(), ensure_ascii=False)

    def write(self, path: Path) -> None:
        """Write the edits file, whole or not at all; raise :class:`StateError` when that is not possible."""
        # This module writes tensors as well, and importing torch takes longer than most conversions.
        from editcli.storage.files import write_lines

        try:
            write_lines(path, (request.to_json() for request in self.edits.requests))
        except OSError as error:
            raise StateError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error

    def summary(self) -> str:
        """Return one sentence with the counts."""
        left_out = f", {len(self.edits.rejected):,} refused" if self.edits.rejected else ""
        repeated = f"; {self.repeated:,} of them repeat an earlier edit" if self.repeated else ""
        edits = plural(len(self.edits.requests), "edit")
        return f"{plural(self.records, 'record')} became {edits}{left_out}{repeated}"

    def to_json(self) -> dict[str, Any]:
        """Return counts, refusals and warnings as a JSON object."""
        return {
            "source": self.edits.source,
            "records": self.records,
            "edits": len(self.edits.requests),
            "repeated": self.repeated,
            "rejected": [str(error) for error in self.edits.rejected],
            "warnings": list(self.edits.warnings),
        }


def convert(
    source: str | Path, formats: Sequence[Format] = (), *, form: Format | None = None, skip_bad: bool = False
) -> Conversion:
    """Read ``source`` (``-`` is standard input) with ``form``, else with whichever of ``formats`` knows each record.

    Raises :class:`RequestError` at the first unusable record, unless ``skip_bad``. A record of an array is named by its
    index, counted from 0, as in ``facts.json[12]``.
    """
    name = "<stdin>" if str(source) == "-" else str(source)
    collected = Collector(skip_bad=skip_bad, formats=formats, form=form)
    count = 0
    with opened(source, name) as lines:
        for load, file, line in _records(lines, name):
            count += 1
            collected.add(load, file=file, line=line)
        digest = lines.sha256()
    if count == 0:
        raise RequestError("there is no record in this file", file=name)
    edits = collected.result(name, digest)
    distinct = {(request.prompt, request.subject, request.target_new) for request in edits.requests}
    return Conversion(count, edits, len(edits.requests) - len(distinct))


def _records(lines: Lines, name: str) -> Iterator[tuple[Callable[[], Mapping[str, Any]], str, int | None]]:
    """Yield a function that loads each record, with its file and line for error messages."""
    if not is_array(lines.head):
        for line, load in read_objects(lines, name):
            yield load, name, line
        return
    for index, record in enumerate(_array(lines, name)):
        place = f"{name}[{index}]"
        yield partial(_numbered, record, place, index), place, None


def _array(lines: Lines, name: str) -> list[Any]:
    data = lines.read(MAX_ARRAY_BYTES)
    if data is None:
        reason = f"the array is larger than {MAX_ARRAY_BYTES:,} bytes; write its records one a line"
        raise RequestError(reason, file=name)
    try:
        return strict_json(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise RequestError(f"not valid JSON: {error.msg}", file=name, line=error.lineno, column=error.colno) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not a JSON array in UTF-8: {error}", file=name) from error


def _numbered(record: Any, place: str, index: int) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise RequestError("a record is a JSON object", file=place)
    refuse_deep(record, file=place, line=None)
    # A record without an id is named by its index, which is the same in every run.
    return record if record.keys() & {"id", "case_id"} else {**record, "id": f"record-{index}"}
