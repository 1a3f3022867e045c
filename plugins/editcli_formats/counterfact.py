"""CounterFact: a nested ``requested_rewrite``, and the forms in which editing code passes it around."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from editcli.plugin import Format
from editcli_formats.fields import answered, filled, first_text, identifier, neighbors, place, rest, text, texts

_USED = (
    "id",
    "case_id",
    "requested_rewrite",
    "paraphrase_prompts",
    "rephrase_prompt",
    "neighborhood_prompts",
    "locality_prompt",
    "locality_ground_truth",
)
_REWRITE = ("prompt", "question", "subject", "target_new", "target_true", "relation_id")


class CounterFact(Format):
    """CounterFact as published with ROME: one nested requested_rewrite a record.

    Read as well: a requested_rewrite that is a list of one, targets that are plain texts, and the flat requests of
    ROME's and MEMIT's code, whose targets are objects with ``str``.
    """

    name = "counterfact"
    reference = "arXiv:2202.05262"

    def sniff(self, record: Mapping[str, Any]) -> bool:
        rewrite = record.get("requested_rewrite")
        if rewrite is None:
            return {"prompt", "subject"} <= record.keys() and isinstance(record.get("target_new"), Mapping)
        return isinstance(rewrite, Mapping) or is_single(record)

    def read(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        nested = record if isinstance(record.get("target_new"), Mapping) else record["requested_rewrite"]
        rewrite = read_rewrite(nested[0] if isinstance(nested, list) else nested)
        near = neighbors(
            answered(record.get("locality_prompt"), record.get("locality_ground_truth")), rewrite.get("target_true")
        )
        paraphrases = [*texts(record.get("paraphrase_prompts")), *texts(record.get("rephrase_prompt"))]
        neighborhood = texts(record.get("neighborhood_prompts"))
        near["neighborhood_prompts"] = list(dict.fromkeys([*neighborhood, *near["neighborhood_prompts"]]))
        fields = {"id": identifier(record), **rewrite, "paraphrase_prompts": list(dict.fromkeys(paraphrases)), **near}
        yield filled({**fields, **rest(record, (*_USED, *(_REWRITE if nested is record else ())))})


def is_single(record: Mapping[str, Any]) -> bool:
    """Tell whether a record's list of rewrites holds one, and nothing that only a record of several has."""
    rewrite = record.get("requested_rewrite")
    alone = isinstance(rewrite, list) and len(rewrite) == 1 and isinstance(rewrite[0], Mapping)
    return alone and not record.keys() & {"questions", "new_answer", "new_single_hops"}


def read_rewrite(rewrite: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fact in a ``requested_rewrite`` object; its prompt may be a question that names the subject."""
    prompt = first_text(rewrite.get("prompt")) or first_text(rewrite.get("question"))
    if prompt is None:
        raise ValueError("the field 'prompt' is missing or not a text")
    return filled(
        {
            **place(prompt, text(rewrite, "subject")),
            "target_new": _target(rewrite, "target_new"),
            "target_true": _target(rewrite, "target_true", optional=True),
            "relation_id": rewrite.get("relation_id"),
        }
    )


def _target(rewrite: Mapping[str, Any], name: str, *, optional: bool = False) -> str | None:
    """Return a target, which is a text or an object with ``str``."""
    value = rewrite.get(name)
    target = first_text(value.get("str") if isinstance(value, Mapping) else value)
    if target is None and not optional:
        path = f"{name}.str" if isinstance(value, Mapping) else name
        raise ValueError(f"the field {path!r} is missing or not a text")
    return None if target is None else target.strip()
