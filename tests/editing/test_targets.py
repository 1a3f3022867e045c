"""Target values of a batch against the procedure of the papers, one edit at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig

from benchmarks.reference import PlainTarget, plain_target
from editcli.editing import targets
from editcli.editing.engine import Engine, engine_for
from editcli.editing.layout import Exact, Group
from editcli.editing.steering import Chunk, Steering
from editcli.editing.targets import optimise
from editcli.errors import ModelError, NumericalError, RequestError
from editcli.models.forward import first, with_first
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.reporting import Silent
from editcli.requests.schema import EditRequest, from_record
from editcli.settings.core import TargetOptions
from editcli.testing import TINY, tiny_model_folder, vocabulary_size
from tests.support.families import families

LAYER = 2
PREFIXES = ("Bob. ", "The river in London is. ")
PUBLISHED: Mapping[str, Any] = {"v_weight_decay": 0.5, "kl_factor": 0.0625}
OPTIONS = TargetOptions(steps=6, lr=0.1, lr_kind="absolute", decay_kind="absolute", **PUBLISHED)
RELATIVE = TargetOptions(steps=6, lr=0.1, **PUBLISHED)
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


def opened(folder: Path, family: str) -> LoadedModel:
    return open_model(resolve_model(tiny_model_folder(folder, family)))


def through_the_whole_model(self: Steering, *args: Any) -> None:
    self.whole = True


@contextmanager
def removing(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def batch(
    loaded: LoadedModel,
    facts: Sequence[EditRequest],
    options: TargetOptions = OPTIONS,
    engine: Engine | None = None,
) -> tuple[Tensor, ...]:
    values = optimise(loaded, facts, PREFIXES, LAYER, options, Silent(), engine=engine)
    return values.target, values.initial, values.written, values.loss


def distance(target: Tensor, plain: PlainTarget) -> float:
    """Return how far a target is from the plain one, as a share of the plain delta."""
    return float((target - plain.target).norm() / (plain.target - plain.initial).norm())


@pytest.mark.parametrize(
    "options", [OPTIONS, replace(OPTIONS, cached=False), RELATIVE], ids=["cached", "whole", "relative"]
)
def test_a_batch_equals_the_published_procedure(loaded: LoadedModel, options: TargetOptions) -> None:
    target, initial, written, loss = batch(loaded, requests(), options)
    for column, fact in enumerate(requests()):
        plain = plain_target(loaded, fact, PREFIXES, LAYER, options)
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


@pytest.mark.parametrize("moments", [(), (1,), (2, 2), (1, 3)])
def test_an_edit_that_is_done_again_is_counted_once(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, moments: tuple[int, ...]
) -> None:
    """The memory runs out when some edits are done already: they are among those that run again."""
    losses = batch(loaded, requests(), replace(OPTIONS, steps=1))[3]
    options = replace(OPTIONS, stop_loss=float(losses.sort().values[1:3].mean()))
    told, left, real = [0], list(moments), Steering.logits

    class Counting(Silent):
        @contextmanager
        def phase(self, name: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
            assert total == len(FACTS)
            yield told.append

    def full(self: Steering, *args: Any) -> Tensor:
        if left and sum(told) >= left[0]:
            left.pop(0)
            raise torch.OutOfMemoryError("made up")
        return real(self, *args)

    monkeypatch.setattr(Steering, "logits", full)
    optimise(loaded, requests(), PREFIXES, LAYER, options, Counting())
    assert not left
    assert all(count > 0 for count in told[1:])
    assert sum(told) == len(FACTS)


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


def magnify(model: Any, factor: float) -> None:
    """Multiply the residual stream of a Llama model by ``factor`` and leave its logits as they are."""
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(factor)
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(factor)
            block.mlp.down_proj.weight.mul_(factor)
    for norm in (part for name, part in model.named_modules() if name.endswith("norm")):
        norm.variance_epsilon *= factor**2


def test_relative_steps_scale_with_the_stream_and_absolute_ones_do_not(tmp_path: Path) -> None:
    """The reason for relative steps: a model whose stream is 64 times as large is the same problem."""
    plain, large = (opened(tmp_path / name, "llama") for name in ("plain", "large"))
    magnify(large.model, 64.0)
    for options, factor in ((RELATIVE, 64.0), (OPTIONS, 1.0)):
        once, again = batch(plain, requests(), options), batch(large, requests(), options)
        torch.testing.assert_close(again[1], 64 * once[1], rtol=1e-4, atol=1e-3)
        moved, moved_again = once[0] - once[1], again[0] - again[1]
        ratio = moved_again.norm(dim=0) / moved.norm(dim=0)
        if factor == 1.0:
            # A step of the same size is 64 times smaller here, and the target stays out of reach.
            assert bool((ratio < 4).all())
            assert bool((again[3] > once[3]).all())
        else:
            assert bool(((moved_again - factor * moved).norm(dim=0) < 1e-2 * factor * moved.norm(dim=0)).all())
            torch.testing.assert_close(again[3], once[3], rtol=1e-3, atol=1e-4)


def test_a_relative_step_is_an_absolute_one_in_units_of_the_hidden_state(loaded: LoadedModel) -> None:
    """For one edit, lr relative and lr * ||h|| / sqrt(d) absolute are the same steps."""
    for fact in requests()[:2]:
        options = replace(OPTIONS, lr_kind="relative")
        target, initial, *_ = batch(loaded, [fact], options)
        unit = float(initial.norm()) / len(initial) ** 0.5
        same, *_ = batch(loaded, [fact], replace(OPTIONS, lr=options.lr * unit))
        assert float((target - same).norm() / (target - initial).norm()) < 1e-3


def test_targets_are_counted_by_how_they_ended(loaded: LoadedModel) -> None:
    """An edit counts as reached when its own loss is below the stop, and as clamped when its offset fills the ball."""
    losses = batch(loaded, requests(), replace(OPTIONS, steps=1))[3]
    threshold = float(losses.sort().values[1:3].mean())
    options = replace(OPTIONS, lr=5.0, clamp=0.01, stop_loss=threshold)
    values = optimise(loaded, requests(), PREFIXES, LAYER, options, Silent())
    assert values.reached is not None
    assert values.clamped is not None
    assert values.reached.tolist() == (values.loss < threshold).tolist()
    # Whoever was done before the first step has no offset; all others left the ball with that step.
    assert values.clamped.tolist() == (losses >= threshold).tolist()
    assert 0 < int(values.clamped.sum()) < len(FACTS)


def test_delta_stays_in_its_ball(loaded: LoadedModel) -> None:
    target, initial, *_ = batch(loaded, requests(), replace(OPTIONS, lr=5.0, clamp=0.3))
    assert bool(((target - initial).norm(dim=0) <= 0.3 * initial.norm(dim=0) * (1 + 1e-5)).all())


@pytest.mark.parametrize("family", families())
class TestEveryFamily:
    def test_all_that_is_saved_changes_nothing(self, family: str, tmp_path: Path) -> None:
        """Against the same rows through the whole model, from token zero, in one chunk, with torch's own products."""
        loaded = opened(tmp_path / "model", family)
        fast = batch(loaded, requests())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("editcli.models.matmul._available", lambda: False)
            patch.setattr(Steering, "check", through_the_whole_model)
            together = replace(engine_for(loaded), layout=Exact(setup=1e18))
            slow = batch(loaded, requests(), replace(OPTIONS, cached=False), together)
        for one, other in zip(fast, slow, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        delta, wanted = fast[0] - fast[1], slow[0] - slow[1]
        assert bool(((delta - wanted).norm(dim=0) < 1e-3 * wanted.norm(dim=0)).all())

    def test_blocks_can_be_called_alone(self, family: str, tmp_path: Path) -> None:
        """No known family needs the slower ways: through the model's own forward pass, or from the first token."""
        loaded = opened(tmp_path / "model", family)
        seen: list[bool] = []
        check = Steering.check

        def watched(self: Steering, *args: Any) -> None:
            check(self, *args)
            seen.append(self.whole)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Steering, "check", watched)
            batch(loaded, requests(), replace(OPTIONS, steps=1))
        assert seen == [False]
        assert loaded.supports_kv_cache

    def test_a_plain_family_equals_the_published_procedure(self, family: str, tmp_path: Path) -> None:
        loaded = opened(tmp_path / "model", family)
        if loaded.architecture.mlp_norm(LAYER) is not None:
            pytest.skip("the published procedure knows no norm behind the MLP")
        target, *_, loss = batch(loaded, requests()[:2])
        for column, fact in enumerate(requests()[:2]):
            plain = plain_target(loaded, fact, PREFIXES, LAYER, OPTIONS)
            assert distance(target[:, column], plain) < 1e-3
            assert float(loss[column]) == pytest.approx(plain.loss, rel=1e-4)


