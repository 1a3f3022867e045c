"""Subjects that are the first token of their text, on models whose first token is an attention sink."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.reference import plain_target
from editcli.__main__ import main
from editcli.editing.session import ModelSession
from editcli.editing.sinks import first_is_sink, spread, usual_length, without_outliers
from editcli.editing.targets import optimise
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.models.tokens import Encoded
from editcli.reporting import Silent
from editcli.requests.schema import EditRequest, from_record
from editcli.settings.core import TargetOptions
from editcli.testing import tiny_model_folder

LAYERS = (1, 2)
PREFIXES = ("Bob. ", "The river in London is. ")
OPTIONS = TargetOptions(steps=6, lr=0.1)
ROWS = (
    {"id": "first", "prompt": " {} is in", "subject": "France", "target_new": "Rome"},
    {"id": "later", "prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"},
    {"id": "longer", "prompt": " {} works as a", "subject": "Ann Smith", "target_new": "river tower"},
)
FIRST, LATER, LONGER = (from_record(dict(row)) for row in ROWS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("models") / "plain", "gpt2")


@pytest.fixture(scope="module")
def sunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose hidden states are those of its position at the first token, whatever the token is."""
    folder = tiny_model_folder(tmp_path_factory.mktemp("models") / "sunk", "gpt2")
    opened = open_model(resolve_model(folder))
    with torch.no_grad():
        opened.model.transformer.wpe.weight[0] *= 100
    opened.model.save_pretrained(folder)
    return folder


def opened(folder: Path) -> LoadedModel:
    return open_model(resolve_model(folder))


def session(folder: Path) -> ModelSession:
    return ModelSession(opened(folder), LAYERS, options=OPTIONS, prefixes=PREFIXES)


def behind(request: EditRequest, prefix: str) -> EditRequest:
    return request.in_context(prefix)


