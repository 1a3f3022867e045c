"""Perplexity and divergence equal a plain computation; a model does not drift from itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from editcli.errors import ModelError
from editcli.evaluation.ability import compare_logits, general_drift
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.models.tokens import Tokens
from editcli.testing import tiny_model_folder, tiny_tokenizer

Tiny = Callable[..., LoadedModel]
TEXTS = ("The capital city of France is Paris and the river is located in the country", "Ann wrote", "It")


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    def load(family: str = "llama", *, seed: int = 0) -> LoadedModel:
        folder = tiny_model_folder(tmp_path / f"{family}-{seed}", family, seed=seed)
        return open_model(resolve_model(folder), device="cpu")

    return load


def plain(loaded: LoadedModel, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([loaded.tokens.tokenizer(text)["input_ids"]])
    return loaded.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1), ids[0, 1:]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_drift_equals_a_plain_computation(tiny: Tiny, family: str):
    edited, base = tiny(family, seed=1), tiny(family, seed=2)
    found = general_drift(edited, base, TEXTS, batch_tokens=30)
    nll, nll_base, kl, tokens = 0.0, 0.0, 0.0, 0
    for text in TEXTS:
        (ours, wanted), (theirs, _) = plain(edited, text), plain(base, text)
        nll -= float(ours.gather(1, wanted[:, None]).sum())
        nll_base -= float(theirs.gather(1, wanted[:, None]).sum())
        kl += float((theirs.exp() * (theirs - ours)).sum())
        tokens += len(wanted)
    assert found.tokens == tokens
    assert found.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert found.perplexity_base == pytest.approx(math.exp(nll_base / tokens), rel=1e-5)
    assert found.kl == pytest.approx(kl / tokens, rel=1e-4)


def test_a_model_does_not_drift_from_itself(tiny: Tiny):
    loaded = tiny()
    found = general_drift(loaded, loaded, TEXTS)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.perplexity == found.perplexity_base


def test_kl_of_two_coins():
    base, edited = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    expected = [-math.log(0.75), -math.log(0.5), 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)]
    assert compare_logits(edited, base, torch.tensor([0])).tolist() == pytest.approx(expected, abs=1e-6)


def test_only_so_many_tokens_are_read(tiny: Tiny):
    loaded = tiny()
    assert general_drift(loaded, loaded, TEXTS, max_tokens=10, max_length=4).tokens == 3 + 3 + 1


def test_no_text_is_refused(tiny: Tiny):
    loaded = tiny()
    with pytest.raises(ModelError, match="--text"):
        general_drift(loaded, loaded, [])


def test_another_tokenizer_is_refused(tiny: Tiny):
    loaded = tiny()
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    other = LoadedModel(loaded.model, Tokens(tokenizer), loaded.architecture, loaded.source)
    with pytest.raises(ModelError, match="different tokenizers"):
        general_drift(other, loaded, TEXTS)
