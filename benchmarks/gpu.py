"""Random bfloat16 models of real shapes on an accelerator: edits per second, ways to run a step, matrix-unit use.

``python -m benchmarks.gpu`` runs unattended in under six minutes, stops starting work after ``--limit`` seconds,
prints one table and writes benchmarks/results/gpu.json. ``--shapes tiny --device cpu`` runs the same script small where
there is no accelerator. Every edit takes all its steps, which is the worst case: random weights reach no threshold.
The procedure of the papers, one edit at a time, runs on the same model and card in the same minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import random_model, sample_edits, write_result
from benchmarks.reference import plain_target
from editcli.editing.engine import Engine, engine_for
from editcli.editing.layout import Bucketed, Exact, Group, Layout
from editcli.editing.replay import Eager
from editcli.editing.session import ModelSession
from editcli.models.forward import replaced_forward
from editcli.models.loading import LoadedModel, choose_device
from editcli.plugin.interfaces import Problem, Site, Update, Values
from editcli.plugin.leastsquares import InverseGram, working_dtype
from editcli.presets.loader import load_preset
from editcli.reporting import Silent
from editcli.requests.schema import EditRequest
from editcli.settings.core import TargetOptions

COUNTERFACT = 20_877
"""Edits of the whole CounterFact stream."""
PHASES = ("targets", "keys", "solve", "write")
ROUNDS = {1: 5, 10: 3, 100: 2}
"""Batches that count, by size, after one that does not; a larger batch is timed once."""
LARGE = 512
"""A batch from this size on is timed without a warm-up."""
PROFILED = 5
"""Steps of a batch that is profiled."""


def now(device: torch.device) -> float:
    """Return the time once everything that was asked of ``device`` is done."""
    if device.type != torch.device("cpu").type:
        torch.accelerator.synchronize()
    return time.perf_counter()


def matrix_rate(device: torch.device, size: int, *, products: int = 10, repeats: int = 5) -> float:
    """Measure a device's bfloat16 matrix rate in FLOP/s: the best of several rows of products of random matrices."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out, times = torch.empty_like(left), []
    for _ in range(repeats + 1):
        started = now(device)
        for _ in range(products):
            torch.mm(left, right, out=out)
        times.append(now(device) - started)
    return 2 * size**3 * products / min(times[1:])


def memory(device: torch.device, figure: str) -> int | None:
    """Return a figure of the device's allocator, such as ``max_memory_allocated``; None where it keeps none."""
    ask = getattr(torch.get_device_module(device), figure, None)
    return None if ask is None or device.type == torch.device("cpu").type else int(ask(device))


def reset_peak(device: torch.device) -> None:
    """Start the allocator's peak anew at what is allocated now, where it keeps one."""
    reset = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
    if reset is not None:
        reset(device)


class Counted:
    """A layout that counts the shapes of its groups and their padding."""

    def __init__(self, layout: Layout):
        self.layout, self.patience = layout, layout.patience
        self.shapes: set[tuple[int, int]] = set()
        self.real = self.computed = 0

    def allowance(self, block: int) -> float:
        """Return the layout's allowance."""
        return self.layout.allowance(block)

    def groups(self, widths: Sequence[int], *, allowance: float, most: int) -> list[Group]:
        """Return the groups of the layout."""
        groups = self.layout.groups(widths, allowance=allowance, most=most)
        self.shapes |= {(group.rows, group.columns) for group in groups}
        self.real += sum(widths)
        self.computed += sum(group.tokens for group in groups)
        return groups

    def past(self, columns: int) -> int:
        """Return the layout's past columns."""
        return self.layout.past(columns)

    def logits(self, count: int, group: Group) -> int:
        """Return the layout's number of logits."""
        return self.layout.logits(count, group)

    def shrinks(self, now: Sequence[Group], smaller: Sequence[Group], *, allowance: float) -> bool:
        """Return the layout's answer."""
        return self.layout.shrinks(now, smaller, allowance=allowance)


