"""Scores equal a plain forward pass; metrics equal hand-computed cases; order and padding change nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from editcli.errors import OptionError, RequestError
from editcli.evaluation.metrics import Answer, Outcome, evaluate, harmonic, summarize
from editcli.evaluation.registry import paths, value_at
from editcli.evaluation.scoring import Probe, score
from editcli.models.architectures import resolve
from editcli.models.loading import LoadedModel, ModelSource, open_model, resolve_model
from editcli.models.tokens import Tokens
from editcli.requests.reader import read_edits
from editcli.requests.schema import EditRequest, from_record
from editcli.testing import tiny_model, tiny_tokenizer
from tests.support.places import SAMPLES

FAMILIES = ("llama", "gpt2", "gemma2", "granite", "olmo2")
"""A plain family, one with absolute positions, one that caps its logits, one that scales them, one with extra norms."""
STREAM = SAMPLES / "stream.jsonl"

PROBES = (
    Probe("The capital of France is", "Rome"),
    Probe("Ann was born in the", "London Berlin"),
    Probe("He", "lives in Tokyo with the author"),
    Probe("The river of the country that Bob wrote for is located in", "Italy"),
)


def tiny(family: str = "llama", **options: object) -> LoadedModel:
    model = tiny_model(family, **options)  # pyright: ignore[reportArgumentType]
    tokens = Tokens(tiny_tokenizer(bos=not family.startswith("gpt")), max_length=256)
    return LoadedModel(model.requires_grad_(False), tokens, resolve(model), ModelSource("tiny", Path()))


def plain(loaded: LoadedModel, probe: Probe) -> tuple[float, bool]:
    """Score one probe the slow way: no batch, no hook, every logit."""
    text = f"{probe.prompt} {probe.target}"
    ids = torch.tensor([loaded.tokens.tokenizer(text)["input_ids"]])
    length = ids.shape[1] - len(loaded.tokens.tokenizer(probe.prompt)["input_ids"])
    logprobs = loaded.model(input_ids=ids).logits[0, -length - 1 : -1].double().log_softmax(-1)
    target = ids[0, -length:]
    return float(logprobs.gather(1, target[:, None]).mean()), bool((logprobs.argmax(-1) == target).all())


def request(identifier: str = "one", **fields: object) -> EditRequest:
    record = {"id": identifier, "prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}
    return from_record({**record, **fields})


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_a_plain_forward_pass(family: str):
    loaded = tiny(family)
    for probe, found in zip(PROBES, score(loaded, PROBES), strict=True):
        logprob, exact = plain(loaded, probe)
        assert found.logprob == pytest.approx(logprob, abs=1e-5)
        assert found.exact == exact


@pytest.mark.parametrize("family", FAMILIES)
def test_order_and_padding_change_nothing(family: str):
    loaded = tiny(family)
    together = score(loaded, PROBES)
    alone = [score(loaded, [probe])[0] for probe in PROBES]
    backwards = score(loaded, PROBES[::-1], batch_tokens=20)[::-1]
    for a, b, c in zip(together, alone, backwards, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
        assert a.logprob == pytest.approx(c.logprob, abs=1e-5)
        assert a.exact == b.exact == c.exact


def test_padding_side_of_the_tokenizer_is_irrelevant():
    loaded = tiny()
    left = LoadedModel(
        loaded.model, Tokens(tiny_tokenizer(padding_side="left")), loaded.architecture, ModelSource("left", Path())
    )
    assert score(loaded, PROBES) == score(left, PROBES)


def test_greedy_answer_is_exact():
    loaded = tiny("gpt2")
    prompt = "The capital of France is"
    ids = torch.tensor([loaded.tokens.tokenizer(prompt)["input_ids"]])
    logits = loaded.model(input_ids=ids).logits[0, -1]
    words = [
        index
        for index in range(len(logits))
        if (text := loaded.tokens.decode([index])).startswith(" ") and text.strip().isalpha()
    ]
    best, worst = (loaded.tokens.decode([pick(words, key=lambda i: float(logits[i]))]).strip() for pick in (max, min))
    # The best word need not be the best token of all: only then is it the greedy answer.
    found = score(loaded, [Probe(prompt, best), Probe(prompt, worst)])
    assert found[0].logprob > found[1].logprob
    assert found[0].exact == (int(logits.argmax()) in words)
    assert not found[1].exact


def test_too_long_prompt_is_refused():
    with pytest.raises(RequestError, match="but the model reads 256"):
        score(tiny(), [Probe("Rome " * 300, "Paris")])


def test_no_probes_no_scores():
    assert score(tiny(), []) == []


def answer(wanted: float, rival: float | None, *, exact: bool = False, accuracy: float = 0.0) -> Answer:
    return Answer("p", "t", wanted, exact, accuracy, None if rival is None else "r", rival)


def test_metrics_equal_a_hand_computed_case():
    outcomes = [
        Outcome(
            "a",
            efficacy=(answer(-1, -2, exact=True, accuracy=1.0),),
            paraphrases=(answer(-1, -2, exact=True, accuracy=1.0), answer(-3, -2, accuracy=0.5)),
            neighbors=(answer(-1, -2, exact=True), answer(-1, -2), answer(-2, -1), answer(-2, -1)),
            locality=(answer(-1, None, accuracy=0.25),),
            portability=(answer(-1, None, accuracy=0.5), answer(-1, None, accuracy=1.0)),
        ),
        Outcome("b", efficacy=(answer(-3, -2, accuracy=0.5),), paraphrases=(answer(-1, -2),)),
    ]
    found = summarize(outcomes, requests=[], metrics={"counterfact", "zsre", "knowedit"})
    assert found.efficacy_success == 0.5
    assert found.efficacy_accuracy == 0.5
    # The mean within an edit comes first: (1/2 + 1) / 2, not 2/3.
    assert found.generalization_success == 0.75
    assert found.generalization_accuracy == 0.25
    # The second edit has no neighbours and is left out, not counted as 0.
    assert found.specificity_success == 0.5
    assert found.specificity_accuracy == 0.25
    assert found.score == pytest.approx(3 / (1 / 0.5 + 1 / 0.75 + 1 / 0.5))
    assert found.zsre == {"efficacy": 0.75, "generalization": 0.375, "locality": 0.25}
    assert found.knowedit == {"edit_success": 0.75, "portability": 0.75, "locality": 0.25}
    assert found.counts == {"edits": 2, "paraphrases": 3, "neighbors": 4, "locality": 1, "portability": 2, "choices": 0}


def test_missing_fields_give_none():
    found = evaluate(tiny(), [request()], metrics=["counterfact", "zsre", "knowedit", "fluency", "consistency"])
    assert found.efficacy_accuracy is not None
    assert found.efficacy_success is None
    assert found.generalization_accuracy is found.generalization_success is None
    assert found.specificity_accuracy is found.specificity_success is found.score is None
    assert found.zsre is not None
    assert found.zsre["locality"] is None
    assert found.knowedit is not None
    assert found.knowedit["portability"] is None
    assert found.fluency is found.consistency is None
    assert json.loads(json.dumps(found.to_json()))["score"] is None


def test_nothing_to_evaluate_gives_none():
    assert evaluate(tiny(), []).efficacy_accuracy is None


def test_unknown_metric_names_the_near_miss():
    with pytest.raises(OptionError, match="did you mean 'fluency'"):
        evaluate(tiny(), [request()], metrics=["fluensy"])


FULL = {
    "target_true": "Paris",
    "paraphrase_prompts": ["The city of France is"],
    "neighborhood_prompts": ["The capital of Italy is", {"prompt": "The capital of Spain is", "target": "Berlin"}],
    "locality": [{"prompt": "Bob wrote", "target": "the"}],
    "portability": [{"prompt": "The language of France is", "target": "Italian", "axis": "reasoning"}],
    "generation_prompts": ["France is"],
}


def test_every_question_is_asked_of_the_model():
    loaded = tiny()
    found = evaluate(loaded, [request(**FULL)])
    (outcome,) = found.outcomes
    assert [a.target for a in outcome.neighbors] == ["Paris", "Berlin"]
    assert [a.rival for a in outcome.neighbors] == ["Rome", "Rome"]
    assert outcome.portability[0].axis == "reasoning"
    for group in (outcome.efficacy, outcome.paraphrases, outcome.neighbors, outcome.locality, outcome.portability):
        for found_answer in group:
            assert found_answer.logprob == pytest.approx(
                plain(loaded, Probe(found_answer.prompt, found_answer.target))[0], abs=1e-5
            )
            if found_answer.rival is not None:
                rival = plain(loaded, Probe(found_answer.prompt, found_answer.rival))[0]
                assert found_answer.rival_logprob == pytest.approx(rival, abs=1e-5)


def test_a_neighbor_whose_answer_is_the_new_one_has_no_rival():
    near = [{"prompt": "The capital of Italy is", "target": "Rome"}, "The capital of Spain is"]
    found = evaluate(tiny(), [request(target_true="Paris", neighborhood_prompts=near)])
    first, second = found.outcomes[0].neighbors
    assert first.success is None
    assert found.specificity_success == float(bool(second.success))
    # The greedy answer can be right or wrong all the same.
    assert found.specificity_accuracy == (first.exact + second.exact) / 2


@pytest.mark.slow
def test_the_unedited_bundled_model_knows_no_edit_and_every_neighbor():
    requests = read_edits(STREAM).requests
    ties = [r for r in requests if any(near.target == r.target_new for near in r.neighborhood_prompts)]
    chosen = [*ties, *(r for r in requests[::10] if r not in ties)]
    assert len(ties) >= 5
    found = evaluate(open_model(resolve_model(None), device="cpu"), chosen)
    assert found.efficacy_success == found.efficacy_accuracy == 0
    assert found.generalization_success == found.generalization_accuracy == 0
    assert found.specificity_success == found.specificity_accuracy == 1


def test_order_of_edits_changes_no_metric():
    loaded = tiny()
    subjects = ("France", "Italy", "Spain", "Greece")
    requests = [request(name, **{**FULL, "subject": name}) for name in subjects]
    there, back = evaluate(loaded, requests), evaluate(loaded, requests[::-1], batch_tokens=30)
    names = list(paths(there.to_json()))
    assert "generated.efficacy_exact" in names
    assert "kinds.portability.reasoning.accuracy" in names
    for name in names:
        assert value_at(back.to_json(), name) == pytest.approx(value_at(there.to_json(), name), abs=1e-5), name


def test_raw_numbers_of_each_edit_are_kept():
    found = evaluate(tiny(), [request("a", **FULL), request("b", **FULL)])
    lines = [json.loads(json.dumps(line)) for line in found.raw()]
    assert [line["id"] for line in lines] == ["a", "b"]
    assert lines[0]["neighbors"][0]["rival"] == "Rome"
    assert lines[0]["neighbors"][0]["success"] == (found.outcomes[0].neighbors[0].success)
    assert lines[0]["efficacy"][0]["logprob"] < 0


def test_harmonic_mean():
    assert harmonic([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert harmonic([1.0, 0.0]) == 0
    assert harmonic([1.0, None]) is None
    assert harmonic([]) is None
    assert not math.isnan(harmonic([1.0]) or 0)


def test_a_wrecked_models_numbers_are_written_as_null():
    outcome = Outcome("a", efficacy=(answer(math.nan, -math.inf),))
    line = json.loads(json.dumps(outcome.to_json(), allow_nan=False))
    assert line["efficacy"][0]["logprob"] is line["efficacy"][0]["rival_logprob"] is None
    assert line["efficacy"][0]["success"] is False
