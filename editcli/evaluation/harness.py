"""General ability on established benchmarks: lm-evaluation-harness on a loaded model.

A thin layer: tasks, metrics and their names are the harness's own, so figures are comparable with published ones. It
is an extra, ``editcli[harness]``. A task's YAML file may bring code of its own, which then runs.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editcli.errors import OptionError
from editcli.models.hub import first_line
from editcli.settings.suites import Suite

if TYPE_CHECKING:
    from editcli.models.loading import LoadedModel

BATCH = 8
"""Requests that go through the model together."""
_DESCRIPTIONS = ("alias", "name", "sample_len", "sample_count")
"""Entries among a task's metrics that are no metrics."""


@dataclass(frozen=True, slots=True)
class HarnessResult:
    """Results of lm-evaluation-harness, under its own names."""

    version: str
    """Of lm-evaluation-harness; its tasks change between versions."""
    tasks: Mapping[str, Mapping[str, float | None]]
    """``{task: {"acc,none": 0.5, "acc_stderr,none": 0.1}}``; None for what the harness could not compute."""
    samples: Mapping[str, int]
    """Number of documents asked per task."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of each task, as the harness names them."""
    shots: Mapping[str, int] = field(default_factory=dict)
    """Examples in front of each question, per task."""
    limit: int | None = None
    """Most documents asked per task; None for all."""
    suite: Mapping[str, Any] | None = None
    """Name, version and tasks of the set that was asked for, and its optional tasks that the harness lacks."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object."""
        return asdict(self)


def require_harness() -> None:
    """Raise :class:`OptionError` when lm-evaluation-harness is not installed."""
    try:
        import lm_eval.models.huggingface  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        hint = "install it with: pip install 'editcli[harness]'"
        raise OptionError(f"--harness and --suite need lm-evaluation-harness ({error}); {hint}") from error


def run_harness(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    suite: Suite | None = None,
    include: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
) -> HarnessResult:
    """Run ``tasks`` on a model in memory; each is a name, a pattern such as ``mmlu_*``, or a task's YAML file.

    The tasks of ``suite`` come first. ``include`` names folders with more tasks; ``limit`` is the most documents of
    each task that are asked, the first ones. Raises :class:`OptionError` for a task that is not known or whose data
    cannot be read.
    """
    require_harness()
    import lm_eval  # pyright: ignore[reportMissingImports]

    # Typed less strictly than it is: its signature differs between versions.
    simple_evaluate: Any = lm_eval.simple_evaluate
    required = (*(suite.tasks if suite else ()), *tasks)
    manager, names, left_out = _find(required, suite.optional if suite else (), include)
    tokens, chat = loaded.tokens, loaded.tokens.conversation
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    try:
        # Tasks and metrics may write to stdout, where our own JSON goes.
        with contextlib.redirect_stdout(sys.stderr):
            results = simple_evaluate(
                _wrapped(loaded),
                tasks=names,
                task_manager=manager,
                limit=limit,
                log_samples=False,
                apply_chat_template=tokens.chat_template,
                system_instruction=None if chat is None else chat.settings.system,
                **dict.fromkeys(seeds, seed),
            )
    except ImportError as error:
        raise OptionError(f"a task of {', '.join(names)} needs another package: {first_line(error)}") from error
    except OSError as error:
        raise OptionError(f"the data of {', '.join(names)} cannot be read: {first_line(error)}") from error
    result = _result(results, lm_eval.__version__)
    return replace(result, limit=limit, suite=None if suite is None else suite.to_json(left_out))


def _wrapped(loaded: LoadedModel) -> Any:
    """Return a loaded model as the harness takes one."""
    from lm_eval.models import huggingface  # pyright: ignore[reportMissingImports]

    wrap: Any = huggingface.HFLM
    tokens, chat = loaded.tokens, loaded.tokens.conversation
    # The harness renders the template itself, so it needs the template's variables.
    arguments = {"chat_template_args": dict(chat.settings.arguments)} if chat and chat.settings.arguments else {}
    return wrap(
        pretrained=loaded.model,
        tokenizer=tokens.tokenizer,
        max_length=tokens.max_length,
        batch_size=BATCH,
        **arguments,
    )


def _find(
    tasks: Sequence[str], optional: Sequence[str], include: Sequence[str]
) -> tuple[Any, list[str], tuple[str, ...]]:
    """Return a task manager, the tasks' names in it, and the optional tasks that it does not know.

    Raises :class:`OptionError` for one of ``tasks`` that it does not know.
    """
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    # Reading the harness's own thousands of tasks takes a while, so it waits until one of them is asked for.
    for everything in (False, True):
        manager = TaskManager(include_path=list(include) or None, include_defaults=everything)
        matches = [_matching(manager, task) for task in tasks]
        if all(matches):
            known = [_matching(manager, task) for task in optional]
            left_out = tuple(task for task, names in zip(optional, known, strict=True) if not names)
            # A task that is named twice is asked once.
            return manager, list(dict.fromkeys(name for names in (*matches, *known) for name in names)), left_out
    unknown = next(task for task, names in zip(tasks, matches, strict=True) if not names)
    raise OptionError(f"lm-evaluation-harness knows no task {unknown!r}; {_hint(unknown, manager)}")


def _matching(manager: Any, task: str) -> list[str]:
    if Path(task).suffix not in (".yaml", ".yml"):
        return sorted(manager.match_tasks([task]))
    if not Path(task).is_file():
        raise OptionError(f"there is no task file {task}")
    return [task]


def _hint(task: str, manager: Any) -> str:
    close = difflib.get_close_matches(task, manager.task_index, n=1)
    return f"did you mean {close[0]!r}?" if close else "pass the folder of its YAML file with --harness-include"


def _result(results: Mapping[str, Any], version: str) -> HarnessResult:
    tasks = {
        str(task): {name: _number(value) for name, value in figures.items() if name.strip() not in _DESCRIPTIONS}
        for task, figures in results["results"].items()
    }
    samples = {str(task): int(counts["effective"]) for task, counts in results["n-samples"].items()}
    versions = {str(task): str(name) for task, name in results.get("versions", {}).items()}
    shots = {str(task): int(count) for task, count in results.get("n-shot", {}).items() if task in samples}
    return HarnessResult(version, tasks, samples, versions, shots)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