def test_the_spread_of_keys_is_one_less_their_mean_cosine() -> None:
    keys = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    cosines = [float(torch.cosine_similarity(keys[:, a], keys[:, b], dim=0)) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert spread(keys) == pytest.approx(1 - sum(cosines) / 3, abs=1e-6)


def test_a_sink_is_told_by_its_keys(plain: Path, sunk: Path, tmp_path: Path) -> None:
    llama = tiny_model_folder(tmp_path / "llama", "llama")
    sinks = [first_is_sink(opened(folder), LAYERS, batch_tokens=512) for folder in (plain, llama, sunk)]
    assert sinks == [False, False, True]


def test_only_a_one_token_subject_at_the_beginning_is_in_it(plain: Path, sunk: Path) -> None:
    assert session(sunk).in_sink([FIRST, LATER, LONGER]) == [True, False, False]
    assert session(plain).in_sink([FIRST, LATER, LONGER]) == [False, False, False]


def test_a_fact_in_a_sink_is_the_one_behind_the_contexts(sunk: Path) -> None:
    """With one context and nothing to hold on "{subject} is a", it is the published procedure on that text."""
    loaded, options = opened(sunk), replace(OPTIONS, kl_factor=0.0)
    values = optimise(loaded, [FIRST], PREFIXES[:1], LAYERS[-1], options, Silent(), sink=True)
    expected = plain_target(loaded, behind(FIRST, PREFIXES[0]), (), LAYERS[-1], options)
    torch.testing.assert_close(values.initial[:, 0], expected.initial, rtol=1e-4, atol=1e-5)
    assert float((values.target[:, 0] - expected.target).norm() / (expected.target - expected.initial).norm()) < 1e-3
    assert float(values.loss[0]) == pytest.approx(expected.loss, rel=1e-4)


def test_the_contexts_share_the_loss_evenly(sunk: Path) -> None:
    """One step's loss is the mean over the contexts, each of which alone has a loss of its own."""
    loaded, options = opened(sunk), replace(OPTIONS, kl_factor=0.0, steps=1)
    together = optimise(loaded, [FIRST], PREFIXES, LAYERS[-1], options, Silent(), sink=True).loss
    alone = [optimise(loaded, [FIRST], (p,), LAYERS[-1], options, Silent(), sink=True).loss for p in PREFIXES]
    torch.testing.assert_close(together, torch.stack(alone).mean(dim=0), rtol=1e-4, atol=1e-5)


def test_other_facts_of_its_batch_stay_as_they_are_without_it(sunk: Path) -> None:
    together, alone = session(sunk), session(sunk)
    # Facts of one subject would share an offset.
    for one in (together, alone):
        one.options = replace(OPTIONS, merge=False)
    facts = [LATER, FIRST, LONGER]
    values, others = together.values(facts), alone.values([LATER, LONGER])
    torch.testing.assert_close(values.target[:, [0, 2]], others.target, rtol=1e-4, atol=1e-4)
    (site, _) = together.sites
    torch.testing.assert_close(together.keys(facts, site)[:, [0, 2]], alone.keys([LATER, LONGER], site))


def test_keys_and_residuals_are_read_behind_the_contexts(sunk: Path) -> None:
    one, other = session(sunk), session(sunk)
    values = one.values([FIRST])
    first, second = (other.loaded.architecture.mlp(layer) for layer in LAYERS)
    assert first is not second
    for site in one.sites:
        contexts = [behind(FIRST, prefix) for prefix in PREFIXES]
        bare = ModelSession(other.loaded, LAYERS, options=OPTIONS, prefixes=())
        each = bare.keys(contexts, site)
        torch.testing.assert_close(one.keys([FIRST], site)[:, 0], (each[:, 0] + each.mean(dim=1)) / 2)
        there = bare.residual(contexts[:1], site, values)
        torch.testing.assert_close(one.residual([FIRST], site, values), there, rtol=1e-4, atol=1e-4)


def test_sinks_are_decided_once_for_a_batch_whatever_it_writes(sunk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by an editor that reads its batch under trial weights; the unedited model is asked for itself."""
    one, asked = session(sunk), []
    first, last = one.sites

    def counted(loaded: LoadedModel, layers: Sequence[int], *, batch_tokens: int) -> bool:
        asked.append(layers)
        return first_is_sink(loaded, layers, batch_tokens=batch_tokens)

    monkeypatch.setattr("editcli.editing.session.first_is_sink", counted)
    before = one.keys([FIRST], first)
    with one.under({first: 2 * one.weight(first)}):
        one.keys([FIRST], last)
    one.keys([FIRST], last)
    assert len(asked) == 1
    with one.under({}, unedited=True):
        assert torch.equal(one.keys([FIRST], first), before)
        assert len(asked) == 2
    one.keys([FIRST], last)
    assert len(asked) == 2


def test_where_there_is_no_sink_nothing_changes(plain: Path) -> None:
    values = session(plain).values([FIRST, LATER])
    loaded = opened(plain)
    expected = optimise(loaded, [FIRST, LATER], PREFIXES, LAYERS[-1], OPTIONS, Silent())
    assert torch.equal(values.target, expected.target)


def test_without_contexts_the_bare_text_is_all_there_is(sunk: Path) -> None:
    bare = ModelSession(opened(sunk), LAYERS, options=OPTIONS, prefixes=())
    usual = usual_length(bare.loaded, LAYERS[-1], batch_tokens=512)
    expected = optimise(bare.loaded, [FIRST], (), LAYERS[-1], OPTIONS, Silent(), usual=usual)
    assert torch.equal(bare.values([FIRST]).target, expected.target)


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"steps": 20, "lr": 5.0, "clamp": 0.3}, 0.3),
        ({"steps": 2, "lr": 0.2, "lr_kind": "relative", "clamp": 9.0}, 0.2),
    ],
    ids=["clamp", "rate"],
)
def test_a_target_in_a_sink_moves_as_far_as_that_of_an_ordinary_token(
    sunk: Path, options: dict[str, Any], share: float
) -> None:
    """Its h is long, which says nothing of how far it must move. Adam's first step is the rate in every coordinate."""
    bare = ModelSession(opened(sunk), LAYERS, options=replace(OPTIONS, **options), prefixes=())
    usual = usual_length(bare.loaded, LAYERS[-1], batch_tokens=512)
    values = bare.values([FIRST, LONGER])
    moved, length = (values.target - values.initial).norm(dim=0), values.initial.norm(dim=0)
    assert float(length[0]) > 2 * usual > float(length[1])
    assert float(moved[0]) == pytest.approx(share * usual, rel=1e-2)
    assert float(moved[1]) == pytest.approx(share * float(length[1]), rel=1e-2)


def test_the_decay_of_a_target_in_a_sink_counts_the_usual_length(sunk: Path) -> None:
    """After one step delta is as long as the rate times ||h||, so the decay adds its weight times the rate."""
    options, losses = replace(OPTIONS, steps=2, lr=0.2, lr_kind="relative", clamp=9.0, decay_kind="relative"), []
    for decay in (0.0, 5.0):
        bare = ModelSession(opened(sunk), LAYERS, options=replace(options, v_weight_decay=decay), prefixes=())
        losses.append(bare.values([FIRST]).loss)
    assert float(losses[1] - losses[0]) == pytest.approx(5.0 * 0.2, rel=2e-2)


def test_the_usual_length_stands_in_for_outliers_alone() -> None:
    lengths = torch.tensor([0.1, 1.0, 5.9, 6.1, 90.0])
    assert torch.equal(without_outliers(lengths, 3.0), torch.tensor([0.1, 1.0, 5.9, 3.0, 3.0]))


def test_a_tokenizer_that_knows_none_of_the_words_has_no_outliers(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, lengths = opened(plain), torch.tensor([1.0, 90.0])
    monkeypatch.setattr(type(loaded.tokens), "ids", lambda self, text, *, special: [])
    monkeypatch.setattr(type(loaded.tokens), "encode", lambda self, texts: [Encoded((), -1, range(0))])
    usual = usual_length(loaded, LAYERS[-1], batch_tokens=512)
    assert torch.equal(without_outliers(lengths, usual), lengths)
    assert not first_is_sink(loaded, LAYERS, batch_tokens=512)


def test_the_usual_length_is_that_of_words_behind_other_text(sunk: Path, plain: Path) -> None:
    """So the sink does not count, and another model's unit does: it is not a constant."""
    one, other = (usual_length(opened(folder), LAYERS[-1], batch_tokens=512) for folder in (sunk, plain))
    assert one == pytest.approx(other, rel=0.5)
    scaled = opened(plain)
    with torch.no_grad():
        scaled.model.transformer.wte.weight *= 30
        scaled.model.transformer.wpe.weight *= 30
    assert usual_length(scaled, LAYERS[-1], batch_tokens=512) > 5 * other


@pytest.mark.parametrize("folder", ["sunk", "plain"])
def test_apply_and_check_say_what_to_do(
    folder: str, corpus_text: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, edits = request.getfixturevalue(folder), tmp_path / "edits.jsonl"
    edits.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    asked = ["--model", str(model), "--layers", "1,2", "--out", str(tmp_path / "out"), "-o", "targets.steps=2"]
    (tmp_path / "corpus.txt").write_text(corpus_text)
    cheap = ["--corpus", str(tmp_path / "corpus.txt"), "-o", "targets.prefixes=2"]
    assert main(["apply", str(edits), *asked, *cheap]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("put a word before the subject") == (1 if folder == "sunk" else 0)
    assert ("warning: first: the subject is the first token" in said) == (folder == "sunk")
    assert main(["check", str(edits), "--model", str(model), "--json"]) == 0
    first, *others = json.loads(capsys.readouterr().out)["edits"]
    assert any("put a word before the subject" in doubt for doubt in first["warnings"])
    assert not any(doubt for other in others for doubt in other["warnings"])
