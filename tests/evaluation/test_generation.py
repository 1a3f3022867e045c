"""Generated text depends on the prompt and the seed alone; fluency and consistency equal hand-computed cases."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from editcli.evaluation.generation import Generation, consistency, fluency, generate, ngram_entropy, text_entropy
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.testing import tiny_model_folder

PROMPTS = ("The capital of France", "Ann lives in London", "He", "The river of", "It was")


@pytest.fixture(params=["llama", "gpt2"])
def loaded(tmp_path: Path, request: pytest.FixtureRequest) -> LoadedModel:
    return open_model(resolve_model(tiny_model_folder(tmp_path / "model", request.param)), device="cpu")


def test_greedy_text_equals_a_plain_loop(loaded: LoadedModel):
    for prompt, found in generate(loaded, PROMPTS, tokens=8, top_k=1).items():
        ids = loaded.tokens.tokenizer(prompt)["input_ids"]
        written: list[int] = []
        for _ in range(8):
            logits = loaded.model(input_ids=torch.tensor([ids + written])).logits[0, -1]
            written.append(int(logits.argmax()))
        assert found.text == loaded.tokens.decode(written)


def test_neither_order_nor_batching_changes_a_text(loaded: LoadedModel):
    together = generate(loaded, PROMPTS, tokens=12)
    assert generate(loaded, PROMPTS[::-1], tokens=12, batch_tokens=1) == together
    assert generate(loaded, PROMPTS, tokens=12, seed=1) != together


def test_the_context_is_not_overrun(loaded: LoadedModel):
    assert loaded.tokens.max_length == 256
    found = generate(loaded, ["Ann" + " the" * 250], tokens=100)
    assert all(isinstance(item, Generation) for item in found.values())


def test_ngram_entropy_of_small_cases():
    assert ngram_entropy("abab", 2) == pytest.approx(-(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3)))
    assert ngram_entropy("aaaa", 2) == 0
    assert ngram_entropy("abcde", 2) == pytest.approx(2)


def test_text_entropy_weighs_bigrams_and_trigrams():
    # Four distinct bigrams (2 bits) and three distinct trigrams.
    assert text_entropy("a b c d e") == pytest.approx((2 * 2 / 3 + math.log2(3) * 4 / 3) / 2)
    assert text_entropy("no no no no no no") == 0
    assert text_entropy("two words") is None


def test_fluency_is_the_mean_over_texts():
    assert fluency({"a": ["a b c d e", "no no no no"], "b": ["one"]}) == pytest.approx(
        (2 * 2 / 3 + math.log2(3) * 4 / 3) / 4
    )
    assert fluency({"a": []}) is None


def test_consistency_of_small_cases():
    assert consistency({"a": ["red fox runs"]}, {"a": ["red fox runs"]}) == pytest.approx(1)
    assert consistency({"a": ["blue sea"]}, {"a": ["red fox"]}) == 0
    assert consistency({"a": ["blue sea"]}, {}) is None
    # 'fox' is in both references and weighs 1 + ln(3/3) = 1; 'red' and 'old' are in one each.
    rare = 1 + math.log(3 / 2)
    found = consistency({"a": ["red fox"], "b": ["fox"]}, {"a": ["red fox"], "b": ["old fox"]})
    assert found == pytest.approx((1 + 1 / math.hypot(1, rare)) / 2)
