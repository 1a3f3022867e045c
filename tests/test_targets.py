"""Target values of a batch against the procedure of the papers, one edit at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from editcli.editing.reference import PlainTarget, plain_target
from editcli.editing.steering import Chunk, Steering
from editcli.editing.targets import TargetOptions, optimise
from editcli.edits import EditRequest
from editcli.errors import ModelError, NumericalError
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.report import Silent
from editcli.request import from_record
from editcli.testing import tiny_model_folder

LAYER = 2
PREFIXES = ("Bob. ", "The river in London is. ")
OPTIONS = TargetOptions(steps=6, lr=0.1)
FACTS = (
    ("The capital of {} is", "France", "Rome"),
    ("{} works as a", "Ann Smith", "river tower"),
    ("In Spain, {} wrote the", "Bob", "company in Paris"),
    ("It is {}", "Berlin", "Tokyo"),
    ("The city of {} is on the river and was", "London", "a"),
)


def requests() -> list[EditRequest]:
    rows = [{"id": s, "prompt": p, "subject": s, "target_new": t} for p, s, t in FACTS]
    return [from_record(row) for row in rows]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tiny_model_folder(tmp_path_factory.mktemp("models") / request.param, request.param)
    return open_model(resolve_model(folder))


def batch(loaded: LoadedModel, facts: Sequence[EditRequest], options: TargetOptions = OPTIONS) -> tuple[Tensor, ...]:
    values = optimise(loaded, facts, PREFIXES, LAYER, options, Silent())
    return values.target, values.initial, values.written, values.loss


def distance(target: Tensor, plain: PlainTarget) -> float:
    """Return how far a target is from the plain one, as a share of the plain delta."""
    return float((target - plain.target).norm() / (plain.target - plain.initial).norm())


@pytest.mark.parametrize("cached", [True, False])
def test_a_batch_equals_the_published_procedure(loaded: LoadedModel, cached: bool) -> None:
    target, initial, written, loss = batch(loaded, requests(), replace(OPTIONS, cached=cached))
    for column, fact in enumerate(requests()):
        plain = plain_target(loaded, fact, PREFIXES, LAYER, OPTIONS)
        torch.testing.assert_close(initial[:, column], plain.initial, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(written[:, column], plain.written, rtol=1e-4, atol=1e-5)
        assert distance(target[:, column], plain) < 1e-3
        assert float(loss[column]) == pytest.approx(plain.loss, rel=1e-4)


def test_a_batch_equals_one_at_a_time(loaded: LoadedModel) -> None:
    together = batch(loaded, requests())[0]
    for column, fact in enumerate(requests()):
        alone, initial, *_ = batch(loaded, [fact])
        assert float((together[:, [column]] - alone).norm() / (alone - initial).norm()) < 1e-3


def test_micro_batches_change_nothing(loaded: LoadedModel) -> None:
    whole, small = batch(loaded, requests()), batch(loaded, requests(), replace(OPTIONS, batch_tokens=1))
    torch.testing.assert_close(whole[0], small[0], rtol=1e-4, atol=1e-4)


def test_a_batch_that_does_not_fit_is_halved(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = batch(loaded, requests())
    rows_of_two = 2 * (2 + len(PREFIXES))
    gather = Steering.logits

    def small(self: Steering, chunk: Chunk, shift: Tensor, head: tuple[Tensor, Tensor]) -> Tensor:
        if len(self.rows) > rows_of_two:
            raise torch.OutOfMemoryError("made up")
        return gather(self, chunk, shift, head)

    monkeypatch.setattr(Steering, "logits", small)
    for one, other in zip(whole, batch(loaded, requests()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_one_edit_that_does_not_fit_is_one_sentence(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> Tensor:
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(Steering, "logits", full)
    with pytest.raises(ModelError, match="one edit does not fit the memory"):
        batch(loaded, requests())


def test_a_loss_that_is_not_a_number_is_no_success(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Steering.logits
    monkeypatch.setattr(Steering, "logits", lambda *args: real(*args) * torch.nan)
    with pytest.raises(NumericalError, match="'France' or its loss is not finite"):
        batch(loaded, requests())


def test_an_edit_that_is_done_stops_and_keeps_its_delta(loaded: LoadedModel) -> None:
    """With a threshold between the edits' losses, those below it stop at once and the others go on as if alone."""
    losses = batch(loaded, requests(), replace(OPTIONS, steps=1))[3]
    threshold = float(losses.sort().values[1:3].mean())
    target, initial, _, loss = batch(loaded, requests(), replace(OPTIONS, stop_loss=threshold))
    done = losses < threshold
    assert 0 < int(done.sum()) < len(losses)
    assert bool((target - initial)[:, done].eq(0).all())
    assert bool((target - initial)[:, ~done].ne(0).any(dim=0).all())
    torch.testing.assert_close(loss[done], losses[done])
    for column in (~done).nonzero().flatten().tolist():
        plain = plain_target(loaded, requests()[column], PREFIXES, LAYER, replace(OPTIONS, stop_loss=threshold))
        assert distance(target[:, column], plain) < 1e-3


def test_delta_stays_in_its_ball(loaded: LoadedModel) -> None:
    target, initial, *_ = batch(loaded, requests(), replace(OPTIONS, lr=5.0, clamp=0.3))
    assert bool(((target - initial).norm(dim=0) <= 0.3 * initial.norm(dim=0) * (1 + 1e-5)).all())


@pytest.mark.parametrize("family", ["gemma2", "falcon-parallel", "granite", "gptj"])
def test_reusing_the_cache_changes_nothing(family: str, tmp_path: Path) -> None:
    loaded = open_model(resolve_model(tiny_model_folder(tmp_path / "model", family)))
    fast, slow = (batch(loaded, requests(), replace(OPTIONS, cached=cached)) for cached in (True, False))
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_padding_side_changes_nothing(tmp_path: Path) -> None:
    sides = []
    for side in ("left", "right"):
        loaded = open_model(resolve_model(tiny_model_folder(tmp_path / side)))
        loaded.tokens.tokenizer.padding_side = side
        sides.append(batch(loaded, requests())[0])
    torch.testing.assert_close(*sides, rtol=0, atol=0)
