"""CounterFact: a nested ``requested_rewrite``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from editcli.formats import Format
from editcli_formats.fields import answered, filled, identifier, neighbors, rest, text, texts

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


class CounterFact(Format):
    """CounterFact as published with ROME: one nested requested_rewrite a record."""

    name = "counterfact"
    reference = "arXiv:2202.05262"

    def sniff(self, record: Mapping[str, Any]) -> bool:
        return isinstance(record.get("requested_rewrite"), Mapping)

    def read(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        rewrite = read_rewrite(record["requested_rewrite"])
        near = neighbors(
            answered(record.get("locality_prompt"), record.get("locality_ground_truth")), rewrite.get("target_true")
        )
        paraphrases = [*texts(record.get("paraphrase_prompts")), *texts(record.get("rephrase_prompt"))]
        own = texts(record.get("neighborhood_prompts"))
        near["neighborhood_prompts"] = list(dict.fromkeys([*own, *near["neighborhood_prompts"]]))
        fields = {"id": identifier(record), **rewrite, "paraphrase_prompts": list(dict.fromkeys(paraphrases)), **near}
        yield filled({**fields, **rest(record, _USED)})


def read_rewrite(rewrite: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fact in a ``requested_rewrite`` object."""
    true = rewrite.get("target_true")
    fact = {
        "prompt": text(rewrite, "prompt"),
        "subject": text(rewrite, "subject"),
        "target_new": text(rewrite, "target_new", "str").strip(),
        "relation_id": rewrite.get("relation_id"),
    }
    if isinstance(true, Mapping) and texts(true.get("str")):
        fact["target_true"] = text(true, "str").strip()
    return filled(fact)
