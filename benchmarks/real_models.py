"""Stacks and settings on a real pretrained model: ``python -m benchmarks.real_models FOLDER EDITS.jsonl STACK ...``.

A STACK is an editor with its stabilizers and settings that differ from the preset, for instance ``rlsedit``,
``alphaedit+nas`` or ``"rlsedit targets.clamp=0.5 layers=8-12"``. Each runs on the unedited model in batches; figures
are those at the end, for the records from ``--offset`` on, and accuracy also along the stream with ``--along``. Rows
are kept in benchmarks/results/real_models.json and not measured twice, so the command can be stopped and repeated;
``benchmarks.document`` makes the section of them.

Stacks of the same target settings share the targets of their first batch, which is optimised on the unedited model:
they are the same numbers, and optimising them is most of the time.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.markdown import table
from benchmarks.predictors import LEAST, Decomposed, worst
from editcli.editing.curvature import GradientMoments
from editcli.editing.pipeline import Written, commit, edit_batch, jump_of
from editcli.editing.session import ModelSession
from editcli.errors import EditError, GuardError
from editcli.evaluation.ability import general_text
from editcli.evaluation.distribution import BaseDistributions, spread, unrelated_prompts
from editcli.evaluation.metrics import Evaluation, evaluate
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.plugin.interfaces import Editor, Problem, Site, Stabilizer, Update, Values
from editcli.plugin.manager import Plugins, load_plugins
from editcli.plugin.options import build, merge, parse_assignments
from editcli.presets.loader import load_preset
from editcli.presets.record import Preset
from editcli.requests.reader import read_edits
from editcli.requests.schema import EditRequest
from editcli.runs.planning import component, pilot_source, settings_for
from editcli.settings.core import StatisticsOptions, TargetOptions
from editcli.settings.guards import with_default
from editcli.settings.recipe import parse_layers
from editcli.statistics.moments import SecondMoments

RESULTS = Path(__file__).parent / "results" / "real_models.json"
FIGURES = ("efficacy_accuracy", "efficacy_success", "generalization_success", "specificity_success")


@dataclass(frozen=True, slots=True)
class Variant:
    """A stack with what differs from the preset."""

    text: str
    editor: str
    stabilizers: tuple[str, ...]
    layers: tuple[int, ...] | None
    settings: Mapping[str, Mapping[str, Any]]

    @classmethod
    def parse(cls, text: str, plugins: Plugins) -> Variant:
        """Read ``editor+stabilizer name.key=value layers=4-8``; the editor may be a named stack."""
        stack, *assignments = text.split()
        editor, *stabilizers = stack.split("+")
        layers = [parse_layers(part.partition("=")[2]) for part in assignments if part.startswith("layers=")]
        others = [part for part in assignments if not part.startswith("layers=")]
        chosen = tuple(layers[-1]) if layers else None
        settings = parse_assignments(others)
        named = plugins.stack(editor)
        if named is not None:
            editor, stabilizers = named.editor, [*named.stabilizers, *stabilizers]
            settings = merge(named.settings, settings)
        return cls(text, editor, tuple(stabilizers), chosen, settings)


@dataclass(slots=True)
class Shared:
    """What all variants of a model share: statistics, prefixes, and targets on the unedited model."""

    loaded: LoadedModel
    plugins: Plugins
    preset: Preset
    moments: SecondMoments
    seed: int = 0
    targets: dict[str, Values] = field(default_factory=dict)
    before: dict[str, Evaluation] = field(default_factory=dict)
    unrelated: BaseDistributions | None = None
    """The unedited model's distributions behind unrelated text; None where a stream is not followed."""


class SharingSession(ModelSession):
    """A session whose targets on the unedited model are those of an earlier variant, where that had the same."""

    def __init__(self, shared: Shared, layers: Sequence[int], **others: Any):
        super().__init__(shared.loaded, layers, **others)
        self.shared = shared
        self.counts: list[Values] = []

    def values(self, requests: Sequence[EditRequest], *, prefixed: bool = True) -> Values:
        """Return optimised targets; on the unedited model each set is optimised once."""
        if self.written or not prefixed:
            values = super().values(requests, prefixed=prefixed)
        else:
            key = repr((self.options, self.layers[-1], [request.id for request in requests]))
            if key not in self.shared.targets:
                self.shared.targets[key] = super().values(requests)
            values = self.shared.targets[key]
        if prefixed:
            self.counts.append(values)
        return values


