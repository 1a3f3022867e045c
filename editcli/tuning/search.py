"""``tune``: try layers and settings on a slice of edits until the time is up, and compare the best with the guess."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import fmean

from editcli.errors import GuardError, NumericalError, OptionError, StateError
from editcli.evaluation.ability import general_text
from editcli.formatting import number
from editcli.plugin.manager import Plugins
from editcli.plugin.options import merge
from editcli.presets.loader import sizes_of
from editcli.presets.record import Preset, preset_text
from editcli.records.record import DONE, INTERRUPTED
from editcli.reporting import Reporter, Silent
from editcli.runs.context import Interrupts, writing
from editcli.storage.files import write_bytes, write_json
from editcli.tuning import study as states
from editcli.tuning.objective import SCORE, Figures
from editcli.tuning.preparation import (
    STUDY,
    Budget,
    TuneRecipe,
    identity_of,
    open_edits,
    search_folder,
    slices_of,
    space_of,
    with_search_clock,
)
from editcli.tuning.report import Comparison, TuneReport
from editcli.tuning.space import SOURCE, Candidate
from editcli.tuning.study import Ask, Record, Study, require_optuna
from editcli.tuning.workbench import Trial, Workbench

PRESET, REPORT = "preset.toml", "tune.json"
_UNUSABLE = (NumericalError, GuardError, OptionError)
"""Errors that a method raises where its settings do not work on this model."""


class _Ended(Exception):
    """Ends a trial before its last batch."""

    def __init__(self, state: str):
        self.state = state
        super().__init__(state)


def tune(recipe: TuneRecipe, plugins: Plugins, reporter: Reporter | None = None) -> TuneReport:
    """Search layers and settings as ``recipe`` says; raises an :class:`EditError`."""
    reporter, budget = reporter or Silent(), Budget(recipe.limit)
    require_optuna()
    recipe.run.check(plugins)
    with writing(recipe.run.folder), search_folder(recipe.run.folder, resume=recipe.resume):
        return Search(with_search_clock(recipe), plugins, reporter, budget).go()


class Search:
    """One search, new or resumed: the model is loaded, the edits are chosen."""

    def __init__(self, recipe: TuneRecipe, plugins: Plugins, reporter: Reporter, budget: Budget):
        self.recipe, self.reporter, self.budget = recipe, reporter, budget
        self.folder = recipe.run.folder
        loaded, requests = open_edits(recipe, plugins, reporter)
        self.bench = Workbench(loaded, recipe.run, plugins, reporter, texts=general_text(recipe.text))
        self.space = space_of(self.bench)
        self.bench.expect(self.space)
        self.start = Candidate(self.space.layers, {})
        self.slices = slices_of(requests, recipe, self.bench, layers=self.space.layers, budget=budget)
        self.base = self.bench.measure_base(self.slices.trial)
        identity = identity_of(recipe, self.bench, self.space, self.slices)
        self.study = Study(self.folder / STUDY, self.space, identity, seed=recipe.run.seed)
        self.interrupts = Interrupts(reporter)
        self._pace: dict[int, float] = {}
        """Seconds that one edit takes, by the number of the trial."""

    def go(self) -> TuneReport:
        """Search, compare the best trial with the guess on held-out edits, and write the preset and the report."""
        self._announce()
        with self.interrupts:
            self._search()
            held_out = self._compare()
        best, interrupted = self.study.best(), self.interrupts.asked
        if best is None and not interrupted:
            raise StateError(self._fruitless())
        chosen = best if held_out is None or held_out.confirmed else self.study.start_record()
        if chosen is not None:
            write_bytes(self.folder / PRESET, self._preset(chosen).encode())
        start, run = self.bench.start, self.recipe.run
        report = TuneReport(
            status=INTERRUPTED if interrupted else DONE,
            model=self.bench.loaded.source.name,
            editor=start.editor.name,
            stabilizers=run.stabilizers,
            edits=run.edits,
            split=self.slices.split,
            kl_price=self.recipe.kl_price,
            base=self.base,
            started_from={"name": start.preset.name, "label": start.preset.label, "layers": list(start.layers)},
            bounds=self.space.bounds,
            trials=self.study.records,
            guess=self.study.start_record(),
            best=best,
            held_out=held_out,
            chosen=chosen,
            preset=None if chosen is None else str(self.folder / PRESET),
            seconds=self.budget.spent,
            out=str(self.folder),
        )
        write_json(self.folder / REPORT, report.to_json())
        return report

    def _announce(self) -> None:
        start, split = self.bench.start, self.slices.split
        method = "+".join((start.editor.name, *self.recipe.run.stabilizers))
        searched = ", ".join(bound.name for bound in self.space.bounds)
        edits = f"{split.trial} edits a trial in batches of {split.batch}, {split.held_out} held out"
        self.reporter.note(f"Tuning {method} from the preset {start.preset.name} ({start.preset.label}): {edits}")
        self.reporter.note(f"Searched: {searched}")
        if self.study.made:
            self.reporter.note(f"Resuming after {self.study.made} trials")

    def _search(self) -> None:
        limit, trials = self.recipe.limit, self.recipe.trials
        total, unit = (int(60 * limit), "s") if limit is not None else (trials or 0, "trials")
        with self.reporter.phase("Tuning", total, unit) as advance:
            shown = 0
            while self._continues():
                self._try(self.study.ask())
                done = int(self.budget.spent) if limit is not None else self.study.made
                advance(max(done - shown, 0))
                shown = max(done, shown)

    def _continues(self) -> bool:
        limit = self.recipe.trials
        enough = limit is not None and self.study.made >= limit
        # The first batch of a trial must fit as well, or it would teach nothing.
        batch = self._seconds(self.study.best(), self.slices.split.batch)
        return not (enough or self.interrupts.asked) and self.budget.affords(self._reserve + batch)

    @property
    def _reserve(self) -> float:
        """Seconds to keep for the comparison at the end; none before the first trial has shown what it takes."""
        count = self.slices.split.held_out
        return self._seconds(self.study.start_record(), count) + self._seconds(self.study.best(), count)

    def _seconds(self, record: Record | None, edits: int) -> float:
        """Return how long a trial's settings take for a number of edits; 0 where there is no such trial yet."""
        if record is None:
            return 0.0
        return edits * self._pace.get(record.number, record.seconds / self.slices.split.trial)

    def _try(self, ask: Ask) -> None:
        started, seen = time.monotonic(), None
        edits, price = self.slices.trial, self.recipe.kl_price

        def watch(done: int, figures: Figures | None) -> None:
            nonlocal seen
            if figures is not None:
                seen = figures
                if ask.hopeless(done, figures.score(kl_price=price)):
                    raise _Ended(states.PRUNED)
            # The last look is cheap against what was spent on the way to it.
            if done < len(edits) and (self.interrupts.asked or not self.budget.affords(self._reserve)):
                raise _Ended(states.ENDED)

        try:
            trial = self.bench.run(ask.candidate, edits, batch=self.slices.split.batch, watch=watch)
        except _Ended as end:
            ask.tell(end.state, seconds=time.monotonic() - started, figures=seen)
        except _UNUSABLE as error:
            # A method that fails with these settings is a result, not the end of the search.
            ask.tell(states.FAILED, seconds=time.monotonic() - started, reason=str(error))
        else:
            self._pace[ask.number] = trial.seconds / len(edits)
            seconds, score = time.monotonic() - started, trial.figures.score(kl_price=price)
            ask.tell(states.DONE, seconds=seconds, figures=trial.figures, score=score)
        self._tell(self.study.records[-1])

    def _tell(self, record: Record) -> None:
        """Say in one line what a trial came to, and how much time is left."""
        best = self.study.best()
        parts = [f"Trial {record.number}, {described(record)}: {outcome(record)}"]
        if best is not None:
            parts.append(f"best {number(best.score, SCORE)} (trial {best.number})")
        parts.append(f"{self._left() / 60:.1f} minutes left")
        self.reporter.note("; ".join(parts))

    def _left(self) -> float:
        """Return the seconds that the search will still take: what is left of the budget, or of the trials."""
        spent = [record.seconds for record in self.study.records]
        more = float("inf") if self.recipe.trials is None else max(self.recipe.trials - self.study.made, 0)
        return max(min(self.budget.left, more * fmean(spent) + self._reserve), 0.0)

    def _compare(self) -> Comparison | None:
        """Measure the guess and the best trial on the edits that no trial has seen."""
        best, guess = self.study.best(), self.study.start_record()
        if best is None or guess is None or not self.slices.held_out or self.interrupts.asked:
            return None
        self.reporter.note(f"Comparing the best trial with the guess on {len(self.slices.held_out)} held-out edits")
        try:
            if not self.budget.affords(self._seconds(guess, self.slices.split.batch)):
                raise _Ended(states.ENDED)
            before = self._held_out(self.start).figures
            after = before if best.number == guess.number else self._held_out(self._candidate(best)).figures
        except _Ended:
            self.reporter.warn("the time ended before the comparison on held-out edits; give more --minutes")
            return None
        except _UNUSABLE as error:
            self.reporter.warn(f"the best trial and the guess cannot be compared on held-out edits: {error}")
            return None
        price = self.recipe.kl_price
        return Comparison(before, after, before.score(kl_price=price), after.score(kl_price=price))

    def _held_out(self, candidate: Candidate) -> Trial:
        edits = self.slices.held_out

        def watch(done: int, figures: Figures | None) -> None:
            if done < len(edits) and (self.interrupts.asked or not self.budget.affords(0)):
                raise _Ended(states.ENDED)

        return self.bench.run(candidate, edits, batch=self.slices.split.batch, watch=watch)

    def _candidate(self, record: Record) -> Candidate:
        return self.space.candidate(record.point)

    def _fruitless(self) -> str:
        failed = [one for one in self.study.records if one.state == states.FAILED]
        if failed:
            return f"no trial of the search in {self.folder} worked; the first failed because {failed[0].reason}"
        minutes = f"{self.budget.spent / 60:.1f} minutes"
        return (
            f"no trial was done within {minutes}; continue it with --resume and more --minutes, or a smaller --sample"
        )

    def _preset(self, chosen: Record) -> str:
        """Return a trial as the text of a preset file."""
        start, run, loaded = self.bench.start, self.recipe.run, self.bench.loaded
        fixed = {name: {key: self._typed(name, key) for key in section} for name, section in run.settings.items()}
        method = "+".join((start.editor.name, *run.stabilizers))
        edits = "bundled probes" if run.edits == SOURCE else "edits"
        guess = self.study.start_record()
        against = "" if guess is None else f", the guess {number(guess.score, SCORE)}"
        preset = Preset(
            name=f"{start.preset.name}-tuned",
            label="tuned",
            source=f"editcli tune: {method}, {self.study.made} trials on {self.slices.split.trial} {edits}; "
            f"score {number(chosen.score, SCORE)}{against}",
            layers=chosen.layers,
            editor=start.editor.name,
            editor_layers={**start.preset.editor_layers, start.editor.name: chosen.layers},
            settings=merge(start.preset.settings, fixed, chosen.settings),
            # Tokens that users add change nothing about where facts are.
            match=replace(sizes_of(loaded.model.config, loaded.architecture), vocab=None),
        )
        return preset_text(preset, comment="Written by 'editcli tune'; 'editcli apply --preset FILE' takes it.")

    def _typed(self, name: str, key: str) -> object:
        """Return a setting of the user as the number that its text stands for, where a component has read it."""
        section = self.bench.effective.get(name, {})
        return section[key] if key in section else self.recipe.run.settings[name][key]


def described(record: Record) -> str:
    """Return what a trial tried in one line: ``layers 4-8, targets.lr 0.5``."""
    first, last = record.layers[0], record.layers[-1]
    run = list(record.layers) == list(range(first, last + 1))
    layers = (
        (f"layers {first}-{last}" if len(record.layers) > 1 else f"layer {first}") if run else f"layers {record.layers}"
    )
    settings = [f"{name}.{key} {value:.4g}" for name, part in record.settings.items() for key, value in part.items()]
    return ", ".join((layers, *settings))


def outcome(record: Record) -> str:
    """Return how a trial ended in a few words."""
    if record.state == states.DONE:
        return f"score {number(record.score, SCORE)}"
    if record.state == states.PRUNED:
        return "ended early, worse than most"
    return f"failed: {record.reason}" if record.state == states.FAILED else "not finished"
