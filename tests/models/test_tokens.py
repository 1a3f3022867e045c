"""The subject's last token and the target's tokens, by offsets."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizer

from editcli.errors import ModelError, RequestError
from editcli.models.tokens import Encoded, Tokens
from editcli.requests.schema import EditRequest, from_record
from editcli.testing import CHAT_TEMPLATE, tiny_tokenizer


def request(prompt: str, subject: str, target: str = "Rome") -> EditRequest:
    return from_record({"prompt": prompt, "subject": subject, "target_new": target}, file="facts.jsonl", line=7)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("prompt", "subject"),
    [("The capital of {} is", "France"), ("{} works as a", "Ann Smith"), ("In the city, {} is", "Łódź Kraków")],
)
def test_lookup_is_the_subjects_last_token(bos: bool, side: str, prompt: str, subject: str) -> None:
    tokens = Tokens(tiny_tokenizer(bos=bos, padding_side=side))
    fact = request(prompt, subject)
    (encoded,) = tokens.encode([tokens.locate(fact, "Rome")])
    # Byte-level tokens decode back to text, so the text up to the lookup token must end with the subject.
    assert tokens.decode(encoded.ids[: encoded.lookup + 1]).strip().endswith(subject)
    assert not tokens.decode(encoded.ids[: encoded.lookup]).strip().endswith(subject)
    assert tokens.decode(encoded.target_ids).strip() == "Rome"
    assert encoded.target.stop == len(encoded.ids)
    assert list(encoded.predicting) == [position - 1 for position in encoded.target]


def test_a_prefix_moves_the_lookup_token_and_nothing_else() -> None:
    tokens = Tokens(tiny_tokenizer())
    fact = request("The capital of {} is", "France")
    bare, prefixed = tokens.encode([tokens.locate(fact), tokens.locate(fact.in_context("It is on the river. "))])
    assert prefixed.lookup > bare.lookup
    assert prefixed.ids[prefixed.lookup] == bare.ids[bare.lookup]
    assert prefixed.up_to_lookup().ids[-1] == bare.ids[bare.lookup]


def test_a_target_gets_one_space_unless_there_is_one() -> None:
    tokens = Tokens(tiny_tokenizer())
    assert tokens.join("The capital is", "Rome") == ("The capital is Rome", 15)
    assert tokens.join("The capital is", "  Rome ") == ("The capital is Rome", 15)
    assert tokens.join("The capital is ", "Rome") == ("The capital is Rome", 15)


def test_a_space_with_a_token_of_its_own_belongs_to_the_target() -> None:
    """A model that is asked the bare prompt has to say that space, so it is optimised and scored."""
    tokens = Tokens(tiny_tokenizer())
    fact = request("The capital of {} is", "France", "1984")
    (encoded,) = tokens.encode([tokens.locate(fact, "1984")])
    (bare,) = tokens.encode([tokens.locate(fact)])
    assert tokens.decode(encoded.target_ids) == " 1984"
    assert encoded.ids == (*bare.ids, *encoded.target_ids)


def test_a_tokenizer_that_drops_spaces_gets_none() -> None:
    tokenizer = tiny_tokenizer()
    from tokenizers import Regex, normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(" +"), "")
    assert Tokens(tokenizer).join("ab", "c") == ("abc", 2)


def test_padding_is_the_rows_own_last_token() -> None:
    tokens = Tokens(tiny_tokenizer())
    rows = tokens.encode(
        [tokens.locate(request("{} is", "Bob")), tokens.locate(request("The capital of {} is", "France"))]
    )
    padded = tokens.pad(rows, "cpu").tolist()
    assert len(padded[0]) == len(padded[1])
    assert padded[0][: len(rows[0].ids)] == list(rows[0].ids)
    assert set(padded[0][len(rows[0].ids) :]) == {rows[0].ids[-1]}


def test_the_chat_template_is_rendered_around_the_prompt() -> None:
    tokens = Tokens(tiny_tokenizer(chat_template=CHAT_TEMPLATE), chat_template=True)
    fact = request("The capital of {} is", "France")
    text = tokens.locate(fact, "Rome")
    assert text.text == "[user] The capital of France is\n[assistant] Rome"
    assert text.subject is not None
    assert text.text[slice(*text.subject)] == "France"
    assert text.target is not None
    assert text.text[slice(*text.target)] == "Rome"


def test_a_missing_chat_template_is_one_sentence() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        Tokens(tiny_tokenizer(), chat_template=True)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow(PreTrainedTokenizer):
        is_fast = False

        def __init__(self) -> None:
            """Leave everything out: the refusal comes before anything is asked of it."""

    with pytest.raises(ModelError, match="fast tokenizer"):
        Tokens(Slow())


class TestCheck:
    def test_a_usable_request_passes(self) -> None:
        assert Tokens(tiny_tokenizer(), max_length=64).check(request("The capital of {} is", "France")).target

    def test_a_prompt_longer_than_the_context(self) -> None:
        with pytest.raises(RequestError, match=r"^facts.jsonl:7: prompt and target have \d+ tokens, more than .* 8$"):
            Tokens(tiny_tokenizer(), max_length=8).check(request("The river of the city of {} is", "France"))

    def test_a_target_that_vanishes_in_tokenisation(self) -> None:
        tokenizer = tiny_tokenizer()
        from tokenizers import normalizers

        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
        with pytest.raises(RequestError, match="empty after tokenisation"):
            Tokens(tokenizer).check(request("The capital of {} is", "France", "\u200b"))

    def test_a_subject_that_vanishes_in_tokenisation(self) -> None:
        tokenizer = tiny_tokenizer()
        from tokenizers import normalizers

        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
        with pytest.raises(RequestError, match="has no token of its own"):
            Tokens(tokenizer).check(request("The capital of {} is", "~"))


@pytest.mark.parametrize(("context", "columns"), [(None, 64), (1024, 64), (41, 41), (30, 37)])
def test_an_accelerator_reads_texts_of_few_lengths_within_the_context(context: int | None, columns: int) -> None:
    """A model without a limit has few lengths as well; a text that is longer than the limit stays whole."""
    tokens = Tokens(tiny_tokenizer(), max_length=context)
    rows = [Encoded(tuple(range(length)), 0, range(0)) for length in (3, 37)]
    assert tokens.pad(rows, "meta").shape == (2, columns)
    assert tokens.pad(rows, "cpu").shape == (2, 37)
