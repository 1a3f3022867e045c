"""Measure an adapter: the untouched base plus the file that was written, asked for the run's own edits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from editcli.commands.evaluate import sample
from editcli.errors import StateError
from editcli.evaluation.metrics import evaluate
from editcli.export.adapter import read_adapter
from editcli.export.changes import oriented
from editcli.export.recipe import ExportRecipe
from editcli.export.record import recipe_of
from editcli.export.report import Measured
from editcli.export.source import Edited
from editcli.models.architectures import Family
from editcli.models.loading import LoadedModel, Loading, open_model
from editcli.models.offload import device_of, replace_weight
from editcli.reporting import Reporter
from editcli.requests.schema import EditRequest
from editcli.requests.superseding import supersede
from editcli.runs.outcome import efficacy


def measure_adapter(
    edited: Edited, adapter: Path, recipe: ExportRecipe, *, families: tuple[Family, ...], reporter: Reporter
) -> Measured | None:
    """Return the efficacies of base and adapter on a sample of the edits; None when the run's edits are not there."""
    requests = supersede(_applied(edited, reporter))[0]
    if not requests:
        return None
    asked = [
        replace(request, paraphrase_prompts=(), neighborhood_prompts=(), generation_prompts=())
        for request in sample(requests, recipe.sample, seed=recipe.seed)
    ]
    loading = replace(Loading.of(recipe), chat_template=recipe_of(edited.run.record).chat)
    loaded = open_model(edited.source, loading, families=families)
    put_on(loaded, adapter)
    evaluation = evaluate(loaded, asked, metrics=("counterfact",), reporter=reporter)
    recorded = edited.run.record.efficacy
    return Measured(len(asked), len(requests), efficacy(evaluation), recorded and recorded.retained)


def put_on(loaded: LoadedModel, adapter: Path) -> None:
    """Add an adapter to the weights of a loaded base."""
    architecture = loaded.architecture
    sites = {site.module: site for site in map(architecture.site, range(architecture.layers))}
    for module, (left, right) in read_adapter(adapter).items():
        site = sites[module]
        projection = architecture.projection(site.layer)
        base = oriented(loaded.checkpoint, loaded.checkpoint.weight_of(module), site)
        weight = (base + left @ right).to(device_of(projection))
        replace_weight(projection, site.stored(weight))


def _applied(edited: Edited, reporter: Reporter) -> list[EditRequest]:
    """Return the edits in force, without those that a stabilizer gave up."""
    history = edited.run.history
    try:
        return [
            request
            for batch in history.batches
            for request in history.folder.read_requests(batch)
            if request.id not in batch.dropped
        ]
    except StateError as error:
        reporter.warn(f"the adapter is not measured: {error}")
        return []
