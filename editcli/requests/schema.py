"""Edit requests: the schema of one edit, and building it from a JSON object.

A request's prompt is a template: the text around the subject, with exactly one place for it. In a record the place is
``{}`` or the subject itself, once; braces elsewhere are text. A record without a subject is a plain question, for
editors that need no subject.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from editcli.errors import RequestError
from editcli.requests.placing import MARK, Placed, place_subject

_LISTS = ("paraphrase_prompts", "neighborhood_prompts", "generation_prompts", "locality", "portability")
_TEXTS = ("prompt", "subject", "target_new")
FIELDS = ("id", *_TEXTS, "target_true", "join", *_LISTS, "reference_texts")
"""Every field that editcli reads; others are kept and passed on."""


@dataclass(frozen=True, slots=True)
class Neighbor:
    """A prompt with the answer that an edited model should give: for a neighbour, the true one it always gave."""

    prompt: str
    target: str | None
    axis: str | None = None
    """The aspect of the edit that the prompt tests, for instance ``reasoning`` or ``forgetfulness``."""
    aliases: tuple[str, ...] = ()
    """Other texts of the same answer, which count where the model writes freely."""


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One fact to write: ``prompt`` with ``subject`` in its place shall be continued by ``target_new``."""

    id: str
    before: str
    """Prompt text before the subject; all of it where there is no subject."""
    subject: str
    """The subject of the fact; empty for a plain question."""
    after: str
    """Prompt text after the subject."""
    target_new: str
    target_true: str | None = None
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[Neighbor, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    locality: tuple[Neighbor, ...] = ()
    """Unrelated questions, each with its own answer (zsRE, KnowEdit), or without: then the base model's counts."""
    portability: tuple[Neighbor, ...] = ()
    """Prompts about consequences of the edit, each with the answer that then holds (KnowEdit, MQuAKE)."""
    join: str | None = None
    """Text between prompt and target; None leaves it to the writing system of both."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields that editcli does not read; kept and passed on."""
    line: int | None = None
    """Line of the edits file, counted from 1."""
    file: str = "<edits>"
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Corrections that were made while the record was read; worth a warning."""

    @property
    def has_subject(self) -> bool:
        """Whether the fact is about a subject that the prompt names."""
        return bool(self.subject)

    @property
    def prompt(self) -> str:
        """The prompt with the subject filled in."""
        return self.before + self.subject + self.after

    @property
    def subject_end(self) -> int:
        """Character offset, in :attr:`prompt`, just past the subject."""
        return len(self.before) + len(self.subject)

    @property
    def place(self) -> str:
        """Where the request was read, as error messages name it."""
        return self.file if self.line is None else f"{self.file}:{self.line}"

    @property
    def line_name(self) -> str:
        """Where in its file the request was read: a line, or an element of an array as part of the file's name."""
        return self.file if self.line is None else f"line {self.line}"

    def in_context(self, prefix: str) -> EditRequest:
        """Return the same request with ``prefix`` written before its prompt."""
        return replace(self, before=prefix + self.before)

    def refusal(self, reason: str) -> RequestError:
        """Return an error that points at this request's line."""
        return RequestError(reason, file=self.file, line=self.line)

    def to_json(self) -> dict[str, Any]:
        """Return the request as an object of the edits schema."""
        record: dict[str, Any] = {"id": self.id, "prompt": self._template()}
        if self.has_subject:
            record["subject"] = self.subject
        record["target_new"] = self.target_new
        if self.join is not None:
            record["join"] = self.join
        if self.target_true is not None:
            record["target_true"] = self.target_true
        for name in ("paraphrase_prompts", "generation_prompts"):
            if getattr(self, name):
                record[name] = list(getattr(self, name))
        if self.neighborhood_prompts:
            record["neighborhood_prompts"] = [
                near.prompt if near.target == self.target_true else {"prompt": near.prompt, "target": near.target}
                for near in self.neighborhood_prompts
            ]
        for name in ("locality", "portability"):
            if getattr(self, name):
                record[name] = [_detailed_json(near) for near in getattr(self, name)]
        return {**record, **self.extra}

    def _template(self) -> str:
        # Braces elsewhere in the prompt are text, so the placeholder form is only safe when it stays unambiguous.
        template = f"{self.before}{MARK}{self.after}"
        return template if self.has_subject and template.count(MARK) == 1 else self.prompt

    @property
    def digest(self) -> str:
        """Hash of everything that decides what the edit writes."""
        parts = (self.id, self.before, self.subject, self.after, self.target_new)
        # Left out where it was not given, so that runs of earlier versions are recognised.
        parts += () if self.join is None else (self.join,)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def from_record(record: Mapping[str, Any], *, file: str = "<edits>", line: int | None = None) -> EditRequest:
    """Build a request from an object of the edits schema; raise :class:`RequestError` when it is not one."""

    def refuse(reason: str) -> RequestError:
        return RequestError(reason, file=file, line=line)

    prompt, target_new = _text(record, "prompt", refuse), _text(record, "target_new", refuse)
    true = record.get("target_true")
    if true is not None:
        true = _text(record, "target_true", refuse)
    placed = _placed(record, prompt, refuse)
    lists = {name: _list(record, name, refuse) for name in _LISTS}
    known = {*_TEXTS, *_LISTS, "target_true", "join", "id"}
    return EditRequest(
        id=_identifier(record, line, refuse),
        before=placed.before,
        subject=placed.subject,
        after=placed.after,
        target_new=target_new,
        target_true=true,
        join=_join(record, refuse),
        paraphrase_prompts=tuple(_prompt(p, "paraphrase_prompts", refuse) for p in lists["paraphrase_prompts"]),
        neighborhood_prompts=tuple(_neighbor(p, true, refuse) for p in lists["neighborhood_prompts"]),
        generation_prompts=tuple(_prompt(p, "generation_prompts", refuse) for p in lists["generation_prompts"]),
        locality=tuple(_detailed(p, "locality", refuse, open_ended=True) for p in lists["locality"]),
        portability=tuple(_detailed(p, "portability", refuse) for p in lists["portability"]),
        extra={key: value for key, value in record.items() if key not in known},
        line=line,
        file=file,
        notes=placed.notes,
    )


def kind_of(value: Any) -> str:
    names = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "an object")