def measure(
    shared: Shared, variant: Variant, edits: Sequence[EditRequest], *, batch: int, along: int | None = None
) -> dict[str, Any]:
    """Write ``edits`` with a variant, measure them, and put the model back; follow the stream every ``along`` edits."""
    started = time.perf_counter()
    settings = settings_for(variant.editor, shared.preset, variant.settings, shared.plugins)
    editor = component(shared.plugins, "editor", variant.editor, settings)
    stabilizers = [component(shared.plugins, "stabilizer", name, settings) for name in variant.stabilizers]
    layers = variant.layers or shared.preset.layers_for(variant.editor)
    options = build(TargetOptions, settings.get("targets", {}), owner="targets")
    layers = layers[-1:] if editor.single_site else layers
    sites = [shared.loaded.architecture.site(layer) for layer in layers]
    session = SharingSession(
        shared,
        layers,
        gradient_moment=GradientMoments(shared.loaded, sites, shared.moments),
        options=options,
        second_moment=shared.moments,
        pilots=pilot_source(edits),
        seed=shared.seed,
    )
    before = session.masters()
    try:
        for part in (editor, *stabilizers):
            part.prepare(session)
        size = 1 if editor.single_site else batch
        stream = Stream(session)
        for start in range(0, len(edits), size):
            stream.advance(_write(session, editor, stabilizers, edits[start : start + size]))
            done = start + size
            if along and done % along == 0 and done < len(edits):
                stream.accuracy[done] = accuracy(shared.loaded, edits[:done])
        with session.read_out(stabilizers) as weights:
            found = evaluate(shared.loaded, edits, metrics=("counterfact",))
            ratios = [float(weight.norm() / session.baseline(site).norm()) for site, weight in weights.items()]
            followed = {"stream": stream.figures(shared, found, edits=len(edits))} if along else {}
    finally:
        session.restore(before)
    return {
        **{name: getattr(found, name) for name in FIGURES},
        "ratio": max(ratios),
        **_ended(session.counts),
        "layers": list(session.layers),
        "batch": size,
        "targets": asdict(options),
        "components": {part.name: part.record() for part in (editor, *stabilizers)},
        "seconds": time.perf_counter() - started,
        **followed,
    }


@dataclass(slots=True)
class Stream:
    """What a stack does along a stream: to its first batch, to the norms and to the spectra."""

    session: ModelSession
    accuracy: dict[int, float | None] = field(default_factory=dict)
    """Efficacy accuracy of all edits so far, by their number."""
    norms: list[float] = field(default_factory=list)
    """The largest ||D|| of any site, batch by batch."""
    first: Problem | None = None
    """The first batch at the last site, where the editor has target values."""
    once: Tensor | None = None
    """That site's weight after the first batch."""

    def advance(self, written: Written) -> None:
        """Note what a batch wrote."""
        self.norms.append(max(update.norm() for update in written.updates.values()))
        if len(self.norms) == 1 and written.problems:
            self.first = list(written.problems.values())[-1]
            self.once = self.session.weight(self.first.site)

    def figures(self, shared: Shared, evaluation: Evaluation, *, edits: int) -> dict[str, Any]:
        """Return the figures at the end of the stream, while the session holds the weights that are saved."""
        answers = [outcome.efficacy[0].exact for outcome in evaluation.outcomes]
        quarter = len(answers) // 4
        decomposed = [
            Decomposed.of(self.session.baseline(site).double().numpy()).figures(weight.double().numpy(), edits)
            for site, weight in self.session.masters().items()
        ]
        moved = spread(shared.unrelated.divergences(shared.loaded)) if shared.unrelated else None
        return {
            "accuracy": self.accuracy,
            "quarters": [fmean(answers[at * quarter : (at + 1) * quarter]) for at in range(4)] if quarter else [],
            "norms": self.norms,
            "divergence": None if moved is None else moved.median,
            **{name: worst(decomposed)[name] for name in ("drift", "ls", "ss")},
            **self._first_batch(),
        }

    def _first_batch(self) -> dict[str, float]:
        """Return what the first batch did not write, and what later ones added at its keys over what it wrote."""
        if self.first is None or self.once is None:
            return {}
        keys, residual = self.first.keys.double(), self.first.residual.double()
        base, last = self.session.baseline(self.first.site), self.session.weight(self.first.site)
        own, later = (self.once - base).double() @ keys, (last - self.once).double() @ keys
        return {
            "unwritten": float((own - residual).norm() / residual.norm()),
            "later_over_own": float(later.norm() / own.norm()),
        }


