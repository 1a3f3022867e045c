"""The same edits by the published target optimisation and by ours: are the edited models the same?

``python -m benchmarks.equality`` writes the first 200 edits of the sample stream into the bundled model twice, with
MEMIT's preset in batches of 100: once with the target values of :mod:`benchmarks.reference`, one edit at a time,
and once with ours. It compares the target values, the weights, and which edits the two models answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks.common import bundled, write_result
from benchmarks.reference import plain_target
from benchmarks.stacks import STREAM, finite
from editcli.editing.pipeline import commit, edit_batch
from editcli.editing.session import ModelSession
from editcli.evaluation.metrics import evaluate
from editcli.models.loading import LoadedModel
from editcli.plugin.interfaces import Values
from editcli.plugin.manager import Plugins, load_plugins
from editcli.plugin.options import build
from editcli.presets.loader import load_preset
from editcli.requests.reader import read_edits
from editcli.requests.schema import EditRequest
from editcli.runs.planning import component, settings_for
from editcli.settings.core import TargetOptions
from editcli.statistics.moments import SecondMoments


class PlainSession(ModelSession):
    """A session whose target values are optimised by the published procedure."""

    def values(self, requests: Sequence[EditRequest], *, prefixed: bool = True) -> Values:
        """Optimise one edit after the other."""
        prefixes = self.prefixes if prefixed else ()
        found = [plain_target(self.loaded, one, prefixes, self.layers[-1], self.options) for one in requests]
        return Values(
            target=torch.stack([one.target for one in found], 1),
            initial=torch.stack([one.initial for one in found], 1),
            written=torch.stack([one.written for one in found], 1),
            loss=torch.tensor([one.loss for one in found]),
            dropped={},
        )


@dataclass(frozen=True, slots=True)
class Edited:
    """What one way of optimising led to."""

    first: Tensor
    """Target values of the first batch, (d, n), optimised on the same unedited model by both ways."""
    weights: tuple[Tensor, ...]
    answered: tuple[bool, ...]
    efficacy: float | None
    specificity: float | None


def edited(
    kind: type[ModelSession], loaded: LoadedModel, edits: Sequence[EditRequest], batch: int, plugins: Plugins
) -> Edited:
    """Write the edits with MEMIT and measure; the model is as it was afterwards."""
    preset = load_preset(loaded.model.config, loaded.architecture)
    settings = settings_for("memit", preset, {}, plugins)
    session = kind(
        loaded,
        preset.layers_for("memit"),
        options=build(TargetOptions, settings.get("targets", {}), owner="targets"),
        second_moment=SecondMoments(loaded),
    )
    editor, before = component(plugins, "editor", "memit", settings), session.masters()
    try:
        editor.prepare(session)
        first = session.values(edits[:batch]).target
        for start in range(0, len(edits), batch):
            chosen = edits[start : start + batch]
            commit(session, editor, (), chosen, edit_batch(session, editor, (), chosen, finite))
        found = evaluate(loaded, edits, metrics=("counterfact",))
        weights = tuple(weight.clone() for weight in session.masters().values())
        answered = tuple(all(answer.exact for answer in one.efficacy) for one in found.outcomes)
        return Edited(first, weights, answered, found.efficacy_accuracy, found.specificity_accuracy)
    finally:
        session.restore(before)


def distance(one: Tensor, other: Tensor) -> float:
    """Return ||one - other|| / ||other||."""
    return float((one - other).norm() / other.norm())


@click.command()
@click.option("--edits", "count", default=200, show_default=True)
@click.option("--batch", default=100, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(count: int, batch: int, out: Path | None) -> None:
    """Edit twice and compare."""
    loaded, plugins, edits = bundled(), load_plugins(), read_edits(STREAM, limit=count).requests
    plain = edited(PlainSession, loaded, edits, batch, plugins)
    ours = edited(ModelSession, loaded, edits, batch, plugins)
    pairs = zip(plain.answered, ours.answered, strict=True)
    result = {
        "edits": count,
        "batch_size": batch,
        "efficacy_accuracy": {"published": plain.efficacy, "ours": ours.efficacy},
        "specificity_accuracy": {"published": plain.specificity, "ours": ours.specificity},
        "answered_alike": sum(one == other for one, other in pairs),
        "targets": distance(ours.first, plain.first),
        "weights": max(distance(a, b) for a, b in zip(ours.weights, plain.weights, strict=True)),
    }
    click.echo(result)
    write_result("equality", result, out)


if __name__ == "__main__":
    main()