def ways() -> dict[str, Callable[[LoadedModel], Engine]]:
    """Return how a batch can be run: as shipped, and what that is compared with."""
    bucketed = Bucketed()
    return {
        "shipped": engine_for,
        "compiled": engine_for,
        "eager": lambda loaded: Engine(loaded, bucketed, Eager(), quick=True),
        "exact": lambda loaded: Engine(loaded, Exact(), Eager(), quick=False),
    }


@contextmanager
def compiled(mlps: Sequence[nn.Module]) -> Iterator[None]:
    """Run MLPs through torch.compile, whose kernels join the operations between two products."""
    with ExitStack() as stack:
        for mlp in mlps:
            stack.enter_context(replaced_forward(mlp, torch.compile(mlp.forward, dynamic=True)))
        yield


@dataclass(slots=True)
class Bench:
    """One model under edit and the clocks of its phases."""

    session: ModelSession
    device: torch.device
    grams: dict[Site, InverseGram] = field(default_factory=dict)
    compiled: Sequence[nn.Module] = ()
    """MLPs that run through torch.compile while targets are optimised."""
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def prepare(self) -> None:
        """Give every site an identity for its C: no reference text is read, the sizes are the real ones."""
        size, kind = self.session.loaded.architecture.shape(0)[1], working_dtype(self.device)
        for site in self.session.sites:
            self.grams[site] = InverseGram(torch.eye(size, device=self.device, dtype=kind), site.module, Silent())

    def batch(self, edits: Sequence[EditRequest]) -> None:
        """Write one batch as the program does, one phase after the other."""
        # Compiled modules call no hooks, which the keys are read by.
        with compiled(self.compiled):
            values = self._timed("targets", lambda: self.session.values(edits))
        for site in self.session.sites:
            problem = self._timed("keys", lambda site=site: self._read(edits, site, values))
            update = self._timed("solve", lambda site=site, problem=problem: self._solve(site, problem))
            self._timed("write", lambda site=site, update=update: self.session.write(site, update))

    def _read(self, edits: Sequence[EditRequest], site: Site, values: Values) -> Problem:
        return Problem(site, self.session.keys(edits, site), self.session.residual(edits, site, values))

    def _solve(self, site: Site, problem: Problem) -> Update:
        update = self.grams[site].solve(problem.keys, problem.residual)
        self.grams[site] = self.grams[site].downdated(problem.keys)
        return update

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        started = now(self.device)
        found = work()
        self.spent[phase] += now(self.device) - started
        return found

    def target_operations(self, edits: Sequence[EditRequest]) -> float:
        """Return the least operations of one step of target optimisation, in FLOP.

        Two per weight and token forward, two backward (no weight has a gradient): the blocks above the last edited one
        at the tokens from the lookup token on, and the head at the targets' tokens and the essence prompts.
        """
        loaded, contexts = self.session.loaded, 1 + len(self.session.prefixes)
        architecture = loaded.architecture
        above = range(self.session.layers[-1] + 1, architecture.layers)
        blocks = sum(_matrices(architecture.block(layer)) for layer in above)
        encoded = loaded.tokens.encode([loaded.tokens.locate(edit, edit.target_new) for edit in edits])
        steered = sum(len(text.ids) - 1 - text.lookup for text in encoded) * contexts + len(edits)
        told = sum(len(text.target) for text in encoded) * contexts + len(edits)
        return 4.0 * (blocks * steered + _matrices(architecture.head) * told)


def _matrices(module: nn.Module) -> int:
    """Return the number of weights that take part in matrix products."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)


@dataclass(frozen=True, slots=True)
class Measured:
    """One way with batches of one size on one shape."""

    shape: str
    way: str
    engine: str
    """The names of what the program used."""
    batch_size: int
    batches: int
    seconds_per_batch: dict[str, float]
    edits_per_second: float
    speedup: float
    """Edits a second over those of the published procedure, whose targets alone are timed."""
    matrix_share: float
    """The least operations of the targets over the measured rate of matrix products."""
    busy: float | None
    """The device's share of the time of the targets, from a profile of one more batch."""
    shapes: int
    padding: float
    """The share of padded tokens in the layouts that were made."""
    peak_bytes: int | None
    """The most bytes that were allocated at once."""
    reserved_bytes: int | None
    """The most bytes that the allocator held, scratch memory of recordings included."""


