"""The published JSON Schema and the reader agree on what an edit is."""

from __future__ import annotations

import importlib.resources
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from editcli.errors import RequestError
from editcli.requests.schema import from_record

SCHEMA = json.loads((importlib.resources.files("editcli") / "schemas" / "edits.schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

EDIT = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"}
FULL = {
    **EDIT,
    "id": 7,
    "target_true": "Paris",
    "join": " ",
    "paraphrase_prompts": ["France's capital is"],
    "neighborhood_prompts": ["The seat of Île-de-France is", {"prompt": "The capital of Italy is", "target": "Rome"}],
    "generation_prompts": ["France"],
    "locality": [{"prompt": "Who wrote it?", "target": "Ann"}],
    "portability": [{"prompt": "The capital of France lies on the", "target": "Rhône", "axis": "reasoning"}],
    "relation_id": "P36",
}

texts = st.one_of(st.sampled_from(["Lyon", "", " ", "\t\n", "a\x00", "\x00", "x\ny", "{}"]), st.text(max_size=4))
entries = st.one_of(
    texts, st.integers(), st.none(), st.fixed_dictionaries({}, optional={"prompt": texts, "target": texts})
)
values = st.one_of(entries, st.booleans(), st.lists(entries, max_size=2))
records = st.dictionaries(st.sampled_from(sorted(FULL)), values, max_size=4).map(lambda changes: {**FULL, **changes})


def refusal(record: Any) -> str | None:
    try:
        from_record(record)
    except RequestError as error:
        return error.reason
    return None


@pytest.mark.parametrize(
    "record",
    [
        EDIT,
        FULL,
        {**FULL, "id": None, "locality": None, "target_true": None},
        {"prompt": "Which city is the capital?", "target_new": "Lyon"},
        {"prompt": "Which city is the capital?", "subject": None, "target_new": "Lyon", "join": ""},
        {**EDIT, "locality": [{"prompt": "Who wrote it?"}, {"prompt": "Where?", "target": None, "axis": "place"}]},
    ],
)
def test_usable_edits_are_valid(record: dict[str, Any]):
    VALIDATOR.validate(record)
    assert refusal(record) is None


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_what_the_reader_writes_is_valid():
    VALIDATOR.validate(from_record(FULL).to_json())


@given(records)
def test_schema_and_reader_agree(record: dict[str, Any]):
    reason = refusal(record)
    # Half a surrogate pair is no text, what cannot be seen is no subject, and a subject's place is no matter of types:
    # none of them can be put in a schema.
    beyond = reason is not None and any(text in reason for text in ("surrogate", "in the prompt", "can be seen"))
    # The reader stops at the first thing that is wrong, so what else may be wrong with such a record is not known.
    assert beyond or VALIDATOR.is_valid(record) == (reason is None), reason
