"""Choose the bundled model's preset: where its facts can be written, and how strongly.

``python -m tools.sweep_preset layers`` prints the optimised loss of target values at every layer.
``python -m tools.sweep_preset grid`` edits batches with every combination of sites, weight and clamp, and prints what
it did to efficacy, generalization, specificity and the norms. Edits come from a stream of another seed than the one
that is shipped and reported, so nothing is tuned on what it is judged by.
``python -m tools.sweep_preset revive`` tries shares of the singular values for REVIVE to protect, and ``stacks``
editors with and without NAS, on a longer part of such a stream.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.stacks import StackBench
from editcli.editing.session import generate_prefixes
from editcli.editing.sinks import usual_length
from editcli.editing.targets import optimise
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.plugin.manager import load_plugins
from editcli.presets.loader import all_presets
from editcli.reporting import Silent
from editcli.requests.reader import read_edits
from editcli.requests.schema import EditRequest, from_record
from editcli.settings.core import TargetOptions
from editcli.settings.recipe import parse_layers
from tools.bundled_model.stream import build_stream
from tools.bundled_model.world import build_world


def tuning_edits(count: int, seed: int) -> tuple[EditRequest, ...]:
    """Return edits of a stream that is not the shipped one."""
    return tuple(from_record(record) for record in build_stream(build_world(), edits=2000, seed=seed)[:count])


@click.group()
def main() -> None:
    """Sweep settings on the bundled model."""


def _open(model: str | None) -> LoadedModel:
    return open_model(resolve_model(model))


@main.command()
@click.option("--model")
@click.option("--edits", default=40, show_default=True)
@click.option("--seed", default=2, show_default=True)
@click.option("--lr", default=0.5, show_default=True)
@click.option("--clamp", default=1.0, show_default=True)
@click.option("--steps", default=20, show_default=True)
def layers(model: str | None, edits: int, seed: int, lr: float, clamp: float, steps: int) -> None:
    """Print the loss that target values reach at every layer: low where the fact can be steered."""
    loaded = _open(model)
    requests = tuning_edits(edits, seed)
    options = TargetOptions(lr=lr, clamp=clamp, steps=steps)
    prefixes = generate_prefixes(loaded, options, seed=0)
    table = Table("layer", "mean loss", "share below 0.5")
    for layer in range(loaded.architecture.layers):
        usual = usual_length(loaded, layer, batch_tokens=options.batch_tokens)
        loss = optimise(loaded, requests, prefixes, layer, options, Silent(), usual=usual).loss
        table.add_row(str(layer), f"{float(loss.mean()):.3f}", f"{float((loss < 0.5).float().mean()):.2f}")
    Console().print(table)


@main.command()
@click.option("--model")
@click.option("--corpus")
@click.option("--edits", default=100, show_default=True)
@click.option("--file", type=click.Path(path_type=Path), help="Edits to use instead of a tuning stream.")
@click.option("--batch", default=100, show_default=True)
@click.option("--seed", default=2, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--layers", "layer_sets", multiple=True, default=("0-1", "0-2", "1-3"), show_default=True)
@click.option("--weight", "weights", multiple=True, type=float, default=(300.0, 1000.0, 3000.0), show_default=True)
@click.option("--clamp", "clamps", multiple=True, type=float, default=(0.75, 1.0), show_default=True)
@click.option("--lr", "rates", multiple=True, type=float, default=(0.5,), show_default=True)
@click.option("--stack", "stacks", multiple=True, default=("memit", "memit+nas"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def grid(
    model: str | None,
    corpus: str | None,
    edits: int,
    file: Path | None,
    batch: int,
    seed: int,
    steps: int,
    layer_sets: tuple[str, ...],
    weights: tuple[float, ...],
    clamps: tuple[float, ...],
    rates: tuple[float, ...],
    stacks: tuple[str, ...],
    out: Path | None,
) -> None:
    """Edit with every combination and print one row each."""
    bench = StackBench(_open(model), load_plugins(), corpus=corpus)
    requests = read_edits(file).requests if file else tuning_edits(edits, seed)
    rows: list[dict[str, Any]] = []
    for sites, weight, clamp, rate, stack in itertools.product(layer_sets, weights, clamps, rates, stacks):
        settings = {name: {"mom2_update_weight": weight} for name in ("memit", "rlsedit")}
        settings["targets"] = {"lr": rate, "clamp": clamp, "steps": steps}
        found = bench.run(stack.split("+"), requests, batch=batch, layers=parse_layers(sites), settings=settings)
        rows.append({"layers": sites, "weight": weight, "clamp": clamp, "lr": rate, "stack": stack, **found})
        click.echo(json.dumps(rows[-1]))
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


class Tuning:
    """Stacks on the first edits of a tuning stream, with the preset's settings but for what is being tried."""

    def __init__(self, model: str | None, *, edits: int, batch: int, seed: int, prefixes: int):
        preset = next(preset for preset in all_presets() if preset.name == "bundled")
        self.settings = {**preset.settings, "targets": {**preset.settings["targets"], "prefixes": prefixes}}
        self.layers, self.batch, self.seed = preset.layers, batch, seed
        self.bench = StackBench(_open(model), load_plugins())
        self.requests = tuning_edits(edits, seed)
        self.rows: list[dict[str, Any]] = []

    def run(self, stack: str, out: Path | None, tried: Mapping[str, Mapping[str, Any]], **named: Any) -> None:
        """Edit with a stack, print its row and write the rows so far."""
        settings = {**self.settings, **tried}
        found = self.bench.run(stack.split("+"), self.requests, batch=self.batch, layers=self.layers, settings=settings)
        self.rows.append({"stack": stack, **named, "edits": len(self.requests), "seed": self.seed, **found})
        click.echo(json.dumps(self.rows[-1]))
        if out:
            out.write_text(json.dumps(self.rows, indent=1) + "\n", "utf-8")


def tuning_options(command: Any) -> Any:
    """Add what a tuning stream is."""
    for decorate in (
        click.option("--out", type=click.Path(path_type=Path)),
        click.option("--prefixes", default=1, show_default=True, help="Contexts of a target besides the bare prompt."),
        click.option("--seed", default=2, show_default=True),
        click.option("--batch", default=100, show_default=True),
        click.option("--edits", default=1000, show_default=True),
        click.option("--model"),
    ):
        command = decorate(command)
    return command


@main.command()
@tuning_options
@click.option("--tau", "taus", multiple=True, type=float, default=(0.02, 0.1, 0.3), show_default=True)
def revive(model: str | None, taus: tuple[float, ...], out: Path | None, **stream: int) -> None:
    """Edit with MEMIT alone and with every share of the singular values protected."""
    tuning = Tuning(model, **stream)
    tuning.run("memit", out, {}, tau=None)
    for tau in taus:
        tuning.run("memit+revive", out, {"revive": {"tau": tau}}, tau=tau)


@main.command()
@tuning_options
@click.option("--stack", "stacks", multiple=True, default=("memit", "memit+nas", "rlsedit", "rlsedit+nas"))
def stacks(model: str | None, stacks: tuple[str, ...], out: Path | None, **stream: int) -> None:
    """Edit with every stack."""
    tuning = Tuning(model, **stream)
    for stack in stacks:
        tuning.run(stack, out, {})


if __name__ == "__main__":
    main()