def accuracy(loaded: LoadedModel, edits: Sequence[EditRequest]) -> float | None:
    """Return the efficacy accuracy of ``edits``."""
    bare = [replace(edit, paraphrase_prompts=(), neighborhood_prompts=()) for edit in edits]
    return evaluate(loaded, bare, metrics=("counterfact",)).efficacy_accuracy


def _write(
    session: ModelSession, editor: Editor, stabilizers: Sequence[Stabilizer], edits: Sequence[EditRequest]
) -> Written:
    def check(site: Site, update: Update) -> None:
        jump = jump_of(session, site, update)
        for guard in with_default((), editor.largest_jump(site)):
            if jump is not None:
                guard.check("jump", jump, where=f"at {site.module}", remedy=editor.tempered_by)

    written = edit_batch(session, editor, stabilizers, edits, check)
    commit(session, editor, stabilizers, edits, written)
    return written


def _ended(counts: Sequence[Values]) -> dict[str, float]:
    """Return the shares of targets that reached the stop loss and that ended at the clamp."""
    known = [(v.reached, v.clamped) for v in counts if v.reached is not None and v.clamped is not None]
    total = sum(len(reached) for reached, _ in known)
    if not total:
        return {}
    reached, clamped = (sum(int(pair[column].sum()) for pair in known) for column in (0, 1))
    return {"reached": reached / total, "clamped": clamped / total}