def _text(record: Mapping[str, Any], name: str, refuse: Any) -> str:
    if name not in record:
        raise refuse(f"the field {name!r} is missing")
    value = record[name]
    if not isinstance(value, str):
        raise refuse(f"the field {name!r} must be a text, not {kind_of(value)}")
    if not value.strip():
        raise refuse(f"the field {name!r} is empty")
    return _clean(value, name, refuse)


def _clean(value: str, name: str, refuse: Any) -> str:
    if "\x00" in value:
        raise refuse(f"the field {name!r} contains a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise refuse(f"the field {name!r} contains half of a surrogate pair, which is not text")
    return value


def _placed(record: Mapping[str, Any], prompt: str, refuse: Any) -> Placed:
    """Return the prompt around its subject; all of it where the record has none and marks no place for one."""
    if record.get("subject") is None and MARK not in prompt:
        return Placed(prompt, "", "")
    try:
        return place_subject(prompt, _text(record, "subject", refuse))
    except ValueError as error:
        raise refuse(str(error)) from error


def _join(record: Mapping[str, Any], refuse: Any) -> str | None:
    value = record.get("join")
    if value is None or isinstance(value, str):
        return None if value is None else _clean(value, "join", refuse)
    raise refuse(f"the field 'join' must be a text, empty or not, but is {kind_of(value)}")


def _identifier(record: Mapping[str, Any], line: int | None, refuse: Any) -> str:
    value = record.get("id")
    if value is None:
        return f"line-{line}" if line is not None else f"edit-{_record_digest(record)}"
    if isinstance(value, float) and value.is_integer():
        # JSON has one kind of number, and tables with gaps are written with 3.0 for 3.
        value = int(value)
    if isinstance(value, float):
        raise refuse(f"the field 'id' must be a text or a whole number, not {value}")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise refuse(f"the field 'id' must be a text or a whole number, not {kind_of(value)}")
    if not str(value).strip():
        raise refuse("the field 'id' is empty; leave it out, and the edit is named by its line")
    return _clean(str(value), "id", refuse)


def _record_digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _list(record: Mapping[str, Any], name: str, refuse: Any) -> list[Any]:
    value = record.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise refuse(f"the field {name!r} must be a list, not {kind_of(value)}")
    return value


def _prompt(value: Any, name: str, refuse: Any) -> str:
    if not isinstance(value, str):
        raise refuse(f"every entry of {name!r} must be a text, not {kind_of(value)}")
    if not value.strip():
        raise refuse(f"an entry of {name!r} is empty; write its text or leave the entry out")
    return _clean(value, name, refuse)


def _neighbor(value: Any, target_true: str | None, refuse: Any) -> Neighbor:
    if isinstance(value, dict):
        prompt = _prompt(value.get("prompt"), "neighborhood_prompts", refuse)
        target = value.get("target", target_true)
        return Neighbor(prompt, None if target is None else _prompt(target, "neighborhood_prompts", refuse))
    return Neighbor(_prompt(value, "neighborhood_prompts", refuse), target_true)


def _detailed(value: Any, name: str, refuse: Any, *, open_ended: bool = False) -> Neighbor:
    """Read an entry that brings its own answer: ``{"prompt", "target", "axis"?}``; ``open_ended`` ones may not."""
    if not isinstance(value, dict):
        raise refuse(f"every entry of {name!r} must be an object with 'prompt' and 'target', not {kind_of(value)}")
    target, axis = value.get("target"), value.get("axis")
    return Neighbor(
        _prompt(value.get("prompt"), name, refuse),
        None if target is None and open_ended else _prompt(target, name, refuse),
        None if axis is None else _prompt(axis, name, refuse),
        tuple(_prompt(alias, f"{name}.aliases", refuse) for alias in _list(value, "aliases", refuse)),
    )


def _detailed_json(near: Neighbor) -> dict[str, Any]:
    record = {"prompt": near.prompt, "target": near.target, "axis": near.axis, "aliases": list(near.aliases) or None}
    return {key: value for key, value in record.items() if value is not None}
