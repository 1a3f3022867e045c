"""MLaKE: questions about single facts in five languages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from editcli.plugin import Format
from editcli_formats.fields import asked, filled, first_text, identifier, rest, text

_USED = ("id", "case_id", "question", "subject", "o_answer", "e_answer")


class MLaKE(Format):
    """MLaKE (Wei et al., 2024), single-hop questions: question is edited to answer e_answer, which was o_answer.

    The files name no subject, so their edits are plain questions, for editors that need none; add ``subject`` for the
    others. Questions of several hops ask what follows from an edit and hold none. The field names are those that the
    repository of the paper describes (Hi-archers/MLaKE).
    """

    name = "mlake"
    reference = "arXiv:2404.04990"

    def sniff(self, record: Mapping[str, Any]) -> bool:
        return "question" in record and bool(record.keys() & {"o_answer", "e_answer"})

    def read(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if not {"o_answer", "e_answer"} <= record.keys():
            raise ValueError("a question of several hops holds no edit; take the file of single-hop questions")
        fields = {
            "id": identifier(record),
            **asked(record, "question"),
            "target_new": text(record, "e_answer"),
            "target_true": first_text(record.get("o_answer")),
        }
        yield filled({**fields, **rest(record, _USED)})
