"""How far later batches move the keys that earlier edits were written at: ``python -m benchmarks.key_drift BENCH``.

A memory of past keys (RLSEdit, AlphaEdit, ENCORE) holds the outputs for the keys that were recorded. Where several
sites are written, a later batch changes the earlier sites and thereby what enters the later ones, so that the model
asks a site with another key than the one that is remembered. For the first batch of every run in BENCH, the folder of
an ``editcli bench`` or of a horizon, this compares its bare prompts' keys k_1 and the weights W_1 right after it with
those at the end of the stream, k_n and W_n, and splits the change of a site's output into what the weights do at the
recorded key and what the moved key does ::

    W_n k_n - W_1 k_1 = (W_n - W_1) k_1 + W_n (k_n - k_1)

Each is a share of what the batch wrote, (W_1 - W_0) k_1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.common import run_folders, write_result
from benchmarks.interference import read_run
from benchmarks.markdown import table
from benchmarks.predictors import updates
from editcli.editing.session import ModelSession
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.plugin.interfaces import Site
from editcli.records.history import History

Keys = Mapping[Site, Tensor]


def examine(history: History, loaded: LoadedModel) -> list[dict[str, float]]:
    """Return the figures of every site for the first batch of a run; the model is as it was afterwards."""
    session = ModelSession(loaded, history.layers, prefixes=())
    base = session.masters()
    first = [request for name, request in history.requests().items() if name in history.batches[0].edits]
    try:
        read = []
        for batches in (history.batches[:1], history.batches[1:]):
            for batch in batches:
                for name, update in updates(history, batch.segment):
                    site = next(site for site in session.sites if site.module == name)
                    session.set_weight(site, session.weight(site) + torch.from_numpy(update).float())
            session.forget_reads()
            read.append((session.masters(), {site: session.keys(first, site).double() for site in session.sites}))
    finally:
        session.restore(base)
    (once, before), (last, after) = read
    return [figures(base[site], (once[site], before[site]), (last[site], after[site])) for site in session.sites]


def figures(base: Tensor, once: tuple[Tensor, Tensor], last: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return one site's figures from its weights and keys right after the batch and at the end."""
    (weight, keys), (final, moved) = ((part[0].double(), part[1]) for part in (once, last))
    own = float(((weight - base.double()) @ keys).norm())
    return {
        "moved": float(((moved - keys).norm(dim=0) / keys.norm(dim=0)).median()),
        "same_key": float(((final - weight) @ keys).norm()) / own,
        "moved_key": float((final @ (moved - keys)).norm()) / own,
        "together": float((final @ moved - weight @ keys).norm()) / own,
    }


def section(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe how far keys moved."""
    yield from ("## Keys that move", "")
    yield "`python -m benchmarks.key_drift FOLDER`, for the first batch of each stream, from right after it to the end:"
    yield "how far its keys moved (median, as a share of their norm), and the change of the site's output as a share of"
    yield "what the batch wrote: by later weights at the recorded key, by the move of the key, and both together."
    yield ""
    rows = [
        (stack, site, *(f"{row[name]:.2f}" for name in ("moved", "same_key", "moved_key", "together")))
        for stack, sites in result["result"].items()
        for site, row in sites.items()
    ]
    yield from table(("stack", "layer", "keys moved", "recorded key", "moved key", "together"), rows)


@click.command()
@click.argument("bench", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path))
def main(bench: Path, out: Path | None) -> None:
    """Compare the keys of every run's first batch right after it and at the end of the stream."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    models: dict[str, LoadedModel] = {}
    for name, path in run_folders(bench).items():
        history = read_run(path)
        if history.bases[0] not in models:
            models[history.bases[0]] = open_model(resolve_model(history.bases[0]))
        rows = examine(history, models[history.bases[0]])
        result[name] = dict(zip(map(str, history.layers), rows, strict=True))
    write_result("key_drift", result, out)
    click.echo("\n".join(section({"result": result})))


if __name__ == "__main__":
    main()