@dataclass(slots=True)
class Script:
    """What all measurements of a run share."""

    device: torch.device
    steps: int
    limit: float
    profiled: bool
    began: float = field(default_factory=time.perf_counter)

    @property
    def over(self) -> bool:
        """Whether no further work is to be started."""
        return time.perf_counter() - self.began > self.limit

    def shape(self, name: str, layers: Sequence[int], batches: Sequence[int], chosen: Sequence[str]) -> dict[str, Any]:
        """Measure one shape: the published procedure, every batch size as shipped, and the other ways at one size."""
        loaded = random_model(name, device=str(self.device), dtype=torch.bfloat16)
        sites = list(layers) or list(load_preset(loaded.model.config, loaded.architecture).layers)
        options = TargetOptions(steps=self.steps, lr=0.1, stop_loss=0.0)
        session = ModelSession(loaded, sites, options=options, save_dtype=torch.bfloat16)
        bench = Bench(session, self.device)
        bench.prepare()
        published = self._published(bench, options)
        rate = matrix_rate(self.device, 8192 if memory(self.device, "memory_allocated") is not None else 512)
        model_bytes = memory(self.device, "memory_allocated")
        common = min(batches, key=lambda size: abs(size - 100))
        plan = [("shipped", size) for size in batches] + [(way, common) for way in chosen if way != "shipped"]
        rows = []
        for way, size in plan:
            if not self.over or not rows:
                rows.append(self._measure(bench, name, way, size, published, rate, busy=size == common))
                Console().print(_line(rows[-1]))
        return {
            "layers": sites,
            "published_seconds": published,
            "matrix_flops": rate,
            "model_bytes": model_bytes,
            "rows": [asdict(row) for row in rows],
        }

    def _published(self, bench: Bench, options: TargetOptions) -> float:
        """Return the seconds of one edit's target by the published procedure, the second of two edits."""
        session, seconds = bench.session, 0.0
        for edit in sample_edits(2):
            started = now(self.device)
            plain_target(session.loaded, edit, session.prefixes, session.layers[-1], options, second_head=True)
            seconds = now(self.device) - started
        return seconds

    def _measure(
        self, bench: Bench, name: str, way: str, size: int, published: float, rate: float, *, busy: bool
    ) -> Measured:
        session, loaded = bench.session, bench.session.loaded
        engine = ways()[way](loaded)
        counted = Counted(engine.layout)
        session.engine = replace(engine, layout=counted)
        rounds, edits = ROUNDS.get(size, 1), sample_edits(size * (ROUNDS.get(size, 1) + 2))
        if self.device.type != "cpu":
            torch.get_device_module(self.device).empty_cache()
        reset_peak(self.device)
        last = loaded.architecture.layers - 1
        above = range(session.layers[-1] + 1, last)
        # The last one is cut to the positions that are read, in a way of its own.
        bench.compiled = [loaded.architecture.mlp(layer) for layer in above] if way == "compiled" else ()
        if size < LARGE:
            bench.batch(edits[:size])
        bench.spent = dict.fromkeys(PHASES, 0.0)
        done = 0
        while done < rounds and (done == 0 or not self.over):
            done += 1
            bench.batch(edits[done * size : (done + 1) * size])
        spent = dict(bench.spent)
        # The peak of a profile is not that of the program.
        peak, reserved = (memory(self.device, f"max_memory_{kind}") for kind in ("allocated", "reserved"))
        share = self._busy(bench, edits[-size:]) if busy else None
        session.engine.replays.clear()
        per_second = done * size / sum(spent.values())
        work = self.steps * bench.target_operations(edits[size : 2 * size]) * done
        return Measured(
            shape=name,
            way=way,
            engine=", ".join(sorted(session.engine.used)),
            batch_size=size,
            batches=done,
            seconds_per_batch={phase: seconds / done for phase, seconds in spent.items()},
            edits_per_second=per_second,
            speedup=per_second * published,
            matrix_share=work / spent["targets"] / rate,
            busy=share,
            shapes=len(counted.shapes),
            padding=1 - counted.real / counted.computed,
            peak_bytes=peak,
            reserved_bytes=reserved,
        )

    def _busy(self, bench: Bench, edits: Sequence[EditRequest]) -> float | None:
        """Return the device's share of the time of one more batch's targets, with few steps."""
        if not self.profiled or self.device.type != "cuda":
            return None
        session, all_steps = bench.session, bench.session.options
        # Few steps, because a profile keeps every kernel.
        session.options = replace(all_steps, steps=PROFILED)
        with compiled(bench.compiled):
            session.values(edits)
            started = now(self.device)
            session.values(edits)
            seconds = now(self.device) - started
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                session.values(edits)
                now(self.device)
        session.options = all_steps
        events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in events)
        for event in events[:8]:
            share = event.self_device_time_total / total
            Console().print(f"  {share:6.1%} {event.count:6d} {event.key[:60]}", style="dim", markup=False)
        return total / 1e6 / seconds


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


