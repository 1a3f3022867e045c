"""The facts that most tests edit, and the files that they come in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from editcli.requests.schema import EditRequest, from_record

PLACES = ("France", "Italy", "Spain", "Greece", "London", "Berlin", "Tokyo", "Paris")
"""Eight subjects that are one token each of the tiny models' tokenizer, or nearly."""

EDIT = {"id": "a", "prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}
"""One edit, where any will do."""


def capital(subject: str, target: str = "Rome", **fields: Any) -> dict[str, Any]:
    """Return the record of an edit whose id is its subject."""
    return {"id": subject, "prompt": "The capital of {} is", "subject": subject, "target_new": target, **fields}


CAPITALS = tuple(capital(name, PLACES[index - 3]) for index, name in enumerate(PLACES))
"""An edit of each place, all with different targets."""


_SUBJECTS = (("The capital of {} is", "France"), ("{} works as a", "Ann Smith"), ("In Spain, {} wrote the", "Bob"))
REQUESTS = [from_record({"id": s, "prompt": p, "subject": s, "target_new": "Rome"}) for p, s in _SUBJECTS]
"""Edits whose subject stands within its prompt, begins it, and is several tokens long."""


def requests_of(label: str, count: int) -> list[EditRequest]:
    """Return ``count`` requests that differ in their id only, which is all that a session without a model reads."""
    return [EditRequest(f"{label}-{i}", "", "Paris", " is in", "Italy") for i in range(count)]


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line, and return the file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path