def test_a_model_that_does_more_behind_its_blocks_is_run_as_a_whole(tmp_path: Path) -> None:
    """Where the stream mixes positions behind the last block, calling blocks alone is wrong, and it is noticed."""
    loaded = opened(tmp_path / "model", "llama")

    def mix(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden + 0.5 * torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1],)

    with removing(loaded.architecture.final_norm.register_forward_pre_hook(mix)):
        # Prompts whose lookup token is not read itself, so that the token before it is among those that are run again.
        facts = [requests()[0], requests()[4]]
        target = batch(loaded, facts, replace(OPTIONS, kl_factor=0.0))[0]
        for column, fact in enumerate(facts):
            plain = plain_target(loaded, fact, PREFIXES, LAYER, replace(OPTIONS, kl_factor=0.0))
            assert distance(target[:, column], plain) < 1e-3


UNKNOWN: dict[str, dict[str, Any]] = {
    # Its position biases count columns, padding included.
    "mpt": {"d_model": 16, "n_heads": 4, "n_layers": 4, "max_seq_len": 256, "expansion_ratio": 2},
    # Every other layer is a convolution, whose state no attention cache holds.
    "lfm2": {
        **TINY["llama"][1],
        "block_ff_dim": 40,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
}


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_a_model_that_keys_and_values_do_not_take_along_reads_from_the_start(model_type: str, tmp_path: Path) -> None:
    own = {"vocab_size": vocabulary_size(), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = AutoConfig.for_model(model_type, **{**UNKNOWN[model_type], **own})
    loaded = open_model(resolve_model(tiny_model_folder(tmp_path / "model", config)))
    assert not loaded.supports_kv_cache
    target = batch(loaded, requests())[0]
    for column, fact in enumerate(requests()):
        assert distance(target[:, column], plain_target(loaded, fact, PREFIXES, LAYER, OPTIONS)) < 1e-3


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_padding_behind_a_long_past_needs_no_position_that_the_model_lacks(family: str, tmp_path: Path) -> None:
    positions: dict[str, Any] = {"n_positions": 48} if family == "gpt2" else {"max_position_embeddings": 48}
    loaded = open_model(resolve_model(tiny_model_folder(tmp_path / "model", family, **positions)))
    words = "the river in London is and was by the city of Rome and the tower"
    facts = [
        from_record({"id": "late", "prompt": f"{words} {words} {{}} is", "subject": "France", "target_new": "Rome"}),
        from_record({"id": "early", "prompt": f"The {{}} is {words} {words}", "subject": "Bob", "target_new": "a"}),
    ]
    target = optimise(loaded, facts, (), LAYER, OPTIONS, Silent()).target
    for column, fact in enumerate(facts):
        assert distance(target[:, column], plain_target(loaded, fact, (), LAYER, OPTIONS)) < 1e-3


def test_a_prompt_that_is_too_long_behind_a_prefix_is_one_sentence(tmp_path: Path) -> None:
    loaded = open_model(resolve_model(tiny_model_folder(tmp_path / "model", "gpt2", n_positions=16)))
    prefix = "The river in London is and was by the city of Rome. "
    with pytest.raises(RequestError, match=r"after a prefix .* tokens, more than the model's context of 16"):
        optimise(loaded, requests()[:1], (prefix,), LAYER, OPTIONS, Silent())


def test_one_micro_batch_is_held_at_a_time(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that is done nor one that did not fit takes memory from the next."""
    alive: weakref.WeakSet[Steering] = weakref.WeakSet()
    start, real, refused = Steering.__init__, Steering.logits, [True]

    def begin(self: Steering, *args: Any, **kwargs: Any) -> None:
        assert not list(alive)
        alive.add(self)
        start(self, *args, **kwargs)

    def full(self: Steering, *args: Any) -> Tensor:
        if refused:
            refused.clear()
            raise torch.OutOfMemoryError("made up")
        return real(self, *args)

    monkeypatch.setattr(Steering, "__init__", begin)
    monkeypatch.setattr(Steering, "logits", full)
    batch(loaded, requests(), replace(OPTIONS, steps=2))
    assert not refused


def test_a_caller_who_turned_gradients_off_gets_the_same(loaded: LoadedModel) -> None:
    expected = batch(loaded, requests()[:2])[0]
    with torch.no_grad():
        assert torch.equal(batch(loaded, requests()[:2])[0], expected)


def test_reruns_are_byte_identical(loaded: LoadedModel) -> None:
    for one, other in zip(batch(loaded, requests()), batch(loaded, requests()), strict=True):
        assert torch.equal(one, other)


def test_the_second_head_of_the_published_code_changes_nothing(loaded: LoadedModel) -> None:
    for fact in requests()[:2]:
        one, two = (plain_target(loaded, fact, PREFIXES, LAYER, OPTIONS, second_head=twice) for twice in (False, True))
        torch.testing.assert_close(one.target, two.target, rtol=1e-5, atol=1e-5)


def test_a_subject_that_starts_the_text_has_no_past(tmp_path: Path) -> None:
    """Without a begin-of-sequence token a one-token subject is the first token; others of the batch have a past."""
    loaded = opened(tmp_path / "model", "gpt2")
    # The tokenizer's words begin with their blank, which the prompt has and the subject has not.
    texts = {"France": " France is in", "Bo": "Bo is in"}
    facts = [from_record({"id": s, "prompt": text, "subject": s, "target_new": "Rome"}) for s, text in texts.items()]
    (first,) = loaded.tokens.encode([loaded.tokens.locate(facts[0])])
    assert first.lookup == 0
    target = batch(loaded, facts)[0]
    for column, fact in enumerate(facts):
        assert distance(target[:, column], plain_target(loaded, fact, PREFIXES, LAYER, OPTIONS)) < 1e-3


def test_chunks_hold_every_row_once_and_stay_small(loaded: LoadedModel) -> None:
    seen: list[tuple[list[Group], Steering]] = []
    groups = Steering.groups

    def watched(self: Steering, rows: Sequence[int]) -> list[Group]:
        seen.append((groups(self, rows), self))
        return seen[-1][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steering, "groups", watched)
        apart = replace(engine_for(loaded), layout=Exact(setup=0.0))
        batch(loaded, requests(), replace(OPTIONS, steps=1), apart)
    # The first call lays out all rows; a later one may be about a few.
    found, steering = seen[0]
    assert sorted(row for group in found for row in group.members) == list(range(len(steering.rows)))
    assert all(len({steering.width[row] for row in group.members}) == 1 for group in found)


def test_the_padding_side_changes_nothing(tmp_path: Path) -> None:
    sides = []
    for side in ("left", "right"):
        loaded = open_model(resolve_model(tiny_model_folder(tmp_path / side)))
        loaded.tokens.tokenizer.padding_side = side
        sides.append(batch(loaded, requests())[0])
    torch.testing.assert_close(*sides, rtol=0, atol=0)


class TestGreedyStop:
    """``targets.stop=greedy``: an edit is done once its target is what the model says, not once it is sure of it."""

    OPTIONS = replace(OPTIONS, steps=15, lr=0.4, stop_loss=0.0, stop="greedy", stop_patience=0, clamp=20.0)
    # What ends in its subject is predicted by the steered state itself; the others stay out of a tiny model's reach.
    FACTS = (
        ("It is {}", "Berlin", "tower"),
        ("The capital city of {}", "France", "river"),
        ("In Spain, {}", "Bob", "Paris"),
        ("{} works as a", "Ann Smith", "river tower"),
    )
    REACHABLE = 3

    def facts(self) -> list[EditRequest]:
        rows = ({"id": s, "prompt": p, "subject": s, "target_new": t} for p, s, t in self.FACTS)
        return [from_record(row) for row in rows]

    @pytest.mark.parametrize("patience", [0, 3])
    def test_a_batch_equals_the_plain_procedure_and_one_at_a_time(self, loaded: LoadedModel, patience: int) -> None:
        options = replace(self.OPTIONS, stop_patience=patience)
        target, *_ = batch(loaded, self.facts(), options)
        whole, initial, *_ = batch(loaded, self.facts(), replace(options, stop="loss"))
        for column, fact in enumerate(self.facts()):
            assert distance(target[:, column], plain_target(loaded, fact, PREFIXES, LAYER, options)) < 1e-2
            alone, *_ = batch(loaded, [fact], options)
            assert float((target[:, [column]] - alone).norm() / (alone - initial[:, [column]]).norm()) < 1e-2
        moved = (target - whole).norm(dim=0) > 1e-2 * (whole - initial).norm(dim=0)
        assert moved.tolist() == [True] * self.REACHABLE + [False]

    def test_what_is_reached_is_the_greedy_answer_in_all_contexts(self, loaded: LoadedModel) -> None:
        values = optimise(loaded, self.facts(), PREFIXES, LAYER, self.OPTIONS, Silent())
        assert values.reached is not None
        assert values.reached.tolist() == [True] * self.REACHABLE + [False]
        assert bool((values.loss > OPTIONS.stop_loss).all())
        offsets = (values.target - values.initial).T
        said = [answers(loaded, fact, delta) for fact, delta in zip(self.facts(), offsets, strict=True)]
        assert said == values.reached.tolist()

    def test_patience_takes_that_many_more_steps(self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        (fact,), real, calls = self.facts()[:1], targets.greedy, []

        def counted(logits: Tensor, tokens: Tensor) -> Tensor:
            calls.append(1)
            return real(logits, tokens)

        def evaluations(**choices: Any) -> int:
            calls.clear()
            batch(loaded, [fact], replace(self.OPTIONS, **choices))
            return len(calls)

        monkeypatch.setattr(targets, "greedy", counted)
        one = evaluations(steps=1)
        assert one == evaluations(steps=1, stop="loss"), "the answer is read off the logits of the loss"
        none, some, more = (evaluations(stop_patience=patience) // one for patience in (0, 1, 4))
        assert (some, more) == (none + 1, none + 4)
        assert more < self.OPTIONS.steps

    def test_an_edit_that_runs_out_of_steps_while_patient_counts_as_reached(self, loaded: LoadedModel) -> None:
        options = replace(self.OPTIONS, stop_patience=1000)
        for steps, reached in ((self.OPTIONS.steps, self.REACHABLE), (1, 0)):
            values = optimise(loaded, self.facts(), PREFIXES, LAYER, replace(options, steps=steps), Silent())
            assert values.reached is not None
            assert int(values.reached.sum()) == reached

    def test_a_negative_patience_is_refused(self) -> None:
        with pytest.raises(ValueError, match="stop_patience"):
            TargetOptions(stop_patience=-1)


def answers(loaded: LoadedModel, fact: EditRequest, delta: Tensor) -> bool:
    """Tell whether the whole model with ``delta`` added says the target greedily, bare and behind every prefix."""
    for prefix in ("", *PREFIXES):
        (text,) = loaded.tokens.encode([loaded.tokens.locate(fact.in_context(prefix), fact.target_new)])

        def steer(module: Any, args: Any, output: Any, at: int = text.lookup) -> Any:
            hidden = first(output).clone()
            hidden[0, at] += delta
            return with_first(output, hidden)

        with torch.no_grad(), removing(loaded.architecture.block(LAYER).register_forward_hook(steer)):
            logits = loaded.model(input_ids=torch.tensor([text.ids]), use_cache=False).logits[0]
        if logits[list(text.predicting)].argmax(dim=1).tolist() != list(text.target_ids):
            return False
    return True
