"""Target optimisation: the published one-at-a-time procedure against ours, at several batch sizes.

``python -m benchmarks.targets`` prints one table and writes benchmarks/results/targets.json; ``--curves`` adds cost
against work. Edits per second are wall time, compared within one run in interleaved rounds, as medians; the stop
threshold is switched off so that every edit costs all its steps. Layers are those of the model's preset or guess.
"published" makes the head's product twice, as the published code does; "one head" is the same procedure without that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import bundled, median, random_model, sample_edits, write_result
from benchmarks.reference import plain_target
from editcli.editing.session import generate_prefixes
from editcli.editing.targets import optimise
from editcli.heap import keep_freed
from editcli.models.architectures import resolve
from editcli.models.loading import LoadedModel
from editcli.presets.loader import load_preset
from editcli.reporting import Silent
from editcli.requests.schema import EditRequest
from editcli.settings.core import TargetOptions

WIDTH, VOCABULARY = 512, 8192
"""Shape of the random GPT-2 whose depth and prompts grow in the curves."""


def opened(name: str, device: str) -> LoadedModel:
    """Open the bundled model or build a random one of a known shape."""
    return bundled(device) if name == "bundled" else random_model(name, device=device)


def last_layer(loaded: LoadedModel) -> int:
    """Return the last layer that the model's preset, or the guess for it, edits."""
    return load_preset(loaded.model.config, loaded.architecture).layers[-1]


def plain_seconds(
    loaded: LoadedModel, edits: Sequence[EditRequest], options: TargetOptions, *, second_head: bool
) -> float:
    """Return the seconds of the published procedure for one edit."""
    prefixes = generate_prefixes(loaded, options, seed=0)
    started = time.perf_counter()
    for edit in edits:
        plain_target(loaded, edit, prefixes, last_layer(loaded), options, second_head=second_head)
    return (time.perf_counter() - started) / len(edits)


def our_seconds(loaded: LoadedModel, edits: Sequence[EditRequest], options: TargetOptions) -> float:
    """Return the seconds of ours for one edit of a batch."""
    prefixes = generate_prefixes(loaded, options, seed=0)
    started = time.perf_counter()
    optimise(loaded, edits, prefixes, last_layer(loaded), options, Silent())
    return (time.perf_counter() - started) / len(edits)


def compared(
    loaded: LoadedModel, batches: Sequence[int], plain_edits: int, repeats: int, options: TargetOptions
) -> dict[int, dict[str, list[float]]]:
    """Return edits per second of every way in every round, by batch size."""
    our_seconds(loaded, sample_edits(1), replace(options, steps=2))
    found = {batch: {"published": [], "one head": [], "ours": []} for batch in batches}
    few = sample_edits(plain_edits)
    for _ in range(repeats):
        published = plain_seconds(loaded, few, options, second_head=True)
        one_head = plain_seconds(loaded, few, options, second_head=False)
        for batch, rates in found.items():
            rates["published"].append(1 / published)
            rates["one head"].append(1 / one_head)
            rates["ours"].append(1 / our_seconds(loaded, sample_edits(batch), options))
    return found


def summarised(name: str, loaded: LoadedModel, batch: int, rates: dict[str, list[float]]) -> dict[str, Any]:
    """Return a row of the table: medians, and medians of the ratios of each round."""

    def ratio(to: str) -> float:
        return median([ours / other for ours, other in zip(rates["ours"], rates[to], strict=True)])

    return {
        "model": name,
        "batch": batch,
        "layer": last_layer(loaded),
        "layers": loaded.architecture.layers,
        "edits_per_second": {how: median(found) for how, found in rates.items()},
        "ratio": ratio("published"),
        "ratio_one_head": ratio("one head"),
    }


def grown(layers: int) -> LoadedModel:
    """Build a random GPT-2 of a given depth in memory."""
    config = AutoConfig.for_model("gpt2", n_embd=WIDTH, n_layer=layers, n_head=8, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return replace(bundled(), model=model, architecture=resolve(model))


def longer(edits: Sequence[EditRequest], words: int) -> list[EditRequest]:
    """Return the edits with ``words`` more words in front of their prompts."""
    before = "and then one day they said that it was all so very good " * (words // 13 + 1)
    return [edit.in_context(" ".join(before.split()[:words]) + " ") for edit in edits]


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of ``work``, which other programs on the machine change little."""
    started = time.process_time()
    work()
    return time.process_time() - started


def curves(edits: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """Return edits per CPU second of ours as prompts and as depth double; everything else stays."""
    options = TargetOptions(steps=steps, stop_loss=0.0, lr=0.1)
    batch = sample_edits(edits)
    base = grown(8)
    by_words = [(words, base, longer(batch, words)) for words in (0, 16, 32, 64, 128)]
    by_layers = [(layers, grown(layers), batch) for layers in (4, 8, 16, 32)]
    found: dict[str, list[dict[str, float]]] = {}
    for axis, points in (("words", by_words), ("layers", by_layers)):
        for size, loaded, work in points:
            rate = len(work) / min(cpu_seconds(partial(our_seconds, loaded, work, options)) for _ in range(2))
            found.setdefault(axis, []).append({axis: size, "edits_per_second": rate})
    return found


@click.command()
@click.option("--model", "names", multiple=True, default=("bundled", "gpt2-124m"), show_default=True)
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 10, 100), show_default=True)
@click.option("--plain-edits", default=2, show_default=True, help="Edits of the plain path in each round.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--curves", "with_curves", is_flag=True, help="Also measure cost against prompt length and depth.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(
    names: tuple[str, ...],
    batches: tuple[int, ...],
    plain_edits: int,
    repeats: int,
    steps: int,
    with_curves: bool,
    device: str,
    out: Path | None,
) -> None:
    """Time target optimisation, plain and ours, and print edits per second and their ratio."""
    keep_freed()
    options = TargetOptions(steps=steps, stop_loss=0.0, lr=0.1)
    table = Table("model", "layer", "batch", "published edits/s", "one head edits/s", "ours edits/s", "ratio")
    rows = []
    for name in names:
        loaded = opened(name, device)
        for batch, rates in compared(loaded, batches, plain_edits, repeats, options).items():
            row = summarised(name, loaded, batch, rates)
            rows.append(row)
            speeds = (f"{speed:.2f}" for speed in row["edits_per_second"].values())
            table.add_row(name, f"{row['layer']} of {row['layers']}", str(batch), *speeds, f"{row['ratio']:.1f}")
    Console().print(table)
    result = {"steps": steps, "repeats": repeats, "threads": torch.get_num_threads(), "rows": rows}
    write_result("targets", {**result, **({"curves": curves(20, 5)} if with_curves else {})}, out)


if __name__ == "__main__":
    main()
