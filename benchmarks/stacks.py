"""Editors with stabilizers, and named stacks, on the bundled model: what 200 edits do.

``python -m benchmarks.stacks`` edits the first 200 facts of the sample stream with each stack, in batches of 100: the
papers' first editors with every stabilizer, the newer methods alone. It prints a table and writes
benchmarks/results/stacks.json, which ``benchmarks.document`` reads. Stacks that are already in that file are not run
again, so the command can be stopped and repeated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from editcli.editing.curvature import GradientMoments
from editcli.editing.pipeline import commit, edit_batch
from editcli.editing.session import ModelSession
from editcli.errors import EditError
from editcli.evaluation.metrics import evaluate
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.plugin.interfaces import Site, Stabilizer, Update
from editcli.plugin.manager import Plugins, load_plugins
from editcli.plugin.options import build
from editcli.presets.loader import load_preset
from editcli.requests.reader import read_edits
from editcli.requests.schema import EditRequest
from editcli.runs.planning import component, pilot_source, settings_for
from editcli.settings.core import TargetOptions
from editcli.settings.guards import refuse_nonfinite
from editcli.statistics.moments import SecondMoments

STREAM = Path(__file__).parents[1] / "sample_edits" / "stream.jsonl"
CROSSED = ("memit", "alphaedit", "rlsedit", "rome", "ft", "ultraedit")
"""Editors that are run with every stabilizer."""
ALONE = ("evoedit", "lyaplock", "nse", "simie", "locft", "crispedit", "betaedit", "encore", "stableedit")
"""Editors and named stacks that are run as they are."""
STABILIZERS = ("", "nas", "revive", "rect", "prune", "clip", "sphere", "nas+revive")
COLUMNS = ("efficacy", "generalization", "specificity", "ratio")

Settings = Mapping[str, Mapping[str, Any]]


class StackBench:
    """A loaded model whose edits are taken back after every stack."""

    def __init__(self, loaded: LoadedModel, plugins: Plugins, *, corpus: str | None = None):
        self.loaded, self.plugins = loaded, plugins
        self.moments = SecondMoments(loaded, corpus=corpus)

    def run(
        self,
        stack: Sequence[str],
        edits: Sequence[EditRequest],
        *,
        batch: int,
        layers: Sequence[int],
        settings: Settings,
    ) -> dict[str, Any]:
        """Edit in batches, an editor's name before its stabilizers', and measure everything at the end."""
        started = time.process_time()
        editor = component(self.plugins, "editor", stack[0], settings)
        stabilizers = [component(self.plugins, "stabilizer", name, settings) for name in stack[1:]]
        layers = layers[-1:] if editor.single_site else layers
        sites = [self.loaded.architecture.site(layer) for layer in layers]
        session = ModelSession(
            self.loaded,
            layers,
            gradient_moment=GradientMoments(self.loaded, sites, self.moments),
            options=build(TargetOptions, settings.get("targets", {}), owner="targets"),
            second_moment=self.moments,
            pilots=pilot_source(edits),
        )
        before = session.masters()
        try:
            for part in (editor, *stabilizers):
                part.prepare(session)
            for start in range(0, len(edits), batch):
                chosen = edits[start : start + batch]
                written = edit_batch(session, editor, stabilizers, chosen, finite)
                commit(session, editor, stabilizers, chosen, written)
            return {**self._measure(session, stabilizers, edits), "seconds": time.process_time() - started}
        finally:
            session.restore(before)

    def _measure(
        self, session: ModelSession, stabilizers: Sequence[Stabilizer], edits: Sequence[EditRequest]
    ) -> dict[str, Any]:
        with session.read_out(stabilizers) as weights:
            found = evaluate(self.loaded, edits, metrics=("counterfact",))
            ratios = [float(weight.norm() / session.baseline(site).norm()) for site, weight in weights.items()]
        return {
            "efficacy": found.efficacy_accuracy,
            "generalization": found.generalization_accuracy,
            "specificity": found.specificity_accuracy,
            "efficacy_success": found.efficacy_success,
            "specificity_success": found.specificity_success,
            "ratio": max(ratios),
        }


def finite(site: Site, update: Update) -> None:
    """Refuse an update that is not finite."""
    refuse_nonfinite(f"the update of {site.module}", update.parts.values(), where="in this benchmark")


def stacks(editors: Sequence[str]) -> Iterator[list[str]]:
    """Yield the stacks of some editors, each an editor's name before its stabilizers'."""
    for editor in editors:
        for names in STABILIZERS if editor in CROSSED else ("",):
            yield [editor, *filter(None, names.split("+"))]


def markdown(results: Mapping[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| stack | efficacy | generalization | specificity | largest R_n | seconds |", "|---|---|---|---|---|---|"]
    for stack, row in results.items():
        if "error" in row:
            lines.append(f"| {stack} | {row['error']} | | | | |")
        else:
            cells = " | ".join(f"{row[name]:.2f}" for name in COLUMNS)
            seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
            lines.append(f"| {stack} | {cells} | {seconds} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--model", help="A folder; the bundled model by default.")
@click.option("--edits", default=200, show_default=True)
@click.option("--batch", default=100, show_default=True)
@click.option("--editor", "editors", multiple=True, default=(*CROSSED, *ALONE), show_default=True)
@click.option("--file", "stream", type=click.Path(path_type=Path), default=STREAM, show_default=False)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(__file__).parent / "results" / "stacks.json",
    show_default=False,
)
def main(model: str | None, edits: int, batch: int, editors: tuple[str, ...], stream: Path, out: Path) -> None:
    """Run every stack that is not in the results yet, and print the table."""
    loaded, plugins = open_model(resolve_model(model)), load_plugins()
    preset = load_preset(loaded.model.config, loaded.architecture)
    bench = StackBench(loaded, plugins)
    requests = read_edits(stream, limit=edits).requests
    results: dict[str, Any] = json.loads(out.read_text("utf-8")) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for stack in stacks(editors):
        title = " + ".join(stack)
        if title in results:
            continue
        # One edit at a time is what ROME is; the others are compared at the same batch size.
        size = 1 if stack[0] == "rome" else batch
        named = plugins.stack(stack[0])
        chosen = stack if named is None else [named.editor, *named.stabilizers, *stack[1:]]
        try:
            settings = settings_for(chosen[0], preset, {} if named is None else named.settings, plugins)
            row = bench.run(chosen, requests, batch=size, layers=preset.layers_for(chosen[0]), settings=settings)
            results[title] = {"batch": size, **row}
        except EditError as error:
            results[title] = {"error": str(error)}
        out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        click.echo(f"{title}: {results[title]}")
    click.echo(markdown(results))


if __name__ == "__main__":
    main()
