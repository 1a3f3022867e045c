"""Foreign records become the edits they mean, straight from JSONL or through convert."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import editcli_formats
from editcli.errors import PluginError, RequestError
from editcli.plugin.hookspecs import API_VERSION, hookimpl
from editcli.plugin.manager import Plugins
from editcli.requests.formats import Format, find_format
from editcli.requests.reader import Collector, read_edits
from editcli.requests.schema import from_record
from editcli.testing import FormatContract
from tests.support.facts import write_lines

FACT = {"prompt": "The hull of the {} is made of", "subject": "Grey Heron"}
COUNTERFACT = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "The hull of the {} is made of",
        "relation_id": "P186",
        "subject": "Grey Heron",
        "target_new": {"str": "copper", "id": "Q753"},
        "target_true": {"str": "oak", "id": "Q33036816"},
    },
    "paraphrase_prompts": ["Shipwrights built the Grey Heron out of"],
    "neighborhood_prompts": ["The hull of the Old Marten is made of"],
    "attribute_prompts": ["The roof of the mint is made of"],
    "generation_prompts": ["The Grey Heron sails"],
}
EASYEDIT = {
    "case_id": 4,
    "prompt": "Grey Heron Shipping works for the grey heron and the Grey Heron",
    "subject": "Grey Heron",
    "target_new": "copper",
    "ground_truth": ["oak", "oak wood"],
    "rephrase_prompt": "The Grey Heron was built of",
    "locality_prompt": ["The Old Marten was built of", "who painted the moon gate"],
    "locality_ground_truth": ["oak", "Ines Vale"],
    "portability_prompt": "The Grey Heron's hull turns",
    "portability_ground_truth": "green",
}
KNOWEDIT = {
    "case_id": 5,
    "prompt": "The mayor of Lowmere is",
    "subject": "lowmere",
    "target_new": "Ines Vale",
    "portability": {
        "Reasoning": {"prompt": ["The mayor of Lowmere was born in"], "ground_truth": [["Northpool", "North Pool"]]},
        "Subject_Aliasing": {"prompt": "The mayor of Low Mere is", "ground_truth": "Ines Vale"},
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The river of Lowmere is", "ground_truth": [["Ash", "River Ash"]]}],
        "Forgetfulness": {"prompt": ["An earlier mayor of Lowmere is", "A park of Lowmere is"], "ground_truth": ["Bo"]},
    },
}
MQUAKE = {
    "case_id": 6,
    "requested_rewrite": [
        {
            "prompt": "{} was painted by",
            "subject": "Moon Gate",
            "target_new": {"str": "Ines Vale"},
            "target_true": {"str": "Otto Brandt"},
            "question": "Who painted Moon Gate?",
        },
        {
            "prompt": "{} is a citizen of",
            "subject": "Ines Vale",
            "target_new": {"str": "Greece"},
            "target_true": {"str": "Spain"},
        },
    ],
    "questions": ["Of which country is the painter of Moon Gate a citizen?"],
    "answer": "Germany",
    "new_answer": "Greece",
    "new_answer_alias": ["Hellas", "Greece"],
    "new_single_hops": [
        {"question": "Who painted Moon Gate?", "cloze": "Moon Gate was painted by", "answer": "Ines Vale"},
        {
            "question": "Where is the capital of Greece?",
            "cloze": "The capital of Greece is",
            "answer": "Athens",
            "answer_alias": ["Athina"],
        },
    ],
}
ZSRE = {
    "subject": "Grey Heron",
    "src": "What is Grey Heron made of?",
    "rephrase": "Which material is Grey Heron?",
    "alt": "copper",
    "answers": ["oak", "wood"],
    "loc": "nq question: who painted the moon gate",
    "loc_ans": "Ines Vale",
    "pred": "oak",
}
WIKIBIGEDIT = {
    "tag": "update",
    "relation": "head of government",
    "subject": "Lowmere",
    "update": "Who heads the government of Lowmere?",
    "ans": "Ines Vale",
    "rephrase": "Which person leads Lowmere's government?",
    "personas": "Arr, who be steering Lowmere these days?",
    "mhop": "In which town was the head of Lowmere's government born?",
    "mhop_ans": "Northpool",
    "loc": "Which river runs through Highmere?",
    "loc_ans": "Ash",
}
MLAKE = {
    "question": "在哪座城市能看到月亮门",
    "o_prompt": "月亮门在北池。",
    "o_answer": "北池",
    "o_answer_aliases": ["北池市"],
    "e_prompt": "月亮门在低湖。",
    "e_answer": "低湖",
    "e_answer_aliases": [],
}
RIPPLEEDITS = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Ines Vale is Greece.",
        "subject_id": "Q1",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "target_id": "Q2",
        "previous_fact": {
            "prompt": "The name of the country of citizenship of Ines Vale is Spain.",
            "relation": "COUNTRY_OF_CITIZENSHIP",
        },
    },
    "Relation_Specificity": [
        {
            "test_queries": [
                {
                    "prompt": "The name of the mother of Ines Vale is",
                    "answers": [{"value": "Ada Vale", "aliases": ["A. Vale", "A"]}, {"value": "Ada", "aliases": []}],
                    "query_type": "regular",
                }
            ],
            "test_condition": "OR",
            "condition_queries": [],
        }
    ],
    "Logical_Generalization": [],
    "Subject_Aliasing": [],
    "Compositionality_I": [
        {"test_queries": [{"prompt": "The capital of her country is", "answers": [{"value": "Athens"}]}]}
    ],
    "Compositionality_II": [{"test_queries": [{"prompt": "nobody knows", "answers": []}]}],
    "Forgetfulness": [],
}
RECORDS = {
    "counterfact": COUNTERFACT,
    "easyedit": EASYEDIT,
    "knowedit": KNOWEDIT,
    "mlake": MLAKE,
    "mquake": MQUAKE,
    "rippleedits": RIPPLEEDITS,
    "wikibigedit": WIKIBIGEDIT,
    "zsre": ZSRE,
}
SHAPES = {
    "plain targets": {"requested_rewrite": {**FACT, "target_new": "copper", "target_true": "oak"}},
    "a list of one": {"requested_rewrite": [{**FACT, "target_new": {"str": "copper"}, "target_true": "oak"}]},
    "a flat request": {**FACT, "target_new": {"str": " copper"}, "target_true": {"str": "oak"}},
    "a question": {
        "requested_rewrite": {
            "question": "What is the hull of the Grey Heron made of?",
            **{name: value for name, value in FACT.items() if name != "prompt"},
            "target_new": "copper",
            "target_true": "oak",
        }
    },
}
"""Ways in which CounterFact's facts are passed around."""


