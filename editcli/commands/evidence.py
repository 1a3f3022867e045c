"""Put what ``eval`` measured into files: the raw answers of every edit, and the evidence that a run folder keeps.

Also what an evaluation is compared with: an earlier one, whose metrics may have been taken in another way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editcli.errors import FileError, OptionError
from editcli.evaluation.choice import UNSURE, VERSION, listing
from editcli.evaluation.distribution import TEXT_TOKENS, Divergence
from editcli.evaluation.in_context import TEXT
from editcli.evaluation.metrics import Evaluation, Outcome
from editcli.evaluation.registry import differences
from editcli.formatting import finite
from editcli.records.decoding import UnreadableError, parse
from editcli.settings.recipes import EvalRecipe
from editcli.storage.opening import RECORD, expanded, read_bytes


def protocol_settings(recipe: EvalRecipe, evaluation: Evaluation) -> dict[str, Any]:
    """Return everything that decides a protocol's figures besides the model and the edits."""
    settings: dict[str, Any] = {"prompts": "chat template" if recipe.chat_template else "bare"}
    if evaluation.generated is not None:
        close = sum(answer.close for outcome in evaluation.outcomes for answer in outcome.generated)
        settings["generated"] = {**recipe.rules.to_json(), "close_calls": close}
    if evaluation.choice is not None:
        settings["choice"] = {"text": VERSION, "shown": listing("{prompt}", ("{new}", "{old}", UNSURE))}
    if recipe.base is not None:
        settings["distribution"] = {"unrelated_text": recipe.text or "bundled", "unrelated_tokens": TEXT_TOKENS}
    if recipe.baseline is not None:
        settings["in_context"] = {"text": TEXT}
    return settings


def raw_lines(
    evaluation: Evaluation, others: Mapping[str, Evaluation | None], divergences: Iterable[Divergence]
) -> Iterator[dict[str, Any]]:
    """Yield each edit's raw numbers and texts; ``others`` (base, in_context) are put beside them under their names."""
    near: dict[str, list[dict[str, Any]]] = {}
    for one in divergences:
        near.setdefault(one.edit or "", []).append(finite({"prompt": one.prompt, "kl": one.kl}))
    beside = {name: _by_id(one.outcomes) for name, one in others.items() if one is not None}
    for outcome in evaluation.outcomes:
        line = outcome.to_json()
        line |= {name: known[outcome.id].to_json() for name, known in beside.items() if outcome.id in known}
        yield {**line, "divergences": near[outcome.id]} if outcome.id in near else line


def _by_id(outcomes: Sequence[Outcome]) -> dict[str, Outcome]:
    return {outcome.id: outcome for outcome in outcomes}


@dataclass(frozen=True, slots=True)
class Earlier:
    """An earlier evaluation, to show beside this one."""

    file: str
    figures: Mapping[str, Any]
    """The JSON object of ``eval --json``."""

    def warnings(self, now: Mapping[str, Any]) -> Iterator[str]:
        """Yield a sentence for each way in which ``now`` was not measured as the earlier one was."""
        before = self.figures.get("protocols")
        if not isinstance(before, Mapping):
            yield f"{self.file} does not say by which protocols it was measured, so its figures may not be comparable"
            return
        for text in differences(now["protocols"], before):
            yield f"do not compare with {self.file}: {text}"
        theirs = self.figures.get("protocol_settings")
        for name, ours in now["protocol_settings"].items():
            other = theirs.get(name) if isinstance(theirs, Mapping) else None
            if other is not None and _deciding(other) != _deciding(ours):
                yield f"do not compare {name} figures with {self.file}: they were taken with {other}, here with {ours}"


def _deciding(settings: Any) -> Any:
    """Return settings without what they counted."""
    return {k: v for k, v in settings.items() if k != "close_calls"} if isinstance(settings, Mapping) else settings


_PASS = "pass what 'editcli eval --json' printed, or the evaluation.json of --record, as --against"


def read_earlier(file: str | None) -> Earlier | None:
    """Read an earlier ``eval --json``, or what ``--record`` kept; raise :class:`OptionError` where it is neither."""
    if file is None:
        return None
    path = expanded(file)
    try:
        figures = parse(read_bytes(path, RECORD))
    except FileError as error:
        raise OptionError(f"--against: {error}") from error
    except UnreadableError as error:
        raise OptionError(f"{path}: {error}; {_PASS}") from error
    if isinstance(figures, dict) and isinstance(figures.get("figures"), dict):
        figures = figures["figures"]
    if not isinstance(figures, dict) or "efficacy_accuracy" not in figures:
        raise OptionError(f"{path} is no evaluation; {_PASS}")
    return Earlier(file, figures)
