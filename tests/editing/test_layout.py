"""Layouts: every row once, few shapes on an accelerator, and the same target values whatever the layout."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

from editcli.editing.engine import Engine, Memory, engine_for
from editcli.editing.layout import Bucketed, Exact, Group, Layout, layout_for, work
from editcli.editing.replay import CudaGraphs, Eager, Recorded, replays_for
from editcli.editing.steering import Steering
from editcli.editing.targets import optimise
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.models.sizes import column_size, power_of_two, row_size, row_size_within
from editcli.reporting import Silent
from editcli.requests.schema import EditRequest, from_record
from editcli.settings.core import BATCH_TOKENS, TargetOptions
from editcli.testing import TINY, tiny_model_folder
from tests.editing.test_targets import (
    FACTS,
    LAYER,
    OPTIONS,
    PREFIXES,
    opened,
    requests,
    through_the_whole_model,
)
from tests.support.families import families

WIDTHS = st.lists(st.integers(1, 40), min_size=1, max_size=300)


@pytest.mark.parametrize("layout", [Exact(), Bucketed()], ids=["exact", "bucketed"])
@settings(max_examples=100, deadline=None)
@given(widths=WIDTHS, allowance=st.sampled_from([0.0, 30.0, 350.0, 1e9]), most=st.integers(1, 5000))
def test_a_layout_holds_every_row_once(layout: Layout, widths: list[int], allowance: float, most: int) -> None:
    groups = layout.groups(widths, allowance=allowance, most=most)
    assert sorted(row for group in groups for row in group.members) == list(range(len(widths)))
    for group in groups:
        assert 1 <= len(group.members) <= group.rows
        assert max(widths[row] for row in group.members) <= group.columns
        # A single row is computed however wide it is.
        assert group.tokens <= max(most, group.columns)


@settings(max_examples=100, deadline=None)
@given(widths=WIDTHS, allowance=st.sampled_from([0.0, 350.0, 1e9]))
def test_an_accelerator_sees_sizes_only(widths: list[int], allowance: float) -> None:
    layout = Bucketed()
    for group in layout.groups(widths, allowance=allowance, most=1 << 20):
        assert group.rows == row_size(group.rows)
        assert group.columns == column_size(group.columns)
        assert layout.logits(len(group.members), group) >= len(group.members)


def test_an_allowance_counts_calls_in_tokens() -> None:
    assert Exact(setup=6e7).allowance(2_000_000) == 30
    assert Bucketed(setup=8e10, rest=2e7).allowance(20_000_000) == 2000


@given(count=st.integers(1, 5000))
def test_sizes_hold_what_they_are_for(count: int) -> None:
    for size in (row_size, column_size, power_of_two):
        assert size(count) >= count
        assert size(size(count)) == size(count)
    assert row_size_within(count) <= count
    assert row_size(row_size_within(count)) == row_size_within(count)
    # A text is padded by less than half of its length once it has a few tokens.
    assert column_size(count) <= max(2, 1.5 * count)


COUNTS = {2: 149, 3: 159, 4: 256, 5: 203, 6: 157, 7: 58, 8: 17, 9: 1}
"""How many of 1,000 CounterFact edits have as many tokens from the subject's last one on, with SmolLM2's tokenizer."""


def test_a_stream_of_a_thousand_edits_has_few_shapes_and_little_padding() -> None:
    """At the size of an 8B model's block; edits finish at random steps, as they do with a stop loss."""
    layout, generator = Bucketed(), random.Random(0)
    widths = [width for width, count in COUNTS.items() for _ in range(count)]
    generator.shuffle(widths)
    allowance, shapes, real, computed = layout.allowance(218_000_000), set[tuple[int, int]](), 0, 0
    for start in range(0, 1000, 100):
        edits = widths[start : start + 100]
        ends = [generator.randint(6, 25) for _ in edits]
        # Six contexts and the essence of each edit.
        rows = [[*[width] * 6, 1] for width in edits]
        groups, widths_now = list[Group](), list[int]()
        for step in range(25):
            if step % layout.patience == 0:
                left = [edit for edit, end in enumerate(ends) if end > step]
                texts = [width for edit in left for width in rows[edit]]
                if not texts:
                    break
                smaller = layout.groups(texts, allowance=allowance, most=24576)
                if not groups or layout.shrinks(groups, smaller, allowance=allowance):
                    groups, widths_now = smaller, texts
            shapes |= {(group.rows, group.columns) for group in groups}
            real += sum(widths_now)
            computed += sum(group.tokens for group in groups)
    assert len(shapes) <= 12, sorted(shapes)
    assert 1 - real / computed <= 0.3


