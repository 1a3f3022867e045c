"""zsRE in MEND's form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from editcli.plugin import Format
from editcli_formats.fields import answered, filled, first_text, identifier, place, rest, text, texts

_USED = ("id", "case_id", "src", "subject", "alt", "answers", "rephrase", "loc", "loc_ans")


class ZsRE(Format):
    """zsRE as MEND published it: src is edited to answer alt; loc is an unrelated question.

    The true answer is the first of ``answers``. (Some published runs write that one, as a correction; then swap them.)
    """

    name = "zsre"
    reference = "arXiv:2110.11309"

    def sniff(self, record: Mapping[str, Any]) -> bool:
        return {"src", "subject", "alt"} <= record.keys()

    def read(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        questions = [_question(loc) for loc in texts(record.get("loc"))]
        fields = {
            "id": identifier(record),
            **place(text(record, "src"), text(record, "subject")),
            "target_new": text(record, "alt"),
            "target_true": first_text(record.get("answers")),
            "paraphrase_prompts": texts(record.get("rephrase")),
            "locality": list(answered(questions, [record.get("loc_ans")])),
        }
        yield filled({**fields, **rest(record, _USED)})


def _question(loc: str) -> str:
    # The unrelated questions come without their mark; without it, a model continues the question.
    return loc if loc.rstrip().endswith("?") else f"{loc}?"
