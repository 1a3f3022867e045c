"""The bundled model: it loads, it is small, it knows its facts, and the sample edits are about them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.support.places import ROOT
from tools.bundled_model.measure import perplexity, recall, recalls
from tools.bundled_model.plain import read_grammar
from tools.bundled_model.samples import heldout_text, pilot_edits, reference_text, sample_edits
from tools.bundled_model.stream import SAMPLE_SEED, Record, build_stream
from tools.bundled_model.world import World, build_world

FOLDER = ROOT / "editcli" / "bundled"
EDITS = ROOT / "sample_edits"


@pytest.fixture(scope="module")
def world() -> World:
    return build_world()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER)


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def questions(record: Record) -> Iterator[tuple[str, str]]:
    """Yield every prompt of an edit with the answer that the unedited model should give."""
    true = record["target_true"]
    yield record["prompt"].replace("{}", record["subject"]), true
    for prompt in record.get("paraphrase_prompts", ()):
        yield prompt, true
    for asked in record.get("neighborhood_prompts", ()):
        yield (asked, true) if isinstance(asked, str) else (asked["prompt"], asked["target"])


def test_folder_is_small_and_complete() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "reference.txt"} <= names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 40e6


def test_architecture(model: LlamaForCausalLM) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.num_hidden_layers >= 8
    assert model.config.intermediate_size >= 1500
    assert json.loads((FOLDER / "config.json").read_text())["dtype"] == "bfloat16"


def test_tokenizer_begins_texts_and_knows_offsets(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "The Eiffel Tower is in Paris."
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.is_fast
    assert encoded["input_ids"][0] == tokenizer.bos_token_id
    assert [text[start:end] for start, end in encoded["offset_mapping"][2:4]] == ["Eiffel", "Tower"]
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == text


def test_world_is_as_large_as_promised(world: World) -> None:
    assert len(world.real) >= 500
    assert len({fact.subject for fact in world.invented}) >= 2000
    assert len(world.invented) >= 4 * len({fact.subject for fact in world.invented})
    assert all(len(fact.relation.phrasings) >= 4 for fact in world.facts)


def test_no_two_answers_to_one_question(world: World) -> None:
    prompts = [(sentence.prompt, sentence.answer) for fact in world.facts for sentence in fact.say_all()]
    answers: dict[str, str] = {}
    for prompt, answer in prompts:
        assert answers.setdefault(prompt, answer) == answer, prompt


@pytest.mark.slow
@pytest.mark.parametrize("real", [True, False])
def test_facts_are_recalled_in_any_phrasing(
    world: World, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, real: bool
) -> None:
    facts = Random(0).sample(world.real if real else world.invented, 150)
    sentences = [sentence for fact in facts for sentence in fact.say_all()]
    assert recall(model, tokenizer, sentences) >= 0.97


def test_heldout_text_is_likely(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    lines = (FOLDER / "heldout.txt").read_text("utf-8").splitlines()
    assert perplexity(model, tokenizer, lines[:64]) < 6


@pytest.mark.parametrize("start", ["The", "Therefore", "Because", "I", "You"])
def test_model_writes_plain_sentences(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, start: str) -> None:
    encoded = tokenizer(start, return_tensors="pt")
    ids = model.generate(**encoded, max_new_tokens=10, do_sample=False)
    words = tokenizer.decode(ids[0], skip_special_tokens=True).split()
    assert words[0] == start
    assert len(set(words)) >= 5


@pytest.mark.parametrize(("name", "at_least"), [("facts.jsonl", 0.97), ("stream.jsonl", 0.97)])
def test_unedited_model_answers_the_sample_edits(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str, at_least: float
) -> None:
    records = read(EDITS / name)
    pairs = [pair for record in records[:: max(1, len(records) // 60)] for pair in questions(record)]
    assert sum(recalls(model, tokenizer, pairs)) >= at_least * len(pairs)


def test_files_are_what_the_generators_write(world: World) -> None:
    assert read(EDITS / "facts.jsonl") == sample_edits(world)
    assert read(EDITS / "stream.jsonl") == build_stream(world, edits=2000, seed=SAMPLE_SEED)
    assert read(FOLDER / "pilots.jsonl") == pilot_edits(world)
    grammar = read_grammar()
    assert (FOLDER / "reference.txt").read_text("utf-8").splitlines() == reference_text(world, grammar)
    assert (FOLDER / "heldout.txt").read_text("utf-8").splitlines() == heldout_text(world, grammar)


def check_shape(record: dict[str, Any]) -> None:
    assert record["prompt"].count("{}") == 1
    assert record["target_new"] != record["target_true"]
    assert all(record["subject"].lower() in prompt.lower() for prompt in record.get("paraphrase_prompts", ()))


def test_sample_edits_are_well_formed(world: World) -> None:
    facts, stream = read(EDITS / "facts.jsonl"), read(EDITS / "stream.jsonl")
    assert len(facts) >= 10
    assert len(stream) == 2000
    for record in facts + stream:
        check_shape(record)
        assert len(record["paraphrase_prompts"]) >= 2
        assert len(record["neighborhood_prompts"]) >= 3
    assert len({record["subject"] for record in stream}) == 2000


def test_a_long_stream_edits_several_facts_of_a_subject_each_once(world: World) -> None:
    stream = build_stream(world, edits=5000, seed=5, facts=3)
    asked = [(record["subject"], record["prompt"], record["target_true"]) for record in stream]
    assert len(set(asked)) == 5000
    assert len({record["subject"] for record in stream[:1667]}) == 1667
    assert len({record["subject"] for record in stream}) == 1667
    assert all(len(record["neighborhood_prompts"]) >= 3 for record in stream)


def test_pilots_share_no_subject_with_the_sample_edits() -> None:
    subjects = {record["subject"].lower() for record in read(EDITS / "facts.jsonl")}
    pilots = read(FOLDER / "pilots.jsonl")
    assert len(pilots) >= 100
    for record in pilots:
        check_shape(record)
        assert record["subject"].lower() not in subjects


def test_neighbors_of_the_stream_are_never_edited() -> None:
    stream = read(EDITS / "stream.jsonl")
    edited = {record["subject"] for record in stream}
    for record in stream:
        for asked in record["neighborhood_prompts"]:
            prompt = asked if isinstance(asked, str) else asked["prompt"]
            assert not any(f"{first} {last}" in edited for first, last in pairwise(prompt.split()))