def test_rows_are_laid_out_anew_only_if_that_saves_much_work() -> None:
    layout = Bucketed()
    many, fewer = ([Group(tuple(range(rows)), rows, 4)] for rows in (256, 64))
    assert layout.shrinks(many, fewer, allowance=10.0)
    assert not layout.shrinks(many, fewer, allowance=1e6)
    assert not layout.shrinks(many, many, allowance=0.0)
    assert Exact().shrinks(many, many, allowance=1e6)
    assert work(many, 10.0) == 256 * 4 + 10.0


def test_the_policy_follows_the_type_of_device() -> None:
    assert layout_for("cpu") == Exact()
    assert layout_for("cuda") == layout_for("xpu") == Bucketed()


def twice(function: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Stand in for a graph: a replay computes on the recording's own inputs into its own outputs."""
    outputs = tuple(output.clone() for output in function())

    def replay() -> None:
        for held, output in zip(outputs, function(), strict=True):
            held.copy_(output)

    return outputs, replay


def accelerated(loaded: LoadedModel, *, setup: float = 1e4) -> Engine:
    """Return the engine of an accelerator on the CPU, with a recorder that computes; no graph is captured here."""
    replays = Recorded(loaded.model, twice, name="recorded")
    return Engine(loaded, Bucketed(setup=setup, rest=0.0), replays, quick=True)


def values(loaded: LoadedModel, facts: Sequence[EditRequest], options: TargetOptions, engine: Engine) -> list[Tensor]:
    result = optimise(loaded, facts, PREFIXES, LAYER, options, Silent(), engine=engine)
    return [result.target - result.initial, result.initial, result.written, result.loss[None]]


@pytest.mark.parametrize("family", families())
def test_an_accelerators_way_gives_the_same_targets(family: str, tmp_path: Path) -> None:
    """Padded, with grouped attention and fused norms, from recordings that serve two batches."""
    loaded = opened(tmp_path / "model", family)
    engine = accelerated(loaded)
    for facts in (requests(), requests()[::-1]):
        exact = values(loaded, facts, OPTIONS, engine_for(loaded))
        fast = values(loaded, facts, OPTIONS, engine)
        for one, other in zip(fast, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4)
        assert float((fast[0] - exact[0]).norm() / exact[0].norm()) < 1e-3


@pytest.mark.parametrize("setup", [0.0, 1e4, 1e18])
@pytest.mark.parametrize("stop", ["loss", "greedy"])
def test_edits_stop_where_they_would_alone(setup: float, stop: str, tmp_path: Path) -> None:
    """Looking at every fourth step only changes no edit's loss, offset or end."""
    loaded = opened(tmp_path / "model", "llama")
    first = values(loaded, requests(), replace(OPTIONS, steps=1), engine_for(loaded))[3]
    options = replace(
        OPTIONS, steps=14, stop=stop, stop_patience=1, stop_loss=float(first.sort().values[0, 1:3].mean())
    )
    exact = values(loaded, requests(), options, engine_for(loaded))
    fast = values(loaded, requests(), options, accelerated(loaded, setup=setup))
    for one, other in zip(fast, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_recording_serves_every_chunk_of_its_shape(tmp_path: Path) -> None:
    loaded = opened(tmp_path / "model", "llama")
    made: list[int] = []

    def counting(function: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        made.append(1)
        return twice(function)

    replays = Recorded(loaded.model, counting, name="recorded")
    engine = Engine(loaded, Bucketed(setup=1e18), replays, quick=True)
    facts = requests()
    for batch in (facts[:3], facts[1:4], facts[2:5]):
        values(loaded, batch, OPTIONS, engine)
    # Per shape: the distributions before, the step, and the last evaluation without a gradient.
    assert len(made) <= 6
    assert engine.used == {"recorded", "grouped-attention"}


def test_a_recording_that_fails_leaves_the_plain_way(tmp_path: Path) -> None:
    loaded = opened(tmp_path / "model", "llama")

    def failing(function: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    replays = Recorded(loaded.model, failing, name="recorded")
    engine = Engine(loaded, Bucketed(setup=1e4), replays, quick=True)
    fast, exact = (values(loaded, requests(), OPTIONS, way) for way in (engine, engine_for(loaded)))
    torch.testing.assert_close(fast[0], exact[0], rtol=1e-3, atol=1e-4)
    assert replays.failure == "operation not permitted when stream is capturing"
    assert "eager" in engine.used


def test_a_weight_that_moved_drops_the_recordings(tmp_path: Path) -> None:
    """A graph holds addresses; a weight that is replaced in place keeps its own, one that is swapped does not."""
    loaded = opened(tmp_path / "model", "llama")
    engine = accelerated(loaded)
    before = values(loaded, requests(), OPTIONS, engine)
    head = loaded.architecture.projection(LAYER + 1)
    head.weight = torch.nn.Parameter(-head.get_parameter("weight").detach(), requires_grad=False)
    after, exact = values(loaded, requests(), OPTIONS, engine), values(loaded, requests(), OPTIONS, engine_for(loaded))
    torch.testing.assert_close(after[0], exact[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(before[0], after[0], rtol=1e-2)


def test_half_precision_stays_within_its_rounding(tmp_path: Path) -> None:
    loaded = opened(tmp_path / "model", "llama")
    model: Any = loaded.model
    model.to(torch.bfloat16)
    options = replace(OPTIONS, steps=3)
    exact, fast = (
        values(loaded, requests(), options, engine_for(loaded)),
        values(loaded, requests(), options, accelerated(loaded)),
    )
    assert float((fast[0] - exact[0]).norm() / exact[0].norm()) < 0.1
    assert len(FACTS) == fast[3].numel()


def test_another_attention_between_two_batches_still_sees_the_past(tmp_path: Path) -> None:
    """Past keys and values that lie apart are for grouped attention alone."""
    loaded = opened(tmp_path / "model", "llama")
    engine, model = accelerated(loaded), cast(Any, loaded.model)
    values(loaded, requests(), OPTIONS, engine)
    assert engine.apart
    model.set_attn_implementation("eager")
    fast, exact = (values(loaded, requests(), OPTIONS, way) for way in (engine, engine_for(loaded)))
    torch.testing.assert_close(fast[0], exact[0], rtol=1e-3, atol=1e-4)
    assert not engine.apart


def test_a_run_records_no_graphs_that_it_did_not_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does more between its blocks than call them runs its own forward pass, which is never recorded."""
    loaded = opened(tmp_path / "model", "llama")
    monkeypatch.setattr(Steering, "check", through_the_whole_model)
    engine = accelerated(loaded)
    fast, exact = (values(loaded, requests(), OPTIONS, way) for way in (engine, engine_for(loaded)))
    torch.testing.assert_close(fast[0], exact[0], rtol=1e-3, atol=1e-4)
    assert engine.used == {"eager", "grouped-attention"}


def test_a_recording_that_does_not_fit_the_memory_leaves_the_plain_way_for_its_shape(tmp_path: Path) -> None:
    """The call itself fitted, so the batch is not halved, and other shapes are recorded."""
    loaded = opened(tmp_path / "model", "llama")
    tried: list[int] = []

    def full_at_first(function: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        tried.append(1)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("made up")
        return twice(function)

    replays = Recorded(loaded.model, full_at_first, name="recorded")
    engine = Engine(loaded, Bucketed(setup=1e18), replays, quick=True)
    exact = values(loaded, requests(), OPTIONS, engine_for(loaded))
    for _ in range(2):
        fast = values(loaded, requests(), OPTIONS, engine)
        torch.testing.assert_close(fast[0], exact[0], rtol=1e-3, atol=1e-4)
    # The distributions before, which do not fit and are not tried again, the step, and the last evaluation.
    assert len(tried) == 3
    assert replays.failure is None


@pytest.mark.parametrize("error", [TypeError("no such argument"), AttributeError("no such field"), ValueError()])
def test_an_error_of_a_familys_code_while_it_is_recorded_leaves_the_plain_way(error: Exception, tmp_path: Path) -> None:
    loaded = opened(tmp_path / "model", "llama")

    def failing(function: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        raise error

    replays = Recorded(loaded.model, failing, name="recorded")
    engine = Engine(loaded, Bucketed(setup=1e4), replays, quick=True)
    fast, exact = (values(loaded, requests()[:1], OPTIONS, way) for way in (engine, engine_for(loaded)))
    torch.testing.assert_close(fast[0], exact[0], rtol=1e-3, atol=1e-4)
    assert replays.failure == (str(error) or "ValueError")


@pytest.mark.parametrize(("free", "remain"), [(5, False), (50, True)])
def test_recordings_are_given_back_where_memory_is_short(
    free: int, remain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The phases after targets cannot use the memory of recordings."""
    loaded = opened(tmp_path / "model", "llama")
    monkeypatch.setattr("editcli.editing.engine.free_memory", lambda device: Memory(free, 1 << 30, 100))
    alive = weakref.WeakSet[Any]()

    def watched(function: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        outputs, replay = twice(function)
        alive.update(outputs)
        return outputs, replay

    replays = Recorded(loaded.model, watched, name="recorded")
    engine = Engine(loaded, Bucketed(setup=1e4), replays, quick=True)
    values(loaded, requests(), OPTIONS, engine)
    assert bool(list(alive)) is remain


def test_graphs_share_a_pool_for_as_long_as_one_of_them_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device is here: that a new capture into an abandoned pool fails is torch's rule, not shown by this test."""

    class Graph:
        def replay(self) -> None: ...

    pools, used = iter(range(9)), list[int]()

    def capturing(graph: Graph, *, pool: int) -> AbstractContextManager[None]:
        used.append(pool)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    record, made = CudaGraphs(torch.device("cuda")), list[Any]()
    made.extend(record(lambda: (torch.ones(1),)) for _ in range(2))
    made.clear()
    made.append(record(lambda: (torch.ones(1),)))
    assert used == [0, 0, 1]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj"])
def test_padding_stays_within_the_models_context(family: str, cached: bool, tmp_path: Path) -> None:
    """A model with learned positions has none beyond its context, which need not be one of the sizes."""
    context = 28
    small: Any = {"max_position_embeddings" if family == "opt" else "n_positions": context}
    loaded = open_model(resolve_model(tiny_model_folder(tmp_path / "model", family, **small)))
    fact, words = FACTS[0], "the river was in the city by the company of the tower and it is"
    prompt = from_record({"id": "1", "prompt": f"{words} {words[:24]} {{}} is", "subject": fact[1], "target_new": "a"})
    options = replace(OPTIONS, steps=3, cached=cached)
    fast, exact = (
        optimise(loaded, [prompt], (), LAYER, options, Silent(), engine=engine)
        for engine in (accelerated(loaded, setup=1e18), engine_for(loaded))
    )
    torch.testing.assert_close(fast.target, exact.target, rtol=1e-3, atol=1e-4)
    (text,) = loaded.tokens.encode([loaded.tokens.locate(prompt, " a")])
    assert column_size(len(text.ids) - 1) > context >= len(text.ids)


def test_processes_that_share_a_model_work_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches do not follow the free memory of one process's device, and no step is recorded."""
    loaded = opened(tmp_path / "model", "llama")
    monkeypatch.setattr("editcli.editing.engine.free_memory", lambda device: Memory(1 << 40, 0, 1 << 40))
    engine, device = accelerated(loaded), torch.device("cuda")
    assert engine.most_tokens(OPTIONS, LAYER) > BATCH_TOKENS
    assert isinstance(replays_for(loaded.model, device), Recorded)
    weight: Any = loaded.architecture.projection(LAYER).weight
    weight.device_mesh = object()
    assert engine.most_tokens(OPTIONS, LAYER) == BATCH_TOKENS
    assert isinstance(replays_for(loaded.model, device), Eager)


@dataclass(frozen=True, eq=False)
class Constant:
    """What many calls share."""

    matrix: Tensor
    scale: Tensor


def scaled(constant: Constant, rows: Tensor) -> tuple[Tensor, ...]:
    """A function to record."""
    return (rows @ constant.matrix * constant.scale,)


def constants(generator: torch.Generator, *sizes: int) -> Iterator[Constant]:
    for size in sizes:
        yield Constant(torch.randn(3, size, generator=generator), torch.randn(size, generator=generator))


def test_recordings_that_share_memory_read_their_own_inputs() -> None:
    """Whichever ran last, whether its object still lives, and whatever has taken the place of one that is gone."""
    generator = torch.Generator().manual_seed(0)
    replays, held = Recorded(nn.Identity(), twice, name="recorded"), list[Constant]()
    for _ in range(6):
        held = list(constants(generator, 8, 4, 4, 2))
        for constant in (*held, *reversed(held), *held):
            rows = torch.randn(5, 3, generator=generator)
            (fast,) = replays("scaled", scaled, constant, rows)
            torch.testing.assert_close(fast, scaled(constant, rows)[0])
    assert replays.failure is None


def test_a_copy_that_was_interrupted_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    replays, (one, other) = Recorded(nn.Identity(), twice, name="recorded"), constants(generator, 4, 4)
    rows, real = torch.randn(5, 3, generator=generator), Tensor.copy_
    replays("scaled", scaled, one, rows)

    def interrupted(self: Tensor, source: Tensor) -> Tensor:
        if source is other.scale:
            raise KeyboardInterrupt
        return real(self, source)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            replays("scaled", scaled, other, rows)
    torch.testing.assert_close(replays("scaled", scaled, one, rows), scaled(one, rows))


WAITING = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "lift_fresh"})
"""Operations that wait for an accelerator, or copy a number of the program to it, neither of which a graph can hold."""
OWN_COPIES = frozenset({"gpt_neo", "falcon-parallel", "falcon-new"})
"""Families whose own attention makes a tensor of a number at every call."""


class Capturing(TorchDispatchMode):
    """Refuses what a graph that is captured would refuse, by name; the device itself is not here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            raise RuntimeError(f"{name} while a step is recorded")
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(
    not hasattr(import_utils, "is_cuda_stream_capturing"),
    reason="this version of transformers looks at values while a graph is captured",
)
@pytest.mark.parametrize("family", families(name for name in TINY if name not in OWN_COPIES))
def test_a_recorded_step_never_waits_for_the_device(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = opened(tmp_path / "model", family)

    def captured(function: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        # transformers leaves out its own checks of values while it sees a capture.
        with monkeypatch.context() as patch, Capturing():
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            function()
        return twice(function)

    replays = Recorded(loaded.model, captured, name="recorded")
    engine = Engine(loaded, Bucketed(setup=1e4, rest=0.0), replays, quick=True)
    for stop in ("loss", "greedy"):
        values(loaded, requests(), replace(OPTIONS, steps=2, stop=stop), engine)
    assert replays.failure is None
