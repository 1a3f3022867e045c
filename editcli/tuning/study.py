"""The record of a search's trials, with Optuna, an extra (``editcli[tune]``): what comes next, and what was there.

The record is a journal of JSON lines. Each line is written at once, so a killed process leaves a record that can be
resumed. A machine that fails may cut the last line; :func:`drop_cut_line` drops it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editcli.errors import OptionError, StateError
from editcli.storage.opening import JOURNAL, is_there, read_bytes
from editcli.tuning.objective import Figures, figures_from
from editcli.tuning.space import Bound, Candidate, Point, Space

DONE, PRUNED, FAILED, ENDED = "done", "pruned", "failed", "ended"
"""How a trial ended; ``ended`` is one that was interrupted or ran out of time."""
STARTUP = 4
"""Trials before the sampler learns from them, the preset's own and the other first points included."""
UNPRUNED = 2
"""Trials that have to be complete before a worse one is ended early."""
LOOK = 4
"""Edits that a trial has to write before it can be ended early: the score of fewer says too little."""

TIE = 0.005
"""Scores that are closer than this are equal: the earlier trial wins, and the preset's own is the first."""

_NAME, _IDENTITY, _OUTCOME = "editcli", "identity", "outcome"


@dataclass(frozen=True, slots=True)
class Record:
    """One trial of a search."""

    number: int
    state: str
    point: Point
    layers: tuple[int, ...]
    settings: Mapping[str, Mapping[str, Any]]
    """The searched settings, by component and option."""
    score: float | None = None
    """Of all edits at the end; None for a trial that has not come that far."""
    figures: Figures | None = None
    """Of the trial's last look: of all edits where it is done."""
    seconds: float = 0.0
    reason: str | None = None
    """Why it failed."""

    def to_json(self) -> dict[str, Any]:
        """Return the trial as a JSON object."""
        return {
            "number": self.number,
            "state": self.state,
            "layers": list(self.layers),
            "settings": {name: dict(section) for name, section in self.settings.items()},
            "score": self.score,
            **({} if self.figures is None else self.figures.to_json()),
            "seconds": round(self.seconds, 3),
            "reason": self.reason,
        }


def require_optuna() -> None:
    """Raise :class:`OptionError` when Optuna is not installed."""
    try:
        import optuna  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise OptionError(f"tune needs Optuna ({error}); install it with: pip install 'editcli[tune]'") from error


class Study:
    """A search that can be stopped at any time and resumed: it gives out trials and records how they end."""

    def __init__(self, file: Path, space: Space, identity: Mapping[str, Any], *, seed: int):
        """Open the record in ``file``, or begin one; raises :class:`StateError` for a search that was another one.

        ``identity`` is what must be the same for scores to be comparable.
        """
        require_optuna()
        import optuna  # pyright: ignore[reportMissingImports]

        self.space = space
        self._optuna: Any = optuna
        begun = is_there(file)
        drop_cut_line(file)
        with _quiet(optuna):
            self._study = optuna.create_study(
                storage=_storage(file), study_name=_NAME, direction="maximize", load_if_exists=True
            )
            self._study.pruner = optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED, n_warmup_steps=LOOK)
            # A resumed search must not draw the same points again.
            drawn = seed + len(self._study.get_trials(deepcopy=False))
            self._study.sampler = optuna.samplers.TPESampler(seed=drawn % 2**32, n_startup_trials=STARTUP)
        self._begin(identity, file=file, begun=begun)

    def ask(self) -> Ask:
        """Return the next trial."""
        with _quiet(self._optuna):
            trial = self._study.ask()
            point = {bound.name: _suggested(trial, bound) for bound in self.space.bounds}
        return Ask(self, trial, point)

    @property
    def records(self) -> tuple[Record, ...]:
        """The trials that have ended, in their order."""
        return tuple(
            self._record(trial) for trial in self._study.get_trials(deepcopy=False) if _OUTCOME in trial.user_attrs
        )

    def start_record(self) -> Record | None:
        """Return the preset's own trial, once it is done."""
        return next((one for one in self.records if one.state == DONE and self.is_start(one.point)), None)

    def best(self) -> Record | None:
        """Return the trial with the highest score, the earliest of equal ones; None while none is done."""
        ranked = by_score(self.records)
        equal = [one for one in ranked if (ranked[0].score or 0.0) - (one.score or 0.0) < TIE]
        return min(equal, key=lambda one: one.number, default=None)

    def is_start(self, point: Point) -> bool:
        """Tell whether a point is the preset's own."""
        return dict(point) == self.space.start

    @property
    def made(self) -> int:
        """How many trials came to a result, whatever it was."""
        return sum(one.state != ENDED for one in self.records)

    def _begin(self, identity: Mapping[str, Any], *, file: Path, begun: bool) -> None:
        now = json.loads(json.dumps(identity))
        earlier = self._study.user_attrs.get(_IDENTITY)
        if earlier is None:
            if begun and self._study.get_trials(deepcopy=False):
                raise StateError(f"{file} is not the record of a search of editcli; choose another --out")
            self._study.set_user_attr(_IDENTITY, now)
            for point in self.space.first_points():
                self._study.enqueue_trial(point)
            return
        other = sorted(name for name in {*now, *earlier} if now.get(name) != earlier.get(name))
        if other:
            raise StateError(
                f"the search in {file.parent} was begun with other {', '.join(other)}; resume it with the same, or "
                "choose another --out"
            )
        self._repeat_unfinished()

    def _repeat_unfinished(self) -> None:
        """Have the trials done again that a killed process did not finish."""
        running = self._optuna.trial.TrialState.RUNNING
        for trial in self._study.get_trials(deepcopy=False, states=(running,)):
            self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
            if len(trial.params) == len(self.space.bounds):
                self._study.enqueue_trial(trial.params)

    def _record(self, trial: Any) -> Record:
        outcome, point = trial.user_attrs[_OUTCOME], dict(trial.params)
        candidate = self.space.candidate(point)
        return Record(
            number=trial.number + 1,
            state=outcome["state"],
            point=point,
            layers=candidate.layers,
            settings=candidate.settings,
            score=outcome["score"],
            figures=figures_from(outcome["figures"]),
            seconds=outcome["seconds"],
            reason=outcome["reason"],
        )


