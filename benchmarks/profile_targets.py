"""Where the time of target optimisation goes, and what each idea gives.

``python -m benchmarks.profile_targets`` prints CPU seconds by phase, for the published procedure and for ours, and the
cost of ours with one idea left out at a time, in interleaved rounds; it writes benchmarks/results/profile_targets.json.
CPU time of one thread, so that other work on the machine disturbs it little. Where an idea saves multiplications with
weights, their count predicts what leaving it out costs; the other ideas make the same work cheaper, or share it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.common import median, sample_edits, write_result
from benchmarks.reference import plain_target
from benchmarks.targets import last_layer, opened
from editcli.editing import engine, steering, targets
from editcli.editing import prompt_cache as past
from editcli.editing.layout import Exact
from editcli.editing.session import generate_prefixes
from editcli.editing.targets import target_costs
from editcli.heap import keep_freed
from editcli.models import blocks, matmul
from editcli.models.forward import hooked, run
from editcli.models.loading import LoadedModel
from editcli.reporting import Silent
from editcli.requests.schema import EditRequest
from editcli.settings.core import TargetOptions

Clock = dict[str, float]


@contextmanager
def timed_modules(loaded: LoadedModel, seconds: Clock) -> Iterator[None]:
    """Add the CPU time of attention, MLPs, the rest of the blocks, and the head while the context lasts."""
    architecture = loaded.architecture
    started: dict[tuple[str, int], float] = {}
    with ExitStack() as stack:
        for layer in range(architecture.layers):
            attention = next(m for n, m in architecture.block(layer).named_children() if "attn" in n)
            parts = {"block": architecture.block(layer), "attention": attention, "mlp": architecture.mlp(layer)}
            for name, module in parts.items():
                _watch(stack, module, name, started, seconds)
        _watch(stack, architecture.head, "head", started, seconds)
        yield
    seconds["norms and sums"] = seconds.pop("block", 0) - seconds.get("attention", 0) - seconds.get("mlp", 0)


def _watch(
    stack: ExitStack, module: nn.Module, name: str, started: dict[tuple[str, int], float], seconds: Clock
) -> None:
    def begin(owner: nn.Module, args: Any) -> None:
        started[name, id(owner)] = time.process_time()

    def end(owner: nn.Module, args: Any, output: Any) -> None:
        seconds[name] = seconds.get(name, 0) + time.process_time() - started[name, id(owner)]

    for handle in (module.register_forward_pre_hook(begin), module.register_forward_hook(end)):
        stack.callback(handle.remove)


@contextmanager
def timed_calls(calls: Mapping[str, tuple[Any, str]], seconds: Clock) -> Iterator[None]:
    """Add the CPU time of functions, given as (owner, name), under their labels."""
    with ExitStack() as stack:
        for label, (owner, name) in calls.items():
            stack.enter_context(mock.patch.object(owner, name, _timed(getattr(owner, name), label, seconds)))
        yield


def _timed(function: Callable[..., Any], label: str, seconds: Clock) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        before = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[label] = seconds.get(label, 0) + time.process_time() - before

    return run


OURS = {
    "texts": (targets, "_rows"),
    "past": (steering, "encode"),
    "lower layers": (steering.Steering, "_observe"),
    "gathering chunks": (targets._Optimiser, "_parts"),
    "loss from logits": (targets, "cross_entropies"),
    "Adam": (targets._Optimiser, "_adam"),
    "backward": (torch.autograd, "grad"),
}
PLAIN = {
    "loss from logits": (torch, "log_softmax"),
    "backward": (torch.Tensor, "backward"),
    "Adam": (torch.optim.Adam, "step"),
}


def phases(loaded: LoadedModel, edits: int, options: TargetOptions) -> dict[str, Clock]:
    """Return CPU milliseconds for an edit by phase; forward phases of ours include those of the past."""
    prefixes, layer, batch = generate_prefixes(loaded, options, seed=0), last_layer(loaded), sample_edits(edits)
    ways: dict[str, tuple[Any, Callable[[], Any], int]] = {
        "published": (
            PLAIN,
            lambda: plain_target(loaded, batch[0], prefixes, layer, options, second_head=True),
            1,
        ),
        "ours": (OURS, lambda: targets.optimise(loaded, batch, prefixes, layer, options, Silent()), edits),
    }
    found: dict[str, Clock] = {}
    for way, (calls, work, count) in ways.items():
        work()
        seconds: Clock = {}
        with timed_modules(loaded, seconds), timed_calls(calls, seconds):
            before = time.process_time()
            work()
            whole = time.process_time() - before
        found[way] = {"all": 1e3 * whole / count, **{k: 1e3 * v / count for k, v in seconds.items()}}
    return found


def _no_past(loaded: LoadedModel, texts: Any, stems: Sequence[Sequence[Any]], *, budget: int) -> Any:
    return past.encode(loaded, texts, [() for _ in stems], budget=budget)


def without() -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Return the ideas, each with a context that leaves it out."""
    patch = mock.patch.object
    return {
        "everything": nullcontext,
        "all edits of a batch at once": lambda: patch(targets, "_micro_batches", _one_by_one),
        "only from the lookup token on": lambda: patch(steering.Steering, "_cacheable", lambda self: False),
        "nothing below the edited layer": _with_lower_layers,
        "head and last MLP only where read": lambda: patch(blocks.Blocks, "logits", _everywhere),
        "oneDNN products": lambda: patch(matmul, "_available", lambda: False),
        "blocks called alone": lambda: patch(steering.Steering, "check", _always_whole),
        "shared beginnings": lambda: patch(steering, "encode", _no_past),
        "chunks of equal width": lambda: patch(engine, "layout_for", lambda device: Exact(setup=1e18)),
        "chunks that fit the caches": lambda: patch(steering, "CACHE_BYTES", 1 << 40),
    }