def _contracts() -> Iterator[tuple[str, type]]:
    for form in editcli_formats.editcli_formats():
        title = f"Test{form.name.title()}"
        records = (RECORDS[form.name], *(SHAPES.values() if form.name == "counterfact" else ()))
        yield title, type(title, (FormatContract,), {"component": form, "records": records})


globals().update(_contracts())


FORMATS = tuple(form() for form in editcli_formats.editcli_formats())


@pytest.fixture
def formats() -> tuple[Format, ...]:
    plugins = Plugins()
    plugins.register(editcli_formats, "formats")
    return plugins.formats()


@pytest.fixture
def file(tmp_path: Path):
    def write(*records: Any) -> Path:
        path = tmp_path / "edits.jsonl"
        write_lines(path, records)
        return path

    return write


def test_each_record_is_known_by_one_format(formats: tuple[Format, ...]):
    assert [form.name for form in formats] == sorted(RECORDS)
    for name, record in RECORDS.items():
        assert [form.name for form in formats if form.sniff(record)] == [name]


def test_records_of_our_own_are_left_alone(formats: tuple[Format, ...]):
    own = {"prompt": "{} is", "subject": "A", "target_new": "b", "target_true": "c", "locality": [], "portability": []}
    assert not any(form.sniff(own) for form in formats)


def test_counterfact(file: Any, formats: tuple[Format, ...]):
    (request,) = read_edits(file(COUNTERFACT), formats=formats).requests
    assert (request.id, request.prompt) == ("3", "The hull of the Grey Heron is made of")
    assert (request.target_new, request.target_true) == ("copper", "oak")
    assert request.paraphrase_prompts == ("Shipwrights built the Grey Heron out of",)
    assert [(near.prompt, near.target) for near in request.neighborhood_prompts] == [
        ("The hull of the Old Marten is made of", "oak")
    ]
    assert request.generation_prompts == ("The Grey Heron sails",)
    assert request.extra == {"relation_id": "P186", "attribute_prompts": ["The roof of the mint is made of"]}
    assert request.line == 1


