"""Target values of a batch against the procedure of the papers, one edit at a time, written out plainly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from editcli.edits import EditRequest
from editcli.forward import first, tapped, with_first
from editcli.model import LoadedModel, open_model, resolve_model
from editcli.report import Silent
from editcli.request import from_record
from editcli.targets import TargetOptions, optimise
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


def plain(loaded: LoadedModel, fact: EditRequest, options: TargetOptions) -> tuple[Tensor, Tensor, Tensor, float]:
    """One edit, full texts, all layers, torch's own Adam and log-softmax: methods as published."""
    tokens, model, block = loaded.tokens, loaded.model, loaded.architecture.block(LAYER)
    texts = [tokens.locate(fact.in_context(prefix), fact.target_new) for prefix in ("", *PREFIXES)]
    prompts = tokens.encode(texts)
    (essence,) = tokens.encode([tokens.locate(replace(fact, before="", after=" is a"))])
    seen: dict[str, Tensor] = {}

    def at(ids: Sequence[int], place: int, delta: Tensor | None) -> Tensor:
        def steer(module: object, entered: Tensor, output: object) -> object:
            hidden = first(output)
            seen.setdefault("h", hidden[0, place].detach())
            if delta is None:
                return None
            offset = torch.zeros_like(hidden[0]).index_add(0, torch.tensor([place]), delta[None])
            return with_first(output, hidden + offset)

        def see(module: object, entered: Tensor, output: object) -> None:
            seen.setdefault("m", first(output).reshape(1, len(ids), -1)[0, place].detach())

        with tapped(block, steer), tapped(loaded.architecture.mlp(LAYER), see):
            return torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0], dim=-1)

    at(prompts[0].ids[:-1], prompts[0].lookup, None)
    h, m = seen["h"], seen["m"]
    before = at(essence.ids, essence.lookup, None)[essence.lookup].detach()
    delta = torch.zeros_like(h, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=options.lr)
    for step in range(options.steps):
        told = []
        for text in prompts:
            logs = at(text.ids[:-1], text.lookup, delta)
            told.append(
                -sum(logs[p, t] for p, t in zip(text.predicting, text.target_ids, strict=True)) / len(text.target)
            )
        now = at(essence.ids, essence.lookup, delta)[essence.lookup]
        divergence = torch.nn.functional.kl_div(now, before, log_target=True, reduction="sum")
        decay = options.v_weight_decay * delta.norm() / h.norm() ** 2
        loss = sum(told) / len(told) + options.kl_factor * divergence + decay
        if float(loss.detach()) < options.stop_loss or step == options.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            bound = options.clamp * h.norm()
            if delta.norm() > bound:
                delta.mul_(bound / delta.norm())
    return h + delta.detach(), h, m, float(loss.detach())


@pytest.mark.parametrize("cached", [True, False])
def test_a_batch_equals_the_published_procedure(loaded: LoadedModel, cached: bool) -> None:
    target, initial, written, loss = batch(loaded, requests(), replace(OPTIONS, cached=cached))
    for column, fact in enumerate(requests()):
        z, h, m, last = plain(loaded, fact, OPTIONS)
        torch.testing.assert_close(initial[:, column], h, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(written[:, column], m, rtol=1e-4, atol=1e-5)
        assert float((target[:, column] - z).norm() / (z - h).norm()) < 1e-3
        assert loss[column] == pytest.approx(last, rel=1e-4)


def test_a_batch_equals_one_at_a_time(loaded: LoadedModel) -> None:
    together = batch(loaded, requests())[0]
    for column, fact in enumerate(requests()):
        alone, initial, *_ = batch(loaded, [fact])
        assert float((together[:, [column]] - alone).norm() / (alone - initial).norm()) < 1e-3


def test_micro_batches_change_nothing(loaded: LoadedModel) -> None:
    whole, small = batch(loaded, requests()), batch(loaded, requests(), replace(OPTIONS, batch_tokens=1))
    torch.testing.assert_close(whole[0], small[0], rtol=1e-4, atol=1e-4)


def test_an_edit_that_is_done_stops_and_keeps_its_delta(loaded: LoadedModel) -> None:
    """With a threshold between the edits' losses, those below it stop at once and the others go on as if alone."""
    losses = batch(loaded, requests(), replace(OPTIONS, steps=1))[3]
    threshold = float(losses.median())
    target, initial, _, loss = batch(loaded, requests(), replace(OPTIONS, stop_loss=threshold))
    done = losses < threshold
    assert 0 < int(done.sum()) < len(losses)
    assert bool((target - initial)[:, done].eq(0).all())
    assert bool((target - initial)[:, ~done].ne(0).any(dim=0).all())
    torch.testing.assert_close(loss[done], losses[done])
    for column in (~done).nonzero().flatten().tolist():
        z, h, _, _ = plain(loaded, requests()[column], replace(OPTIONS, stop_loss=threshold))
        assert float((target[:, column] - z).norm() / (z - h).norm()) < 1e-3


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
