"""The tiny models and the tokenizer that tests and plugin authors build on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from editcli.testing import (
    BOS,
    CHAT_TEMPLATE,
    HIDDEN,
    tiny_config,
    tiny_model,
    tiny_model_folder,
    tiny_tokenizer,
    vocabulary_size,
)

TEXT = "The capital of France, naïvely, is\tParis"


def test_any_text_comes_back_and_offsets_point_into_it() -> None:
    tokenizer = tiny_tokenizer()
    encoded = tokenizer(TEXT, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == TEXT
    pieces = {TEXT[start:stop] for start, stop in encoded["offset_mapping"]}
    assert {" capital", " France"} <= pieces
    assert "Paris" not in pieces
    assert len(tokenizer) == vocabulary_size()


@pytest.mark.parametrize("bos", [True, False])
def test_texts_begin_with_a_special_token_only_when_asked(bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    assert (tokenizer(TEXT)["input_ids"][0] == tokenizer.convert_tokens_to_ids(BOS)) == bos


def test_chat_template_and_padding_side_survive_saving(tmp_path: Path) -> None:
    tiny_tokenizer(padding_side="left", chat_template=CHAT_TEMPLATE).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.padding_side == "left"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered == "[user] Hi\n"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_same_arguments_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = tiny_model_folder(tmp_path / "one", name)
    torch.manual_seed(2)
    other = tiny_model_folder(tmp_path / "other", name)
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in other.iterdir())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


def test_another_seed_gives_another_model() -> None:
    one, other = (tiny_model(seed=seed).get_input_embeddings().weight for seed in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("shards", [2, 4])
def test_shards(shards: int, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, shards=shards)
    assert len(list(folder.glob("*.safetensors"))) >= shards
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tiny_model().state_dict().items())


def test_square_and_tied_and_any_other_key() -> None:
    config = tiny_config("gpt2", square=True, tied=False, n_layer=7)
    assert (config.n_inner, config.tie_word_embeddings, config.n_layer) == (HIDDEN, False, 7)


def test_no_vector_is_left_at_its_neutral_value() -> None:
    """A bias of zero or a gain of one would hide a part that forgets to apply it."""
    for name, parameter in tiny_model("phi").named_parameters():
        assert parameter.std() > 0.05, name
