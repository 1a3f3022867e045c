"""Shared by the readers: take fields out of foreign records, and build the fields of an edit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any


def text(record: Mapping[str, Any], *path: str) -> str:
    """Return the text at a path of keys; raise ValueError naming the path when there is none."""
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the field {'.'.join(path)!r} is missing or not a text")
    return value


def first_text(value: Any) -> str | None:
    """Return a text, or the first text of a (nested) list of equally good ones; None when there is none."""
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, list):
        return next((first for item in value if (first := first_text(item)) is not None), None)
    return None


def other_texts(value: Any) -> list[str]:
    """Return the texts of a (nested) list of equally good ones but for the first, each once."""
    first = first_text(value)
    return [text for text in dict.fromkeys(_flat(value)) if text != first]


def _flat(value: Any) -> Iterator[str]:
    """Yield every text in a (nested) list."""
    if isinstance(value, str) and value.strip():
        yield value
    for item in value if isinstance(value, list) else ():
        yield from _flat(item)


def texts(value: Any) -> list[str]:
    """Return a text or a list of texts as a list, without the empty ones."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, str) and item.strip()]


def answered(
    prompts: Any, answers: Any, axis: str | None = None, *, unanswered: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield ``{"prompt", "target"}`` for each prompt that has an answer, where both may be one text or a list.

    Of several equally good answers the first is the target and the others are its ``aliases``. With ``unanswered`` a
    prompt without an answer is yielded too, without a target.
    """
    questions = prompts if isinstance(prompts, list) else [prompts]
    known = answers if isinstance(prompts, list) and isinstance(answers, list) else [answers]
    pairs = zip_longest(questions, known) if unanswered else zip(questions, known, strict=False)
    for question, answer in pairs:
        target = first_text(answer)
        if isinstance(question, str) and question.strip() and (target is not None or unanswered):
            yield filled({"prompt": question, "target": target, "axis": axis, "aliases": other_texts(answer)})


def place(prompt: str, subject: str) -> dict[str, str]:
    """Return ``prompt`` and ``subject`` such that the subject's place is unambiguous, where that can be had.

    These files give the prompt in full. A subject that it spells in other letter case takes the prompt's spelling; of
    several places the last is meant, because by then everything about the subject has been said.
    """
    start = prompt.rfind(subject)
    if start < 0:
        lowered = prompt.lower()
        # Lower-casing may change a text's length, and then offsets mean nothing.
        start = lowered.rfind(subject.lower()) if len(lowered) == len(prompt) else -1
        subject = prompt[start : start + len(subject)] if start >= 0 else subject
    if start < 0 or "{}" in prompt:
        return {"prompt": prompt, "subject": subject}
    return {"prompt": f"{prompt[:start]}{{}}{prompt[start + len(subject) :]}", "subject": subject}


def asked(record: Mapping[str, Any], field: str) -> dict[str, str]:
    """Return the prompt in ``field`` and the record's subject, if it has one, for :func:`place`."""
    prompt = text(record, field)
    return {"prompt": prompt} if record.get("subject") is None else place(prompt, text(record, "subject"))


def rest(record: Mapping[str, Any], used: Collection[str]) -> dict[str, Any]:
    """Return the fields that a reader does not use; they are kept and passed on."""
    return {key: value for key, value in record.items() if key not in used}


def filled(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without its empty fields."""
    return {key: value for key, value in record.items() if value not in (None, [], {})}


def identifier(record: Mapping[str, Any]) -> Any:
    """Return the record's own number, which these files call ``case_id``."""
    return record.get("case_id", record.get("id"))


def neighbors(pairs: Iterable[Mapping[str, Any]], true: str | None) -> dict[str, list[Any]]:
    """Sort answered prompts into neighbours, which have the edit's own true answer, and unrelated questions.

    CounterFact's locality prompts are of the first kind, zsRE's of the second.
    """
    known = list(pairs)
    return {
        "neighborhood_prompts": [pair["prompt"] for pair in known if pair["target"] == true],
        "locality": [pair for pair in known if pair["target"] != true],
    }