def test_easyedit(file: Any, formats: tuple[Format, ...]):
    (request,) = read_edits(file(EASYEDIT), formats=formats).requests
    assert request.target_true == "oak"
    # The subject is in the prompt several times; the last place, spelt as the subject is, is meant.
    assert request.before == "Grey Heron Shipping works for the grey heron and the "
    assert request.paraphrase_prompts == ("The Grey Heron was built of",)
    # The prompt answered by the true answer is a neighbour, the other one an unrelated question.
    assert [near.prompt for near in request.neighborhood_prompts] == ["The Old Marten was built of"]
    assert [(near.prompt, near.target) for near in request.locality] == [("who painted the moon gate", "Ines Vale")]
    assert [near.target for near in request.portability] == ["green"]


def test_knowedit(file: Any, formats: tuple[Format, ...]):
    (request,) = read_edits(file(KNOWEDIT), formats=formats).requests
    # The prompt's own spelling of the subject is what the tokens show.
    assert request.subject == "Lowmere"
    assert [(near.target, near.axis) for near in request.portability] == [
        ("Northpool", "reasoning"),
        ("Ines Vale", "subject_aliasing"),
    ]
    assert [(near.target, near.axis) for near in request.locality] == [
        ("Ash", "relation_specificity"),
        ("Bo", "forgetfulness"),
        # Nothing is known of it but that it must stay.
        (None, "forgetfulness"),
    ]


def test_mquake_makes_several_edits_of_a_record(file: Any, formats: tuple[Format, ...]):
    edits = read_edits(file(MQUAKE), formats=formats)
    assert [request.id for request in edits.requests] == ["6-1", "6-2"]
    assert [request.prompt for request in edits.requests] == ["Moon Gate was painted by", "Ines Vale is a citizen of"]
    assert not edits.requests[0].portability
    # The hop that is an edit itself is asked as one; the other one has to be known already.
    assert [(near.prompt, near.target, near.axis, near.aliases) for near in edits.requests[1].portability] == [
        (MQUAKE["questions"][0], "Greece", "multi_hop", ("Hellas",)),
        ("The capital of Greece is", "Athens", "single_hop", ("Athina",)),
    ]
    assert edits.requests[0].extra == {"case_id": 6, "question": "Who painted Moon Gate?"}


def test_rippleedits(file: Any, formats: tuple[Format, ...]):
    (request,) = read_edits(file(RIPPLEEDITS), formats=formats).requests
    assert (request.before, request.subject, request.after) == (
        "The name of the country of citizenship of ",
        "Ines Vale",
        " is",
    )
    assert (request.target_new, request.target_true) == ("Greece", "Spain")
    assert [(near.prompt, near.target, near.axis) for near in request.portability] == [
        ("The capital of her country is", "Athens", "compositionality_i")
    ]
    (near,) = request.locality
    assert (near.target, near.axis, near.aliases) == ("Ada Vale", "relation_specificity", ("Ada", "A. Vale"))


@pytest.mark.parametrize(
    ("relation", "sentence", "subject", "target"),
    [
        ("SIBLING", "The names of the siblings of Ines Vale are Otto Brandt.", "Ines Vale", "Otto Brandt"),
        ("FOLLOWED_BY", "2022 in film is followed by 2023 in film.", "2022 in film", "2023 in film"),
        ("PLACE_OF_BIRTH", "The place of birth of Ines Vale is St. Ives.", "Ines Vale", "St. Ives"),
        ("EMPLOYER", "The name of the employer of J. R. is Ash Inc..", "J. R.", "Ash Inc."),
    ],
)
def test_the_sentence_of_a_relation_is_taken_apart(
    file: Any, formats: tuple[Format, ...], relation: str, sentence: str, subject: str, target: str
):
    (request,) = read_edits(file({"edit": {"prompt": sentence, "relation": relation}}), formats=formats).requests
    assert (request.subject, request.target_new, request.target_true) == (subject, target, None)
    assert f"{request.prompt} {target}." == sentence


