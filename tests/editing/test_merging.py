"""Facts of one subject in one batch share an offset (MEMIT-Merge, arXiv 2502.07322)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from editcli.editing.targets import optimise
from editcli.models.forward import first, hooked, with_first
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.models.tokens import Encoded
from editcli.plugin.interfaces import Values
from editcli.reporting import Silent
from editcli.requests.schema import EditRequest, from_record
from editcli.settings.core import TargetOptions
from editcli.testing import tiny_model_folder

LAYER, PREFIXES = 2, ("Bob. ", "The river in London is. ")
OPTIONS = TargetOptions(steps=5, stop_loss=0.0, kl_factor=0.1, v_weight_decay=0.1, clamp=0.3)
FACTS = (
    ("The capital of {} is", "Ann Smith", "Rome"),
    ("It is {}", "Berlin", "Tokyo"),
    ("In Spain, {} wrote the", "Ann Smith", "company in Paris"),
    ("The city of {} is on the river and was", "Ann Smith", "a"),
    ("{} works as a", "Bob", "river tower"),
)
TOGETHER = (0, 2, 3)


def requests(facts: Sequence[tuple[str, str, str]] = FACTS) -> list[EditRequest]:
    rows = [{"id": str(i), "prompt": p, "subject": s, "target_new": t} for i, (p, s, t) in enumerate(facts)]
    return [from_record(row) for row in rows]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tiny_model_folder(tmp_path_factory.mktemp("models") / request.param, request.param)
    return open_model(resolve_model(folder))


def targets(loaded: LoadedModel, edits: Sequence[EditRequest], options: TargetOptions = OPTIONS) -> Values:
    return optimise(loaded, edits, PREFIXES, LAYER, options, Silent())


def logs(loaded: LoadedModel, text: Encoded, delta: Tensor) -> Tensor:
    """Return log-probabilities, (length, vocabulary), with delta added at the lookup token."""

    def steer(module: object, entered: Tensor, output: object) -> object:
        shift = torch.zeros_like(first(output))
        shift[0, text.lookup] = 1
        return with_first(output, first(output) + shift * delta)

    with hooked(loaded.architecture.block(LAYER), steer):
        return loaded.model(input_ids=torch.tensor([text.ids]), use_cache=False).logits[0].float().log_softmax(-1)


def hidden(loaded: LoadedModel, text: Encoded) -> Tensor:
    seen: list[Tensor] = []
    block = loaded.architecture.block(LAYER)
    with torch.no_grad(), hooked(block, lambda _, entered, made: seen.append(first(made))):
        loaded.model(input_ids=torch.tensor([text.ids]), use_cache=False)
    return seen[0][0, text.lookup]


def plain_group(loaded: LoadedModel, edits: Sequence[EditRequest]) -> Tensor:
    """Return delta by the plain procedure: Adam on the mean of the edits' losses, one text after the other."""
    tokens = loaded.tokens
    prompts = [
        [
            t.without_last()
            for t in tokens.encode([tokens.locate(e.in_context(c), e.target_new) for c in ("", *PREFIXES)])
        ]
        for e in edits
    ]
    essences = tokens.encode([tokens.locate(replace(e, before="", after=" is a")) for e in edits])
    zero = torch.zeros(loaded.architecture.shape(LAYER)[0])
    with torch.no_grad():
        before = [logs(loaded, text, zero)[text.lookup] for text in essences]
    h = hidden(loaded, prompts[0][0])
    unit = h.norm() / len(h) ** 0.5
    steered = zero.clone().requires_grad_(True)
    adam = torch.optim.Adam([steered], lr=OPTIONS.lr)
    for _ in range(OPTIONS.steps - 1):
        delta, parts = unit * steered, []
        for texts, essence, old in zip(prompts, essences, before, strict=True):
            surprise = [
                -logs(loaded, text, delta)[list(text.predicting), list(text.target_ids)].mean() for text in texts
            ]
            now = logs(loaded, essence, delta)[essence.lookup]
            divergence = torch.nn.functional.kl_div(now, old, log_target=True, reduction="sum")
            parts.append(torch.stack(surprise).mean() + OPTIONS.kl_factor * divergence)
        loss = torch.stack(parts).mean() + OPTIONS.v_weight_decay * delta.norm() / h.norm()
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            steered *= (OPTIONS.clamp * h.norm() / unit / steered.norm().clamp_min(1e-30)).clamp_max(1.0)
    return unit * steered.detach()


def test_the_offset_of_a_group_is_that_of_the_plain_procedure(loaded: LoadedModel) -> None:
    edits = requests()
    values = targets(loaded, edits)
    delta = plain_group(loaded, [edits[at] for at in TOGETHER])
    for at in TOGETHER:
        (bare,) = loaded.tokens.encode([loaded.tokens.locate(edits[at])])
        torch.testing.assert_close(values.initial[:, at], hidden(loaded, bare), rtol=1e-4, atol=1e-5)
        assert float((values.target[:, at] - values.initial[:, at] - delta).norm() / delta.norm()) < 2e-3
    assert values.reached is not None
    assert len({float(values.loss[at]) for at in TOGETHER}) == 1


def test_the_others_are_as_they_are_alone(loaded: LoadedModel) -> None:
    edits = requests()
    together, apart = targets(loaded, edits), targets(loaded, edits, replace(OPTIONS, merge=False))
    for at in (1, 4):
        gap = (together.target[:, at] - apart.target[:, at]).norm()
        assert float(gap / (apart.target[:, at] - apart.initial[:, at]).norm()) < 1e-3
    for at in TOGETHER:
        assert float((together.target[:, at] - apart.target[:, at]).norm()) > 1e-3


def test_without_a_group_nothing_changes(loaded: LoadedModel) -> None:
    edits = [edit for at, edit in enumerate(requests()) if at not in TOGETHER[1:]]
    together, apart = targets(loaded, edits), targets(loaded, edits, replace(OPTIONS, merge=False))
    assert torch.equal(together.target, apart.target)
    assert torch.equal(together.loss, apart.loss)


def test_micro_batches_hold_groups_together(loaded: LoadedModel) -> None:
    edits = requests()
    whole, split = targets(loaded, edits), targets(loaded, edits, replace(OPTIONS, batch_tokens=40))
    gap = (whole.target - split.target).norm(dim=0) / (whole.target - whole.initial).norm(dim=0)
    assert float(gap.max()) < 1e-3


def test_every_edit_is_reported_done_once(loaded: LoadedModel) -> None:
    class Counts(Silent):
        done = 0

        @contextmanager
        def phase(self, name: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
            yield self.advance

        def advance(self, count: int) -> None:
            self.done += count

    reporter = Counts()
    optimise(loaded, requests(), PREFIXES, LAYER, OPTIONS, reporter)
    assert reporter.done == len(FACTS)
