"""Prepare a search before its first trial: its folder, model, edits, search space and identity."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from editcli.errors import OptionError, StateError
from editcli.models.loading import LoadedModel, Loading, open_model
from editcli.plugin.manager import Plugins
from editcli.reporting import Reporter
from editcli.requests.schema import EditRequest
from editcli.runs import planning
from editcli.settings.recipes import TuneRecipe
from editcli.storage.checkpoint import file_digest
from editcli.storage.opening import expanded, is_there
from editcli.tuning.probes import probe_edits
from editcli.tuning.report import Split
from editcli.tuning.space import SOURCE, Candidate, Space, build_space
from editcli.tuning.study import begun_with
from editcli.tuning.workbench import PARTS, Workbench

WARM_UP = 4
"""Edits that the preset writes first, to see what one costs."""
TRIALS = 10
"""Trials that the time should be enough for."""
SHARE = 0.6
"""Mean cost of a trial, as a share of a whole one: many are ended early."""
FEWEST, MOST = 8, 64
"""Edits of a trial: with fewer, one edit more or less decides; with more, few trials can be made."""
DEFAULT_EDITS = 32
"""Edits of a trial where only the number of trials is limited."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Counts from when it is made; ``minutes`` None is no limit."""

    minutes: float | None
    started: float = field(default_factory=time.monotonic)
    """When the time began to run, on the system's monotonic clock."""

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds that are left; infinite without a limit."""
        return float("inf") if self.minutes is None else 60 * self.minutes - self.spent

    def affords(self, seconds: float) -> bool:
        """Tell whether something that takes so long would still end in time."""
        return self.left > seconds


def edits_per_trial(left: float, *, each: float, available: int) -> int:
    """Return how many of ``available`` edits a trial should write, where one edit costs ``each`` seconds.

    As many are held out, and the preset and the best trial are measured on them at the end. A third of a small file is
    held out all the same.
    """
    whole = TRIALS * SHARE + 2
    affordable = MOST if left == float("inf") else int(left / (whole * max(each, 1e-6)))
    chosen = DEFAULT_EDITS if left == float("inf") else min(max(affordable, FEWEST), MOST)
    return max(1, min(chosen, available - available // 3))


STUDY, LOCK = "study.jsonl", ".lock"
_COUNT, _CHAT = "edits of a trial", "chat template"


@dataclass(frozen=True, slots=True)
class Slices:
    """The edits that trials write, and those that are held out."""

    trial: tuple[EditRequest, ...]
    held_out: tuple[EditRequest, ...]
    split: Split


@contextmanager
def search_folder(out: Path, *, resume: bool) -> Iterator[None]:
    """Hold the folder of a search; raises :class:`StateError` where it is not a search's or cannot be resumed.

    A folder that is made here is removed again when the block fails before its first trial.
    """
    begun = is_there(out / STUDY)
    # A search that was killed early leaves nothing but its lock.
    idle = out.is_dir() and all(path.name == LOCK for path in out.iterdir())
    if out.exists() and not (out.is_dir() and (idle or (begun and resume))):
        hint = "--resume continues the search in it" if begun else "choose another --out"
        raise StateError(f"{out} exists and is not empty; {hint}")
    if resume and not (begun or idle):
        raise StateError(f"there is no search in {out}, so there is nothing to resume; leave out --resume")
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StateError(f"{out} is in use by another editcli process; wait for it or stop it") from error
    try:
        yield
    except BaseException:
        if created and not (out / STUDY).exists():
            shutil.rmtree(out, ignore_errors=True)
        raise
    finally:
        lock.release()


def open_edits(recipe: TuneRecipe, plugins: Plugins, reporter: Reporter) -> tuple[LoadedModel, tuple[EditRequest, ...]]:
    """Read the edits, load the model, and choose probes where there are no edits."""
    run = recipe.run
    # A file that cannot be read is refused before the model is loaded.
    file = None if run.edits == SOURCE else planning.read_requested(run, plugins)
    for warning in file.warnings if file else ():
        reporter.warn(warning)
    families = plugins.families()
    loaded = open_model(planning.located(run), Loading.of(run), families=families, reporter=reporter)
    planning.warn_of_thinking(loaded.tokens, reporter)
    if file is None:
        return loaded, probe_edits(loaded, seed=run.seed, reporter=reporter)
    gate = planning.gate_of(run, loaded, plugins)
    requests, rejected, _ = planning.usable(file, gate, skip_bad=run.on_error == "skip")
    for one in rejected:
        reporter.warn(f"left out: {one.id}: {one.reason}")
    for asked, what in (("paraphrase_prompts", "generalization"), ("neighborhood_prompts", "specificity")):
        if not any(getattr(request, asked) for request in requests):
            reporter.warn(f"the edits have no {asked}: {what} is not measured and does not count")
    return loaded, requests


def with_search_clock(recipe: TuneRecipe) -> TuneRecipe:
    """Return the recipe with one time for the chat templates of all trials: of the search that is resumed, else now."""
    earlier = begun_with(recipe.run.folder / STUDY) if recipe.resume else None
    chat, run = (earlier or {}).get(_CHAT), recipe.run
    if run.chat_template and run.template_clock is None and isinstance(chat, Mapping):
        run = replace(run, template_clock=chat["clock"])
    return replace(recipe, run=planning.with_clock(run))


def space_of(bench: Workbench) -> Space:
    """Return what is searched around the preset of a bench: everything that the user has not fixed."""
    run, start = bench.recipe, bench.start
    fixed = {f"{name}.{key}" for name, section in run.settings.items() for key in section}
    # A statistics file holds what was asked for when it was made, and nothing on other layers.
    if run.layers or run.stats:
        fixed.add("layers")
    # An editor that optimises no targets has no use for their settings.
    idle = () if start.editor.needs_values else ("targets",)
    space = build_space(
        {name: section for name, section in bench.effective.items() if name not in idle},
        layers=start.layers,
        depth=bench.loaded.architecture.layers,
        fixed=fixed,
        single_site=start.editor.single_site,
    )
    if not space.bounds:
        raise OptionError("everything that tune searches is fixed; leave out --layers or some of -o")
    return space


def slices_of(
    requests: Sequence[EditRequest], recipe: TuneRecipe, bench: Workbench, *, layers: tuple[int, ...], budget: Budget
) -> Slices:
    """Shuffle the edits, and cut them into those of the trials and those held out."""
    run = recipe.run
    shuffled = random.Random(run.seed).sample(list(requests), len(requests))
    earlier = begun_with(run.folder / STUDY) if recipe.resume else None
    count = recipe.sample or (earlier or {}).get(_COUNT)
    if count is None:
        few = shuffled[:WARM_UP]
        warm = bench.run(Candidate(layers, {}), few, batch=len(few), watch=lambda done, figures: None)
        count = edits_per_trial(budget.left, each=warm.seconds / len(few), available=len(shuffled))
    trial, held_out = tuple(shuffled[:count]), tuple(shuffled[count : 2 * count])
    if not held_out:
        bench.reporter.warn("there are no edits left to hold out, so the best trial is not checked on others")
    size = run.batch_size or (1 if bench.start.editor.single_site else -(-len(trial) // PARTS))
    return Slices(trial, held_out, Split(len(trial), len(held_out), size))


def identity_of(recipe: TuneRecipe, bench: Workbench, space: Space, slices: Slices) -> dict[str, Any]:
    """Return what has to be the same for the scores of two trials to be comparable."""
    run, start, loaded = recipe.run, bench.start, bench.loaded
    conversation = loaded.tokens.conversation
    return {
        "base model": loaded.checkpoint.fingerprint(),
        "editor": start.editor.name,
        "stabilizers": list(run.stabilizers),
        _COUNT: slices.split.trial,
        "edits": [request.digest for request in (*slices.trial, *slices.held_out)],
        "batch size": slices.split.batch,
        "settings": bench.effective,
        "layers": list(start.layers),
        "search space": [[bound.name, bound.low, bound.high] for bound in space.bounds],
        "reference text": bench.moments.corpus.identity,
        "seed": run.seed,
        "--kl-price": recipe.kl_price,
        "--text": None if recipe.text is None else file_digest(expanded(recipe.text)),
        "--stats": None if bench.moments.file is None else file_digest(bench.moments.file),
        "dtype": str(next(loaded.model.parameters()).dtype),
        _CHAT: None if conversation is None else conversation.identity,
    }