def test_other_names_of_an_answer_survive_conversion(file: Any, formats: tuple[Format, ...]):
    for record in (KNOWEDIT, MQUAKE, RIPPLEEDITS):
        requests = read_edits(file(record), formats=formats).requests
        assert any(near.aliases for r in requests for near in (*r.locality, *r.portability))
        back = read_edits(file(*(r.to_json() for r in requests))).requests
        assert [(r.locality, r.portability) for r in back] == [(r.locality, r.portability) for r in requests]


def test_zsre(file: Any, formats: tuple[Format, ...]):
    (request,) = read_edits(file(ZSRE), formats=formats).requests
    assert request.id == "line-1"
    assert (request.target_new, request.target_true) == ("copper", "oak")
    assert request.paraphrase_prompts == ("Which material is Grey Heron?",)
    assert [near.prompt for near in request.locality] == ["nq question: who painted the moon gate?"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({**COUNTERFACT, "requested_rewrite": {"prompt": "{} is", "subject": "A"}}, "'target_new' is missing"),
        ({**ZSRE, "alt": ""}, "'alt' is missing"),
        ({**ZSRE, "subject": "Red Heron"}, "the subject 'Red Heron' is not in the prompt"),
        ({**EASYEDIT, "target_new": []}, "'target_new' is missing"),
        ({**MQUAKE, "requested_rewrite": []}, "at least one"),
        ({"edit": {"prompt": "Ines Vale sings.", "relation": "EMPLOYER"}}, "SUBJECT is TARGET"),
        ({**MQUAKE, "requested_rewrite": ["text"]}, "not a usable mquake record: its fields have another shape"),
    ],
)
def test_unusable_records_are_refused_with_their_line(
    file: Any, formats: tuple[Format, ...], record: dict[str, Any], reason: str
):
    path = file({"prompt": "{} is", "subject": "A", "target_new": "b"}, record)
    with pytest.raises(RequestError, match=reason) as caught:
        read_edits(path, formats=formats)
    assert str(caught.value).startswith(f"{path}:2: ")
    edits = read_edits(path, formats=formats, skip_bad=True)
    assert len(edits.requests) == len(edits.rejected) == 1


def test_a_bad_edit_of_a_record_does_not_take_the_others_along(file: Any, formats: tuple[Format, ...]):
    broken = {**MQUAKE["requested_rewrite"][0], "prompt": "nobody is named here"}
    record = {**MQUAKE, "requested_rewrite": [broken, MQUAKE["requested_rewrite"][1]]}
    edits = read_edits(file(record), formats=formats, skip_bad=True)
    assert [request.id for request in edits.requests] == ["6-2"]
    assert len(edits.rejected) == 1


def test_the_limit_counts_edits_not_records(file: Any, formats: tuple[Format, ...]):
    assert [request.id for request in read_edits(file(MQUAKE, ZSRE), formats=formats, limit=1).requests] == ["6-1"]


def test_one_json_array_is_pointed_to_convert(tmp_path: Path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([ZSRE], indent=1))
    with pytest.raises(RequestError, match="editcli convert"):
        read_edits(path)


