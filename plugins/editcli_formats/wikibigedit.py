"""WikiBigEdit: questions about facts that changed in Wikidata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from editcli.plugin import Format
from editcli_formats.fields import answered, asked, filled, identifier, rest, text, texts

_USED = ("id", "case_id", "subject", "update", "ans", "rephrase", "personas", "mhop", "mhop_ans", "loc", "loc_ans")


class WikiBigEdit(Format):
    """WikiBigEdit (Thede et al., 2025): update is a question about subject, ans its answer now.

    ``rephrase`` is a paraphrase, ``loc`` an unrelated question with ``loc_ans``; ``personas`` (the question in another
    voice) and ``mhop`` with ``mhop_ans`` (a question of several hops) become portability. What was true before is not
    recorded. The field names are those of the paper's published files and of its editing code.
    """

    name = "wikibigedit"
    reference = "arXiv:2503.05683"

    def sniff(self, record: Mapping[str, Any]) -> bool:
        return {"update", "ans"} <= record.keys()

    def read(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        answer = text(record, "ans")
        voices = texts(record.get("personas"))
        follows = [
            *answered(voices, [answer] * len(voices), "personas"),
            *answered(record.get("mhop"), record.get("mhop_ans"), "multi_hop"),
        ]
        fields = {
            "id": identifier(record),
            **asked(record, "update"),
            "target_new": answer,
            "paraphrase_prompts": texts(record.get("rephrase")),
            "locality": list(answered(record.get("loc"), record.get("loc_ans"))),
            "portability": follows,
        }
        yield filled({**fields, **rest(record, _USED)})