def section(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe what was measured on real models."""
    yield from ("## Real models", "")
    yield "Stacks and settings on pretrained models that the program has no preset for: everything that a row does not"
    yield "name is the guess. CounterFact records, one paraphrase and one neighbour each; figures at the end of the"
    yield "stream, over all edits of the row. *reached* and *clamped*: targets whose loss fell below"
    yield "`targets.stop_loss`, and targets that ended at `targets.clamp`."
    yield "`python -m benchmarks.real_models FOLDER EDITS STACK ...`."
    for name, model in result.items():
        before = model["before"]
        yield from ("", f"### {name}", "", f"{model['origin']}", "")
        yield "| stack, settings | edits | batch | efficacy accuracy | efficacy success | generalization success |" + (
            " specificity success | R_n | reached | clamped |"
        )
        yield "|---|---|---|---|---|---|---|---|---|---|"
        for edits, row in before.items():
            yield f"| *before* | {edits} | | {_cells(row)} | 1.00 | | |"
        for row in model["rows"]:
            yield f"| {row['stack']} | {row['edits']} | {_row(row)} |"
        followed = [row for row in model["rows"] if "stream" in row]
        if followed:
            yield from along(followed)
    yield ""


ALONG = {
    "drift": "drift",
    "ls": "LS",
    "ss": "SS",
    "divergence": "divergence",
    "unwritten": "not written",
    "later_over_own": "later / own",
}
"""Figures at the end of a followed stream and their headings."""
WROTE = 1.005
"""R_n of a stack that wrote something; one that did not keeps the spectrum and answers nothing."""


def along(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Describe the streams that were followed, and which of their figures rank the stacks as accuracy does."""
    yield from (
        "",
        "The same streams: accuracy of all edits so far, that of the first and the last quarter at the end,",
    )
    yield "the largest ||D|| of the first and of the last batch, drift, LS and SS at the worst site, the median"
    yield "divergence on unrelated text (nats), what the first batch did not write at the last site, and what later"
    yield "ones added at its recorded keys over what it wrote."
    yield ""
    lines, kinds = [], Counter((row["edits"], row["batch"]) for row in rows)
    for row in rows:
        stream, ends = row["stream"], row["stream"]["quarters"]
        so_far = [*stream["accuracy"].values(), row["efficacy_accuracy"]]
        figures = (stream.get(name) for name in ALONG)
        lines.append(
            (
                row["stack"] if len(kinds) == 1 else f"{row['stack']}, {row['edits']} by {row['batch']}",
                " / ".join(f"{value:.2f}" for value in so_far),
                f"{ends[0]:.2f} / {ends[-1]:.2f}",
                f"{stream['norms'][0]:.0f} / {stream['norms'][-1]:.0f}",
                *("" if value is None else f"{value:.2f}" for value in figures),
            )
        )
    yield from table(("stack", "accuracy", "quarters", "norm", *ALONG.values()), lines)
    # Streams of other lengths or batches are no comparison.
    most = kinds.most_common(1)[0][0]
    written = [row for row in rows if row["ratio"] > WROTE and (row["edits"], row["batch"]) == most]
    ranked = [f"{text} {value:.2f}" for name, text in ALONG.items() if (value := likeness(written, name)) is not None]
    if ranked:
        yield f"Rank correlation with accuracy over the {len(written)} stacks of {most[0]} that wrote something:"
        yield f"{', '.join(ranked)}."


def likeness(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return Spearman's rank correlation of a figure with accuracy over stacks; None where it says nothing."""
    pairs = [(row["stream"][name], row["efficacy_accuracy"]) for row in rows if row["stream"].get(name) is not None]
    if len(pairs) < LEAST:
        return None
    figures, accuracies = (ranks(column) for column in zip(*pairs, strict=True))
    return float(np.corrcoef(figures, accuracies)[0, 1])


def ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Return the rank of each value; equal ones share their mean rank."""
    known = np.asarray(values, np.float64)
    return (known[:, None] > known).sum(1) + ((known[:, None] == known).sum(1) - 1) / 2


def _row(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"{row['batch']} | {row['error']} | | | | | |"
    shares = " | ".join("" if row.get(name) is None else f"{row[name]:.0%}" for name in ("reached", "clamped"))
    return f"{row['batch']} | {_cells(row)} | {row['ratio']:.2f} | {shares}"


def _cells(row: Mapping[str, Any]) -> str:
    return " | ".join("" if row[name] is None else f"{row[name]:.2f}" for name in FIGURES)


@click.command()
@click.argument("folder")
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.argument("stacks", nargs=-1, required=True)
@click.option("--name", required=True, help="Title of the model in the document.")
@click.option("--origin", default="", help="A sentence on where the model, the records and the text come from.")
@click.option("--offset", default=0, show_default=True, help="Records to leave out at the start.")
@click.option("--limit", default=100, show_default=True, help="Records to edit.")
@click.option("--batch", default=100, show_default=True)
@click.option("--along", type=int, help="Follow the stream: accuracy every N edits, norms, spectra, the first batch.")
@click.option("--corpus", help="Reference text; by default what the program takes.")
@click.option("--tokens", type=int, help="Tokens of reference text; by default what the program takes.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=False)
def main(
    folder: str,
    file: Path,
    stacks: tuple[str, ...],
    *,
    name: str,
    origin: str,
    offset: int,
    limit: int,
    batch: int,
    along: int | None,
    corpus: str | None,
    tokens: int | None,
    out: Path,
) -> None:
    """Measure every stack that is not in the results yet."""
    edits = read_edits(file, limit=offset + limit).requests[offset:]
    loaded, plugins = open_model(resolve_model(folder)), load_plugins()
    moments = SecondMoments(loaded, options=StatisticsOptions(tokens=tokens), corpus=corpus)
    preset = load_preset(loaded.model.config, loaded.architecture)
    shared = Shared(loaded, plugins, preset, moments)
    if along:
        shared.unrelated = BaseDistributions(loaded, unrelated_prompts(loaded, general_text(None)))
    results: dict[str, Any] = json.loads(out.read_text("utf-8")) if out.exists() else {}
    model = results.setdefault(name, {"origin": origin, "before": {}, "rows": []})
    model["origin"] = origin or model["origin"]
    slice_ = f"{offset}-{offset + len(edits)}"
    if slice_ not in model["before"]:
        found = evaluate(loaded, edits, metrics=("counterfact",))
        model["before"][slice_] = {figure: getattr(found, figure) for figure in FIGURES}
    out.parent.mkdir(parents=True, exist_ok=True)
    for text in stacks:
        variant = Variant.parse(text, plugins)
        known = {"stack": text, "edits": slice_, "batch": batch}
        if any(known.items() <= {**row, "batch": row["asked"]}.items() for row in model["rows"]):
            continue
        try:
            row = measure(shared, variant, edits, batch=batch, along=along)
        except GuardError as error:
            row = {"error": str(error).partition(":")[0]}
        except EditError as error:
            row = {"error": str(error)}
        model["rows"].append({**known, "asked": batch, **row})
        out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        click.echo("\n".join(section({name: model})))


if __name__ == "__main__":
    main()
