"""A text that a model writes depends on its prompt alone, and ends where a rule says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from editcli.evaluation import writing
from editcli.evaluation.writing import Written, end_tokens, write_freely
from editcli.models.architectures import resolve
from editcli.models.loading import LoadedModel, ModelSource, open_model, resolve_model
from editcli.models.tokens import Tokens
from editcli.settings.stopping import StopRules
from editcli.testing import tiny_model, tiny_tokenizer
from tests.support.families import families

PROMPTS = (
    *("The capital of France", "Ann lives in London", "He", "The river of", "It was", "Bob wrote the book of the"),
    "The author of the book that Ann wrote in the city of London is located in the country of the river",
)
LONG = StopRules(most=12, stop=())


def tiny(family: str, **options: object) -> LoadedModel:
    model = tiny_model(family, **options)  # pyright: ignore[reportArgumentType]
    tokens = Tokens(tiny_tokenizer(bos=not family.startswith("gpt")), max_length=256)
    return LoadedModel(model.requires_grad_(False), tokens, resolve(model), ModelSource("tiny", Path()))


def texts(written: Mapping[str, Written]) -> dict[str, tuple[str, int, str]]:
    return {prompt: (one.text, one.tokens, one.ending) for prompt, one in written.items()}


@pytest.fixture(scope="module")
def bundled() -> LoadedModel:
    return open_model(resolve_model(None), device="cpu")


@pytest.mark.parametrize("family", families())
def test_a_text_is_the_greedy_one_of_a_plain_loop(family: str):
    loaded = tiny(family)
    for prompt, one in write_freely(loaded, PROMPTS, LONG).items():
        ids = loaded.tokens.tokenizer(prompt)["input_ids"]
        plain: list[int] = []
        while len(plain) < 12 and (not plain or plain[-1] not in end_tokens(loaded)):
            logits = loaded.model(input_ids=torch.tensor([ids + plain])).logits[0, -1]
            plain.append(int(logits.argmax()))
        assert one.tokens == len(plain)
        assert one.text == loaded.tokens.decode([id for id in plain if id not in end_tokens(loaded)]).strip()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_neither_order_nor_padding_nor_batches_change_a_text(family: str, monkeypatch: pytest.MonkeyPatch):
    loaded = tiny(family)
    together = texts(write_freely(loaded, PROMPTS, LONG))
    assert texts(write_freely(loaded, PROMPTS[::-1], LONG)) == together
    assert {p: texts(write_freely(loaded, [p], LONG))[p] for p in PROMPTS} == together
    monkeypatch.setattr(writing, "ROWS", 2)
    assert texts(write_freely(loaded, PROMPTS, LONG)) == together
    monkeypatch.setattr(writing, "WIDTH", 0)
    assert texts(write_freely(loaded, PROMPTS, LONG)) == together


def test_a_close_call_is_decided_by_the_prompt_alone(monkeypatch: pytest.MonkeyPatch):
    """All logits are equal, so every token is a close call, and the lowest id is taken in every batch."""
    loaded = tiny("llama")
    head = loaded.model.get_output_embeddings()
    head.weight.zero_()
    alone: list[int] = []
    real = writing._Writer._continue

    def counted(self: writing._Writer, rows: list) -> list:
        alone.append(len(rows))
        return real(self, rows)

    monkeypatch.setattr(writing._Writer, "_continue", counted)
    written = write_freely(loaded, PROMPTS[:3], LONG)
    assert all(one.close for one in written.values())
    assert {one.text for one in written.values()} == {loaded.tokens.decode([0] * 12).strip()}
    # Each of the three was written again in a batch of its own.
    assert alone.count(1) >= 3


def test_the_fewest_and_the_most_tokens_are_kept(bundled: LoadedModel):
    prompt = "The capital of France is"
    (free,) = write_freely(bundled, [prompt]).values()
    assert (free.text, free.ending) == ("Paris.", "end")
    (long,) = write_freely(bundled, [prompt], StopRules(most=9, least=6)).values()
    assert 6 <= long.tokens <= 9
    assert long.text.startswith("Paris.")
    (short,) = write_freely(bundled, [prompt], StopRules(most=1)).values()
    assert (short.text, short.tokens, short.ending) == ("Paris", 1, "length")


def test_the_end_of_the_context_ends_a_text():
    loaded = tiny("llama")
    (one,) = write_freely(loaded, ["Ann" + " the" * 250], StopRules(most=100, stop=())).values()
    assert one.tokens <= 5


def test_the_models_generation_settings_name_more_ends(bundled: LoadedModel):
    own = bundled.tokens.tokenizer.eos_token_id
    assert end_tokens(bundled) == {own}
    loaded = tiny("llama")
    loaded.model.generation_config.eos_token_id = [5, 7]
    assert {5, 7} <= end_tokens(loaded)
