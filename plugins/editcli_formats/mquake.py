"""MQuAKE: several edits a record, and questions that need all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from editcli.plugin import Format
from editcli_formats.counterfact import is_single, read_rewrite
from editcli_formats.fields import answered, filled, first_text, identifier, texts


class MQuake(Format):
    """MQuAKE: a list of rewrites a record; its multi-hop questions go to the record's last edit, as portability.

    So do the hops of the chain that are no edits themselves (``single_hop``): a model that does not know one of them
    cannot answer the chain. Other names of an answer are kept as aliases.
    The edits of record 7 get the ids ``7-1``, ``7-2`` and so on; the record's number is kept as ``case_id``.
    """

    name = "mquake"
    reference = "arXiv:2305.14795"

    def sniff(self, record: Mapping[str, Any]) -> bool:
        return isinstance(record.get("requested_rewrite"), list) and not is_single(record)

    def read(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        rewrites, case = record["requested_rewrite"], identifier(record)
        if not rewrites or case is None:
            raise ValueError("it needs a 'case_id' and at least one 'requested_rewrite'")
        questions = texts(record.get("questions"))
        answer = [record.get("new_answer"), record.get("new_answer_alias")]
        hops = [*answered(questions, [answer] * len(questions), "multi_hop"), *_unedited(record, rewrites)]
        for number, rewrite in enumerate(rewrites, start=1):
            fact = {"id": f"{case}-{number}", **read_rewrite(rewrite), "case_id": case}
            last = number == len(rewrites)
            yield filled({**fact, "question": rewrite.get("question"), "portability": hops if last else None})


def _unedited(record: Mapping[str, Any], rewrites: list[Any]) -> Iterator[dict[str, Any]]:
    """Yield the hops of the chain that no rewrite asks about."""
    edited = {rewrite.get("question") for rewrite in rewrites}
    for hop in record.get("new_single_hops") or ():
        if isinstance(hop, Mapping) and hop.get("question") not in edited:
            prompt = first_text(hop.get("cloze")) or hop.get("question")
            yield from answered(prompt, [hop.get("answer"), hop.get("answer_alias")], "single_hop")