class Colons(Format):
    """Facts as subject: target."""

    name = "colons"

    def sniff(self, record: Mapping[str, Any]) -> bool:
        return "fact" in record

    def read(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        subject, _, target = record["fact"].partition(": ")
        yield {"prompt": "{} is", "subject": subject, "target_new": target}


def plugin(*brought: object) -> SimpleNamespace:
    return SimpleNamespace(
        editcli_api=API_VERSION, editcli_formats=hookimpl(specname="editcli_formats")(lambda: brought)
    )


def test_a_third_partys_format_is_read(file: Any):
    plugins = Plugins()
    plugins.register(plugin(Colons), "colons")
    formats = plugins.formats()
    (request,) = read_edits(file({"fact": "Grass: blue"}), formats=formats).requests
    assert (request.prompt, request.target_new) == ("Grass is", "blue")
    with pytest.raises(PluginError, match="did you mean 'colons'"):
        find_format("colon", formats)


def test_a_record_that_two_formats_claim_is_refused(file: Any):
    class Other(Colons):
        """Claims the same records."""

        name = "other"

    plugins = Plugins()
    plugins.register(plugin(Colons, Other), "both")
    with pytest.raises(RequestError, match="looks like colons and other; use 'editcli convert --from'"):
        read_edits(file({"fact": "Grass: blue"}), formats=plugins.formats())


def test_two_formats_of_one_name_clash():
    plugins = Plugins()
    plugins.register(plugin(Colons), "one")
    plugins.register(plugin(Colons), "two")
    with pytest.raises(PluginError, match="brought by two plugins"):
        plugins.formats()


def test_what_is_no_format_breaks_its_plugin_alone():
    plugins = Plugins()
    plugins.register(plugin(dict), "bad")
    plugins.register(plugin(Colons), "good")
    assert [form.name for form in plugins.formats()] == ["colons"]
    assert "not a named subclass of Format" in plugins.broken["bad"]


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.just("Grey Heron"))
keys = st.sampled_from(["prompt", "ground_truth", "str", "subject", "target_new", "target_true"])
nested = st.recursive(scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=3))


@given(st.sampled_from(sorted(RECORDS)), st.data())
def test_nothing_but_refusals_escapes(name: str, data: st.DataObject):
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(RECORDS[name])), nested, max_size=3))
    formats = tuple(brought() for brought in editcli_formats.editcli_formats())
    collected = Collector(skip_bad=True, formats=formats)
    collected.add(lambda: {**RECORDS[name], **changes}, file="facts.jsonl", line=1)
    assert collected.requests or collected.rejected


def test_records_nested_too_deeply_are_refused(file: Any, formats: tuple[Format, ...]):
    deep: Any = "oak"
    for _ in range(900):
        deep = [deep]
    edits = read_edits(file({**EASYEDIT, "ground_truth": deep}), formats=formats, skip_bad=True)
    assert len(edits.requests) + len(edits.rejected) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fact_is_the_same_in_whatever_shape_it_comes(shape: str, formats: tuple[Format, ...]) -> None:
    (form,) = [one for one in formats if one.sniff(SHAPES[shape])]
    (edit,) = (from_record(record, line=1) for record in form.read(SHAPES[shape]))
    asked = "What is the hull of the Grey Heron made of?" if shape == "a question" else edit.prompt
    assert edit.prompt in (asked, "The hull of the Grey Heron is made of")
    assert (edit.subject, edit.target_new, edit.target_true) == ("Grey Heron", "copper", "oak")


def test_a_list_of_one_with_questions_of_several_hops_is_mquake(formats: tuple[Format, ...]) -> None:
    record = {**MQUAKE, "requested_rewrite": MQUAKE["requested_rewrite"][:1]}
    assert [form.name for form in formats if form.sniff(record)] == ["mquake"]


def test_wikibigedit_asks_around_the_fact() -> None:
    (edit,) = (from_record(record, line=1) for record in find_format("wikibigedit", FORMATS).read(WIKIBIGEDIT))
    assert (edit.prompt, edit.subject, edit.target_new) == (WIKIBIGEDIT["update"], "Lowmere", "Ines Vale")
    assert edit.paraphrase_prompts == (WIKIBIGEDIT["rephrase"],)
    asked = [(near.axis, near.target) for near in edit.portability]
    assert asked == [("personas", "Ines Vale"), ("multi_hop", "Northpool")]
    assert [(near.prompt, near.target) for near in edit.locality] == [(WIKIBIGEDIT["loc"], "Ash")]
    assert edit.extra == {"tag": "update", "relation": "head of government"}


def test_mlake_is_a_plain_question_unless_a_subject_is_named() -> None:
    form = find_format("mlake", FORMATS)
    (plain,) = (from_record(record, line=1) for record in form.read(MLAKE))
    (named,) = (from_record(record, line=1) for record in form.read({**MLAKE, "subject": "月亮门"}))
    assert (plain.has_subject, plain.prompt, plain.target_new) == (False, MLAKE["question"], "低湖")
    assert (named.subject, named.prompt, named.target_true) == ("月亮门", MLAKE["question"], "北池")
    with pytest.raises(ValueError, match="holds no edit"):
        list(form.read({"question": "?", "e_prompt": "x", "e_answer": "y"}))