@click.command()
@click.option("--shapes", default="llama-3-8b,llama-1b,smollm2-135m", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--batches", default="1,10,100,1000", show_default=True, help="Sizes of batches.")
@click.option("--ways", "chosen", default="shipped,eager,compiled,exact", show_default=True)
@click.option("--layers", default="", help="The same layers for all shapes, instead of each shape's preset.")
@click.option("--steps", default=25, show_default=True)
@click.option("--limit", default=300.0, show_default=True, help="Seconds after which nothing more is started.")
@click.option("--profile/--no-profile", "profiled", default=True, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(
    shapes: str,
    device: str,
    batches: str,
    chosen: str,
    layers: str,
    steps: int,
    limit: float,
    profiled: bool,
    out: Path | None,
) -> None:
    """Edit random models of real shapes and show where the time goes."""
    place = choose_device(device)
    script = Script(place, steps, limit, profiled)
    found: dict[str, Any] = {}
    for shape in shapes.split(","):
        if not found or not script.over:
            found[shape] = script.shape(shape, _numbers(layers), _numbers(batches), chosen.split(","))
    module: Any = torch.get_device_module(place)
    named = place.type != torch.device("cpu").type
    result = {
        "device": module.get_device_name(place) if named else "cpu",
        "steps": steps,
        "shapes": found,
        "seconds": time.perf_counter() - script.began,
    }
    Console().print(_table(result))
    write_result("gpu", result, out)


COLUMNS = ("way", "batch", "edits/s", "x", "matrix", "busy", "shapes", "pad", "GB", "held")


def _cells(row: Measured) -> tuple[str, ...]:
    return (
        row.way,
        str(row.batch_size),
        f"{row.edits_per_second:.2f}",
        f"{row.speedup:.1f}",
        f"{row.matrix_share:.0%}",
        "n/a" if row.busy is None else f"{row.busy:.0%}",
        str(row.shapes),
        f"{row.padding:.0%}",
        *("n/a" if size is None else f"{size / 1e9:.1f}" for size in (row.peak_bytes, row.reserved_bytes)),
    )


def _line(row: Measured) -> str:
    spent = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in row.seconds_per_batch.items())
    return f"{row.shape} {' '.join(_cells(row))} | {spent} | {row.engine}"


def _table(result: dict[str, Any]) -> Table:
    title = f"{result['device']}, {result['steps']} steps, {result['seconds']:.0f} s; x: published at 1"
    table = Table(*COLUMNS, title=title)
    for name, shape in result["shapes"].items():
        table.add_row(f"[bold]{name}[/]")
        for row in shape["rows"]:
            table.add_row(*_cells(Measured(**row)))
        table.add_section()
    return table


if __name__ == "__main__":
    main()