def _one_by_one(rows: Sequence[Any], budget: int) -> list[list[int]]:
    return [[edit] for edit in range(len(rows))]


@contextmanager
def _with_lower_layers() -> Iterator[None]:
    """Run the lower layers in every step as well; what they keep of earlier tokens is not dropped then."""
    patch = mock.patch.object
    with patch(past.KVCache, "above", lambda self, layer: self), patch(steering.Steering, "logits", _from_the_bottom):
        yield


def _from_the_bottom(self: Any, chunk: Any, shift: Any, wanted: Any, real: Any = steering.Steering.logits) -> Any:
    with torch.no_grad(), hooked(self.loaded.architecture.block(self.layer), lambda *seen: None, stop=True):
        run(self.loaded.model, chunk.ids, **chunk.options)
    return real(self, chunk, shift, wanted)


def _everywhere(self: Any, calls: Any, hidden: Any, wanted: Any, real: Any = blocks.Blocks.logits) -> Any:
    rows, columns = hidden.shape[:2]
    everywhere = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    return real(self, calls, hidden, everywhere)[wanted[0] * columns + wanted[1]]


def predicted(loaded: LoadedModel, batch: Sequence[EditRequest], contexts: int, options: TargetOptions) -> Clock:
    """Return how many times more multiplications there are without an idea that saves some."""
    architecture, layer, tokens = loaded.architecture, last_layer(loaded), loaded.tokens
    texts = tokens.encode([tokens.locate(edit, edit.target_new) for edit in batch])
    block, mlp, head = (
        sum(parameter.numel() for parameter in module.parameters())
        for module in (architecture.block(layer), architecture.mlp(layer), architecture.head)
    )
    once = sum(target_costs(loaded, batch, contexts, layer, options))
    # Every step runs this many tokens, and needs the logits of so many.
    again = sum(contexts * (len(text.ids) - 1 - text.lookup) + 1 for text in texts)
    told = sum(contexts * len(text.target) + 1 for text in texts)
    more = {
        "only from the lookup token on": sum(
            target_costs(loaded, batch, contexts, layer, replace(options, cached=False))
        )
        - once,
        "nothing below the edited layer": options.steps * again * (layer + 1) * block,
        "head and last MLP only where read": 2 * options.steps * (again - told) * (head + mlp),
    }
    return {name: 1 + count / once for name, count in more.items()}


def _always_whole(self: Any, chunk: Any, wanted: Any) -> None:
    self.whole = True


def ablations(loaded: LoadedModel, edits: int, options: TargetOptions, repeats: int) -> dict[str, float]:
    """Return how much more CPU time ours takes without each idea, as medians of ratios within rounds."""
    prefixes, layer, batch = generate_prefixes(loaded, options, seed=0), last_layer(loaded), sample_edits(edits)
    ratios: dict[str, list[float]] = {}
    for _ in range(repeats):
        seconds: Clock = {}
        for name, leave_out in without().items():
            with leave_out():
                before = time.process_time()
                targets.optimise(loaded, batch, prefixes, layer, options, Silent())
                seconds[name] = time.process_time() - before
        for name, taken in seconds.items():
            ratios.setdefault(name, []).append(taken / seconds["everything"])
    return {name: median(found) for name, found in ratios.items()}


@click.command()
@click.option("--model", "names", multiple=True, default=("bundled", "gpt2-124m"), show_default=True)
@click.option("--edits", default=20, show_default=True)
@click.option("--steps", default=5, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(names: tuple[str, ...], edits: int, steps: int, repeats: int, out: Path | None) -> None:
    """Profile target optimisation and measure what each idea gives."""
    torch.set_num_threads(1)
    keep_freed()
    options = TargetOptions(steps=steps, stop_loss=0.0, lr=0.1)
    result: dict[str, Any] = {"edits": edits, "steps": steps, "repeats": repeats, "models": {}}
    for name in names:
        loaded = opened(name, "cpu")
        shares, gains = phases(loaded, edits, options), ablations(loaded, edits, options, repeats)
        counted = predicted(loaded, sample_edits(edits), options.prefixes + 1, options)
        result["models"][name] = {"ms_per_edit": shares, "cost_without": gains, "predicted": counted}
        table = Table(f"{name}: phase", "published ms/edit", "ours ms/edit")
        for phase in dict.fromkeys((*shares["published"], *shares["ours"])):
            table.add_row(phase, *(f"{shares[way].get(phase, 0):.1f}" for way in ("published", "ours")))
        Console().print(table)
        table = Table(f"{name}: without", "predicted", "cost")
        for idea, ratio in gains.items():
            table.add_row(idea, f"{counted[idea]:.2f}" if idea in counted else "", f"{ratio:.2f}")
        Console().print(table)
    write_result("profile_targets", result, out)


if __name__ == "__main__":
    main()
