"""What stands between a prompt and its target: what the text says, else what the scripts of both ask for."""

from __future__ import annotations

import pytest

from editcli.commands.check import check_edit
from editcli.evaluation.admission import Gate
from editcli.models.tokens import Tokens, wants_space
from editcli.requests.schema import from_record
from editcli.settings.core import TargetOptions
from editcli.testing import PlainEditor, tiny_tokenizer

SPACED = [
    ("The capital is", "Rome"),
    ("Which city is it?", "Rome"),
    ("Answer:", "Rome"),
    ("수도는", "서울"),
    ("السؤال", "باريس"),
    ("दिल्ली है।", "हाँ"),
    ("The price is", "$5"),
    ("It is", "-5"),
    ("He said", '"yes"'),
    ("He said", "\u201cyes\u201d"),
    ("The word is", "(a noun)"),
    ("The Beatles'", "manager"),
    ("Paris -", "Rome"),
    ("x =", "5"),
    ("I love", "\U0001f355"),
    ("In 1984", "he"),
]
TOGETHER = [
    ("法国的首都是", "里昂"),
    ("法国的首都是。", "里昂"),
    ("法国的首都是?", "里昂"),
    ("東京は", "トウキョウ"),
    ("ประเทศไทย", "กรุงเทพ"),
    ("ភ្នំពេញ", "កម្ពុជា"),
    ("他出生于1984", "年"),
    ("I live in Paris", ", Texas"),
    ("I live in Paris", "."),
    ("I live in Paris", "'s suburbs"),
    ("It grew by 5", "%"),
    ("He wrote (", "in Rome"),
    ('He said "', "yes"),
    ('He said "yes', '" twice'),
    ("It costs $", "5"),
    ("La capitale de l'", "Italie"),
    ("La capitale de l\u2019", "Italie"),
    ("Franco-", "German"),
    ("1914", "-1918"),
    ("well", "-known"),
    ("<assistant>", "Rome"),
    ("Q: Where?", "\nA: Rome"),
    ("Where? ", "Rome"),
]


@pytest.mark.parametrize(("prompt", "target"), SPACED)
def test_words_of_scripts_that_use_spaces_are_kept_apart(prompt: str, target: str) -> None:
    assert wants_space(prompt, target)
    assert Tokens(tiny_tokenizer()).join(prompt, target) == (f"{prompt} {target}", len(prompt) + 1)


@pytest.mark.parametrize(("prompt", "target"), TOGETHER)
def test_anything_else_follows_at_once(prompt: str, target: str) -> None:
    assert not wants_space(prompt, target)
    assert Tokens(tiny_tokenizer()).join(prompt, target) == (prompt + target, len(prompt))


@pytest.mark.parametrize(
    ("prompt", "target", "between", "text"),
    [
        ("The capital is", "Rome", "", "The capital isRome"),
        ("法国的首都是", "里昂", " ", "法国的首都是 里昂"),
        ("The capital is", " Rome ", "\n", "The capital is\n Rome "),
        ("法国的首都是", " Lyon", None, "法国的首都是 Lyon"),
        ("The capital is", "Rome\n", None, "The capital is Rome\n"),
    ],
)
def test_the_text_decides_where_it_says_so(prompt: str, target: str, between: str | None, text: str) -> None:
    joined, start = Tokens(tiny_tokenizer()).join(prompt, target, between=between)
    assert joined == text
    assert joined[start:] == (target if between is not None else target.strip(" "))


def test_the_joint_of_a_record_is_what_is_written_and_asked() -> None:
    tokens = Tokens(tiny_tokenizer())
    fact = from_record({"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome", "join": "\n"})
    gate = Gate(tokens, PlainEditor(), TargetOptions())
    (encoded,) = tokens.encode([tokens.locate(fact, "Rome")])
    assert tokens.decode(encoded.ids).endswith("France is\nRome")
    assert check_edit(fact, gate).joint == "\n"


@pytest.mark.parametrize("target", ["里昂", "é里", "\U0001f355"])
def test_check_shows_characters_where_tokens_are_bytes(target: str) -> None:
    tokens = Tokens(tiny_tokenizer())
    fact = from_record({"prompt": "{}的首都是", "subject": "法国", "target_new": target})
    edit = check_edit(fact, Gate(tokens, PlainEditor(), TargetOptions()))
    assert edit.target == tuple(target)
    assert edit.target_length == len(target.encode())
    assert (edit.lookup, edit.joint) == ("国", "")
