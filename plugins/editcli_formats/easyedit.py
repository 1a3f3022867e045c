"""EasyEdit's flat form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from editcli.plugin import Format
from editcli_formats.fields import answered, asked, filled, first_text, identifier, neighbors, rest, texts

_OWN = ("rephrase_prompt", "locality_prompt", "locality_ground_truth", "portability_prompt", "portability_ground_truth")
_USED = ("id", "case_id", "prompt", "subject", "target_new", "ground_truth", *_OWN)


class EasyEdit(Format):
    """EasyEdit's flat records: ground_truth, rephrase_prompt, locality_prompt beside prompt, target and subject.

    A record without a subject is a plain question, for editors that need none.
    """

    name = "easyedit"
    reference = "arXiv:2308.07269"

    def sniff(self, record: Mapping[str, Any]) -> bool:
        grouped = any(isinstance(record.get(key), Mapping) for key in ("locality", "portability"))
        flat = {"prompt", "target_new"} <= record.keys() and not isinstance(record["target_new"], Mapping)
        return flat and not grouped and _marked(record)

    def read(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        yield filled({**read_flat(record), **rest(record, _USED)})


def read_flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fact and its prompts in a flat record."""
    true = first_text(record.get("ground_truth"))
    near = answered(record.get("locality_prompt"), record.get("locality_ground_truth"))
    follows = answered(record.get("portability_prompt"), record.get("portability_ground_truth"))
    new = first_text(record.get("target_new"))
    if new is None:
        raise ValueError("the field 'target_new' is missing or not a text")
    return {
        "id": identifier(record),
        **asked(record, "prompt"),
        "target_new": new,
        "target_true": true,
        "paraphrase_prompts": texts(record.get("rephrase_prompt")),
        **neighbors(near, true),
        "portability": list(follows),
    }


def _marked(record: Mapping[str, Any]) -> bool:
    """Return whether there is a field that only this form has: prompt, subject and target are ours as well."""
    return any(key in record for key in ("ground_truth", *_OWN))
