"""The choice between listed answers depends on the answers, not on their place; figures equal hand-computed cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from editcli.evaluation.choice import LETTERS, Choice, Choosing, choose, listing, rotations, summarize_choice
from editcli.models.architectures import resolve
from editcli.models.loading import LoadedModel, ModelSource, open_model, resolve_model
from editcli.models.tokens import Tokens
from editcli.testing import tiny_model, tiny_tokenizer

QUESTION = Choosing("The capital of France is", "Rome", "Paris")
SECOND = Choosing("The author of Hamlet is", "Jane Austen", "William Shakespeare")


@pytest.fixture(scope="module")
def bundled() -> LoadedModel:
    return open_model(resolve_model(None), device="cpu")


def test_every_answer_stands_once_in_every_place():
    assert rotations(("a", "b")) == [("a", "b"), ("b", "a")]
    for place in range(3):
        assert {answers[place] for answers in rotations(("a", "b", "c"))} == {"a", "b", "c"}
    assert listing("p ", ("x", "y")) == "p\nA. x\nB. y\nAnswer:"


def test_scores_equal_a_plain_pass_over_each_list(bundled: LoadedModel):
    choice = choose(bundled, [QUESTION, SECOND])[QUESTION]
    ids = [bundled.tokens.tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in LETTERS]

    def plain(answers: tuple[str, ...]) -> torch.Tensor:
        text = bundled.tokens.tokenizer(listing(QUESTION.prompt, answers), return_tensors="pt")["input_ids"]
        logits = bundled.model(input_ids=text).logits[0, -1].double()
        return logits[ids[: len(answers)]].log_softmax(0)

    first, turned = plain(("Rome", "Paris")), plain(("Paris", "Rome"))
    assert choice.new_of_two == pytest.approx(float(first[0] + turned[1]) / 2, abs=1e-4)
    assert choice.old_of_two == pytest.approx(float(first[1] + turned[0]) / 2, abs=1e-4)
    assert choice.consistent == ((first[0] > first[1]) == (turned[1] > turned[0]))
    three = [plain(answers) for answers in rotations(("Rome", "Paris", "unsure"))]
    assert choice.unsure_of_three == pytest.approx(float(three[0][2] + three[1][1] + three[2][0]) / 3, abs=1e-4)


def test_order_and_batches_change_no_choice(bundled: LoadedModel):
    together = choose(bundled, [QUESTION, SECOND])
    apart = choose(bundled, [SECOND]) | choose(bundled, [QUESTION], batch_tokens=1)
    for question, choice in together.items():
        for name, value in choice.to_json().items():
            assert apart[question].to_json()[name] == pytest.approx(value, abs=1e-5), name


def test_old_and_new_change_places_with_the_question(bundled: LoadedModel):
    turned = Choosing(QUESTION.prompt, QUESTION.old, QUESTION.new)
    there, back = choose(bundled, [QUESTION])[QUESTION], choose(bundled, [turned])[turned]
    assert there.new_of_two == pytest.approx(back.old_of_two, abs=1e-5)


def test_figures_equal_a_hand_computed_case():
    def choice(new: float, old: float, consistent: bool, *three: float) -> Choice:
        return Choice(new, old, consistent, *three)

    choices = [
        choice(-0.1, -2, True, -0.2, -2, -3),
        choice(-2, -0.1, False, -2, -3, -0.2),
        choice(-1, -1, False, -1, -0.5, -2),
        choice(-0.1, -2, True, -1, -1, -2),
    ]
    assert summarize_choice(choices) == {
        # The third is a tie: nobody wins.
        "two_new": 0.5,
        "two_consistent": 0.5,
        "three_new": 0.25,
        "three_old": 0.25,
        "three_unsure": 0.25,
    }
    assert set(summarize_choice([]).values()) == {None}


def test_a_question_that_cannot_be_shown_is_left_out(bundled: LoadedModel):
    """Its lists are longer than the context, or the tokenizer reads every letter as its mark for unknown text."""
    long = Choosing("word " * 600, "Rome", "Paris")
    assert set(choose(bundled, [long, QUESTION])) == {QUESTION}
    assert choose(bundled, []) == {}
    model = tiny_model("llama")
    tokens = Tokens(tiny_tokenizer(), max_length=8)
    assert choose(LoadedModel(model, tokens, resolve(model), ModelSource("tiny", Path())), [QUESTION]) == {}
