"""RippleEdits: one fact a record, and queries by the six criteria of what else must and must not change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from editcli.plugin import Format
from editcli_formats.fields import filled, identifier, rest

_FOLLOWS = ("Logical_Generalization", "Compositionality_I", "Compositionality_II", "Subject_Aliasing")
_STAYS = ("Relation_Specificity", "Relation_Specifity", "Forgetfulness")
"""The second spelling is that of some of the published files."""
_USED = ("id", "case_id", "edit", *_FOLLOWS, *_STAYS)

_PHRASES: Mapping[str, tuple[str, str]] = {
    "AWARD_RECEIVED": ("The name of the award ", " won is"),
    "CAPITAL": ("The name of the capital city of ", " is"),
    "CAPITAL_OF": ("The name of the country which ", " is the capital of is"),
    "CAST_MEMBER": ("The names of the cast members of ", " are"),
    "CONTINENT": ("The name of the continent which ", " is part of is"),
    "COUNTRY": ("The name of the country which ", " is associated with is"),
    "CURRENCY": ("The name of the currency in ", " is"),
    "ETHNIC_GROUP": ("The name of the ethnic group which ", " is associated with is"),
    "FOLLOWED_BY": ("", " is followed by"),
    "FOLLOWS": ("", " follows"),
    "IS_ALIVE": ("Is ", " still alive?"),
    "LEAGUE": ("The name of the league which ", " plays in is"),
    "LIKELY_ANTHEM": ("The name of the anthem that is most likely to be performed in ", " is"),
    "MEMBER_OF_SPORTS_TEAM": ("The name of the sports team which ", " is a member of is"),
    "NATIVE_LANGUAGE": ("The mother tongue of ", " is"),
    "NUMBER_OF_CHILDREN": ("The number of children ", " has is"),
    "POSITION_HELD": ("The name of the position held by ", " is"),
    "RELIGION": ("The name of the religion which ", " is associated with is"),
    "SEX_OR_GENDER": ("The gender of ", " is"),
    "SIBLING": ("The names of the siblings of ", " are"),
}
"""Text before and after the subject, of the relations whose sentence does not follow from their name."""


class RippleEdits(Format):
    """RippleEdits (Cohen et al., 2023): a fact as a sentence, and tests by criterion.

    Logical generalization, compositionality and subject aliasing become portability, relation specificity and
    forgetfulness locality; each prompt keeps its criterion as its axis and every accepted answer. The conditions under
    which the paper asks a test are not applied. The sentence is taken apart by its relation. The field names are those
    of the paper's repository (edenbiran/RippleEdits).
    """

    name = "rippleedits"
    reference = "arXiv:2307.12976"

    def sniff(self, record: Mapping[str, Any]) -> bool:
        fact = record.get("edit")
        return isinstance(fact, Mapping) and {"prompt", "relation"} <= fact.keys()

    def read(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        fact = record["edit"]
        before, after = _phrase(fact)
        subject, new = _parts(fact, before, after)
        earlier = fact.get("previous_fact") or fact.get("original_fact")
        fields = {
            "id": identifier(record),
            "prompt": f"{before}{{}}{after}",
            "subject": subject,
            "target_new": new,
            "target_true": _parts(earlier, before, after)[1] if isinstance(earlier, Mapping) else None,
            "portability": list(_tests(record, _FOLLOWS)),
            "locality": list(_tests(record, _STAYS)),
            "relation_id": fact["relation"],
        }
        yield filled({**fields, **rest(record, _USED)})


def _phrase(fact: Mapping[str, Any]) -> tuple[str, str]:
    """Return the text before and after the subject in the sentence of a fact's relation."""
    relation = str(fact["relation"])
    if relation in _PHRASES:
        return _PHRASES[relation]
    words = relation.lower().replace("_", " ")
    named = f"The name of the {words} of "
    return (named if str(fact["prompt"]).startswith(named) else f"The {words} of ", " is")


def _parts(fact: Mapping[str, Any], before: str, after: str) -> tuple[str, str]:
    """Return subject and target of a fact; raise ValueError where its sentence is another."""
    sentence = str(fact.get("prompt", ""))
    match = re.fullmatch(f"{re.escape(before)}(.+?){re.escape(after)} (.+?)\\.?", sentence, re.DOTALL)
    if match is None:
        raise ValueError(f"the sentence {sentence!r} is not '{before}SUBJECT{after} TARGET.'")
    return match[1], match[2]


def _tests(record: Mapping[str, Any], criteria: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the queries of each criterion with their answers; one that has none is left out."""
    for criterion in criteria:
        # The misspelt criterion is the same one.
        axis = criterion.replace("Specifity", "Specificity").lower()
        for test in record.get(criterion) or ():
            for query in test.get("test_queries") or ():
                answers = list(_answers(query))
                if answers and str(query.get("prompt") or "").strip():
                    yield filled(
                        {"prompt": query["prompt"], "target": answers[0], "axis": axis, "aliases": answers[1:]}
                    )


def _answers(query: Mapping[str, Any]) -> Iterator[str]:
    """Yield the accepted answers of a query, each once: values first, then their other names.

    A single letter is no answer: the paper leaves such names out as well.
    """
    answers = [answer for answer in query.get("answers") or () if isinstance(answer, Mapping)]
    names = [answer.get("value") for answer in answers]
    names += [alias for answer in answers for alias in answer.get("aliases") or ()]
    known = dict.fromkeys(name.strip() for name in names if isinstance(name, str))
    yield from (name for name in known if len(name) > 1 or name.isdigit())