class Ask:
    """A trial that is under way."""

    def __init__(self, study: Study, trial: Any, point: Point):
        self._study, self._trial, self.point = study, trial, point

    @property
    def number(self) -> int:
        """The trial's number, counted from 1."""
        return self._trial.number + 1

    @property
    def candidate(self) -> Candidate:
        """The layers and settings to try."""
        return self._study.space.candidate(self.point)

    def hopeless(self, done: int, score: float) -> bool:
        """Record the score of a part of the edits; tell whether the trial is worse than most were there.

        The preset's own trial never is: it is what the result is compared with.
        """
        self._trial.report(score, done)
        return not self._study.is_start(self.point) and bool(self._trial.should_prune())

    def tell(
        self,
        state: str,
        *,
        seconds: float,
        figures: Figures | None = None,
        score: float | None = None,
        reason: str | None = None,
    ) -> None:
        """Record how the trial ended; a resumed search repeats one that was interrupted or ran out of time."""
        study = self._study
        states = study._optuna.trial.TrialState
        outcome = {
            "state": state,
            "figures": None if figures is None else figures.to_json(),
            "score": score,
            "seconds": seconds,
            "reason": reason,
        }
        self._trial.set_user_attr(_OUTCOME, outcome)
        with _quiet(study._optuna):
            if state == DONE:
                study._study.tell(self._trial, score)
            else:
                study._study.tell(self._trial, state=states.FAIL if state == ENDED else states.PRUNED)
        if state == ENDED:
            study._study.enqueue_trial(dict(self.point))


def drop_cut_line(file: Path) -> None:
    """Drop the last line of a record where it was cut, which a failing machine or a full disk may leave."""
    if not is_there(file):
        return
    content = read_bytes(file, JOURNAL, folder=file.parent)
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with file.open("r+b") as record:
            record.truncate(len(whole))


def _storage(file: Path) -> Any:
    from optuna.storages import JournalStorage  # pyright: ignore[reportMissingImports]
    from optuna.storages.journal import (  # pyright: ignore[reportMissingImports]
        JournalFileBackend,
        JournalFileOpenLock,
    )

    # The folder's lock keeps other processes out, so a lock file here was left by a process that was killed.
    for left in file.parent.glob(f"{file.name}.lock*"):
        left.unlink(missing_ok=True)
    return JournalStorage(JournalFileBackend(str(file), lock_obj=JournalFileOpenLock(str(file))))


def _suggested(trial: Any, bound: Bound) -> float:
    if bound.integer:
        return trial.suggest_int(bound.name, int(bound.low), int(bound.high))
    return trial.suggest_float(bound.name, bound.low, bound.high, log=bound.log)


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Keep Optuna from writing lines of its own, and leave its verbosity as it was."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def by_score(records: Sequence[Record]) -> list[Record]:
    """Return the trials that are done, the best first, the earliest of equal ones before the others."""
    scored = [one for one in records if one.state == DONE and one.score is not None]
    return sorted(scored, key=lambda one: (-(one.score or 0.0), one.number))


def begun_with(file: Path) -> Mapping[str, Any] | None:
    """Return the identity with which the search in ``file`` was begun; None where there is none."""
    if not is_there(file):
        return None
    import optuna  # pyright: ignore[reportMissingImports]

    drop_cut_line(file)
    with _quiet(optuna):
        storage = _storage(file)
        if _NAME not in optuna.study.get_all_study_names(storage):
            return None
        return optuna.load_study(study_name=_NAME, storage=storage).user_attrs.get(_IDENTITY)
