"""KnowEdit: EasyEdit's flat form with locality and portability grouped by axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from editcli.plugin import Format
from editcli_formats.easyedit import read_flat
from editcli_formats.fields import answered, filled, rest, texts

_USED = ("id", "case_id", "prompt", "subject", "target_new", "ground_truth", "rephrase_prompt", "rephrase")


class KnowEdit(Format):
    """KnowEdit (wiki_recent, wiki_counterfact, zsRE): locality and portability as objects of named axes.

    Of several accepted answers the first is the target and the others are its aliases. Locality without an answer is
    kept: the base model's own counts.
    """

    name = "knowedit"
    reference = "arXiv:2401.01286"

    def sniff(self, record: Mapping[str, Any]) -> bool:
        grouped = any(isinstance(record.get(key), Mapping) for key in ("locality", "portability"))
        return {"prompt", "subject", "target_new"} <= record.keys() and grouped

    def read(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        flat = read_flat({"rephrase_prompt": record.get("rephrase"), **record})
        axes = {
            "locality": list(_axes(record.get("locality"), unanswered=True)),
            "portability": list(_axes(record.get("portability"))),
        }
        yield filled({**flat, **axes, **rest(record, (*_USED, *axes))})


def _axes(groups: Any, *, unanswered: bool = False) -> Iterator[dict[str, str]]:
    """Yield the prompts of every axis, which is one object of lists or a list of objects."""
    for axis, group in groups.items() if isinstance(groups, Mapping) else ():
        for part in group if isinstance(group, list) else [group]:
            if isinstance(part, Mapping) and texts(part.get("prompt")):
                yield from answered(part["prompt"], part.get("ground_truth"), axis.lower(), unanswered=unanswered)
