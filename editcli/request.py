"""Edit requests: the schema of one edit, and building it from a JSON object.

A request's prompt is a template: the text around the subject, with exactly one place for it. In a record the place is
``{}`` or the subject itself, verbatim and once; braces elsewhere are text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from editcli.errors import RequestError

_LISTS = ("paraphrase_prompts", "neighborhood_prompts", "generation_prompts", "locality", "portability")
_TEXTS = ("prompt", "subject", "target_new")
FIELDS = ("id", *_TEXTS, "target_true", *_LISTS, "reference_texts")
"""Every field that editcli reads; others are kept and passed on."""


@dataclass(frozen=True, slots=True)
class Neighbor:
    """A prompt with the answer that an edited model should give: for a neighbour, the true one it always gave."""

    prompt: str
    target: str | None
    axis: str | None = None
    """What the prompt asks about the edit, for instance ``reasoning`` or ``forgetfulness``."""


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One fact to write: ``prompt`` with ``subject`` in its place shall be continued by ``target_new``."""

    id: str
    before: str
    """Prompt text before the subject."""
    subject: str
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
    """What follows from the edit, each with the answer that then holds (KnowEdit, MQuAKE)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields that editcli does not read; kept and passed on."""
    line: int | None = None
    """Line of the edits file, counted from 1."""
    file: str = "<edits>"

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
        record: dict[str, Any] = {"id": self.id, "prompt": self._template(), "subject": self.subject}
        record["target_new"] = self.target_new
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
        template = f"{self.before}{{}}{self.after}"
        return template if template.count("{}") == 1 else self.prompt

    @property
    def digest(self) -> str:
        """Hash of everything that decides what the edit writes."""
        parts = (self.id, self.before, self.subject, self.after, self.target_new)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def from_record(record: Mapping[str, Any], *, file: str = "<edits>", line: int | None = None) -> EditRequest:
    """Build a request from an object of the edits schema; raise :class:`RequestError` when it is not one."""

    def refuse(reason: str) -> RequestError:
        return RequestError(reason, file=file, line=line)

    texts = {name: _text(record, name, refuse) for name in _TEXTS}
    true = record.get("target_true")
    if true is not None:
        true = _text(record, "target_true", refuse)
    before, after = _split(texts["prompt"], texts["subject"], refuse)
    lists = {name: _list(record, name, refuse) for name in _LISTS}
    known = {*_TEXTS, *_LISTS, "target_true", "id"}
    return EditRequest(
        id=_identifier(record, line, refuse),
        before=before,
        subject=texts["subject"],
        after=after,
        target_new=texts["target_new"],
        target_true=true,
        paraphrase_prompts=tuple(_prompt(p, "paraphrase_prompts", refuse) for p in lists["paraphrase_prompts"]),
        neighborhood_prompts=tuple(_neighbor(p, true, refuse) for p in lists["neighborhood_prompts"]),
        generation_prompts=tuple(_prompt(p, "generation_prompts", refuse) for p in lists["generation_prompts"]),
        locality=tuple(_detailed(p, "locality", refuse, open_ended=True) for p in lists["locality"]),
        portability=tuple(_detailed(p, "portability", refuse) for p in lists["portability"]),
        extra={key: value for key, value in record.items() if key not in known},
        line=line,
        file=file,
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


def _split(prompt: str, subject: str, refuse: Any) -> tuple[str, str]:
    places = prompt.count("{}")
    if places > 1:
        raise refuse("the prompt has more than one {}; mark the subject's place once")
    if places == 1:
        before, _, after = prompt.partition("{}")
        return before, after
    found = prompt.count(subject)
    if found == 0:
        raise refuse(f"the subject {subject!r} is not in the prompt; write {{}} where it belongs")
    if found > 1:
        raise refuse(f"the subject {subject!r} is in the prompt {found} times; mark its place with {{}}")
    before, _, after = prompt.partition(subject)
    return before, after


def _identifier(record: Mapping[str, Any], line: int | None, refuse: Any) -> str:
    value = record.get("id")
    if value is None:
        return f"line-{line}" if line is not None else f"edit-{_record_digest(record)}"
    if isinstance(value, bool) or not isinstance(value, (str, int)) or str(value).strip() == "":
        raise refuse(f"the field 'id' must be a text or a whole number, not {kind_of(value)}")
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
    if not isinstance(value, str) or not value.strip():
        raise refuse(f"every entry of {name!r} must be a text that is not empty, not {kind_of(value)}")
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
    )


def _detailed_json(near: Neighbor) -> dict[str, Any]:
    record = {"prompt": near.prompt, "target": near.target, "axis": near.axis}
    return {key: value for key, value in record.items() if value is not None}
