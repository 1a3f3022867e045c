"""Everything that decides what ``eval``, ``stats compute`` and ``tune`` do; ``apply`` has :class:`Recipe`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from editcli.errors import OptionError, near_miss
from editcli.models.quantisation import NAMES, parse_quantisations
from editcli.settings.core import StatisticsOptions
from editcli.settings.judging import check_address
from editcli.settings.recipe import ChatLoadingSettings, LoadingSettings, Recipe
from editcli.settings.setting import check_values, like, setting
from editcli.settings.stopping import MOST, StopRules, parse_stops
from editcli.settings.suites import SUITES

MEASURE, JUDGE, STATISTICS, SEARCH = "Measure", "Judge", "Statistics", "Search"
"""Sections of ``--help``."""
OWN_BASE = "own"
"""Stands for the base that a run records."""
MINUTES = 10.0
"""Time for a search where neither minutes nor trials are given."""

IN_CONTEXT = "in-context"
"""The baseline: the base with the fact in front of the prompt."""

KL_PRICE = 1.0
"""Points of a search's score for one nat of KL(base || edited) per token: 0.01 nats, 1 % of perplexity, cost 0.01."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecipe(ChatLoadingSettings):
    """The settings of ``eval``; raises :class:`OptionError` when it makes no sense."""

    model: str
    edits: str | None = None
    """None measures the harness's tasks and the drift alone."""
    base: str | None = setting(
        None,
        "Measure the base as well, and what the edits cost in general ability. A run knows its base: a bare --base, "
        "after the arguments, is enough; else --base=MODEL.",
        section=MEASURE,
        env=False,
        value="model",
        metavar="[MODEL]",
        bare=OWN_BASE,
    )
    """A folder, a hub id, or :data:`OWN_BASE`."""
    metrics: tuple[str, ...] = setting(
        (),
        "counterfact, zsre, knowedit, generated, choice, distribution (with --base), fluency, consistency; repeatable."
        "  [default: all that the records allow but the last two]",
        section=MEASURE,
        value="texts",
    )
    sample: int | None = setting(None, "Measure N edits, drawn by --seed, not all.", section=MEASURE, least=1)
    text: str | None = setting(
        None, "Text for --base.  [default: the bundled held-out text]", section=MEASURE, value="file"
    )
    baseline: str | None = setting(
        None,
        "Measure the base with the fact stated in front of every prompt as well; needs --base.",
        section=MEASURE,
        metavar="in-context",
        value="texts",
    )
    max_new_tokens: int = setting(MOST, "Most tokens of a text that the model writes.", section=MEASURE, least=1)
    min_new_tokens: int = setting(0, "Fewest tokens of a text that the model writes.", section=MEASURE, least=0)
    stop: tuple[str, ...] = setting(
        (),
        "Rule that ends a text besides the model's end of text: newline, sentence, or none; repeatable.  "
        "[default: newline and sentence]",
        section=MEASURE,
        metavar="RULE",
        value="texts",
    )
    against: str | None = setting(
        None,
        "An earlier --json of eval, or the evaluation.json of --record, to show beside these figures; warns where the "
        "two were not measured alike.",
        section=MEASURE,
        env=False,
        value="file",
    )
    quantise: tuple[str, ...] = setting(
        (),
        f"Measure the edits on a quantised copy as well: {', '.join(NAMES)}; repeatable.",
        section=MEASURE,
        flags=("--as",),
        env=False,
        value="texts",
        metavar="TYPE",
    )
    harness: tuple[str, ...] = setting(
        (),
        "Run a task of lm-evaluation-harness as well, its name or YAML file, on the base too with --base; repeatable. "
        "EDITS may then be left out.",
        section=MEASURE,
        env=False,
        value="texts",
        metavar="TASK",
    )
    suite: str | None = setting(
        None,
        "Run a named set of lm-evaluation-harness tasks, on the base too with --base: standard is MMLU, GSM8K, IFEval, "
        "ARC-C, TruthfulQA, and XSTest where the harness has it. EDITS may then be left out.",
        section=MEASURE,
        env=False,
        metavar="standard",
        value="texts",
    )
    task_limit: int | None = setting(
        None,
        "Ask only the first N documents of each task of --suite and --harness.  [default: --limit where EDITS are "
        "left out]",
        section=MEASURE,
        least=1,
    )
    harness_include: tuple[str, ...] = setting(
        (),
        "Folder with more tasks; repeatable. A task's file may bring code, which then runs.",
        section=MEASURE,
        env=False,
        value="existing folder",
    )
    judge: str | None = setting(
        None,
        "Send every answer that the model writes to this OpenAI-compatible endpoint, for a verdict; the key is in the "
        "variable EDITCLI_JUDGE_KEY. Nothing is sent without this.",
        section=JUDGE,
        cli_only=True,
        metavar="URL",
    )
    judge_model: str | None = setting(None, "The model that judges.", section=JUDGE, env=False, metavar="NAME")
    judge_budget: int = setting(
        1000, "Most requests to the judge, repeated ones included.", section=JUDGE, env=False, least=1
    )
    verdicts: str = setting(
        "verdicts.jsonl",
        "File of the verdicts, each written as it comes; what is there is not asked again.",
        section=JUDGE,
        env=False,
        value="file",
    )
    seed: int = like(LoadingSettings, "seed", section=MEASURE)
    limit: int | None = like(Recipe, "limit")
    on_error: str = like(Recipe, "on_error")
    out: str | None = setting(
        None, "Write every edit's raw numbers and texts as JSON lines.", section="Output", env=False, value="file"
    )
    record: bool = setting(
        False,
        "Keep figures and texts in the folder of the run, for 'editcli report'.",
        section="Output",
        cli_only=True,
    )

    def __post_init__(self) -> None:
        ChatLoadingSettings.__post_init__(self)
        if parse_quantisations(self.quantise) and self.edits is None:
            raise OptionError("--as measures edits on a quantised copy; pass EDITS.jsonl as well")
        if self.baseline not in (None, IN_CONTEXT):
            raise OptionError(f"there is no baseline {self.baseline!r}; the one there is is {IN_CONTEXT}")
        if self.baseline is not None and (self.base is None or self.edits is None):
            raise OptionError("--baseline states the edits to the base; pass EDITS.jsonl and --base as well")
        if "distribution" in self.metrics and self.base is None:
            raise OptionError("the distribution is compared with the base's; pass --base as well")
        # Building them checks them.
        self.rules  # noqa: B018
        self._check_judge()
        if self.suite is not None and self.suite not in SUITES:
            raise OptionError(f"there is no suite {self.suite!r}{near_miss(self.suite, SUITES)}")
        if self.harness_include and not self.runs_tasks:
            raise OptionError("--harness-include names where tasks are; name the tasks with --harness or --suite")
        if self.task_limit is not None and not self.runs_tasks:
            raise OptionError("--task-limit is for the tasks of --harness and --suite; name some")
        if self.text is not None and self.base is None:
            raise OptionError("--text is what --base is measured on; pass both")
        if self.out is not None and not Path(self.out).absolute().parent.is_dir():
            raise OptionError(f"the folder of --out {self.out} does not exist")

    def _check_judge(self) -> None:
        if self.judge is None:
            if self.judge_model is not None:
                raise OptionError("--judge-model names a model of --judge URL; pass both")
            return
        check_address(self.judge)
        if self.judge_model is None:
            raise OptionError("--judge needs the name of the model that judges; pass --judge-model NAME")
        if self.edits is None or (self.metrics and "generated" not in self.metrics):
            raise OptionError(
                "--judge judges the answers that the model writes; pass EDITS.jsonl and generated metrics"
            )
        if not Path(self.verdicts).absolute().parent.is_dir():
            raise OptionError(f"the folder of --verdicts {self.verdicts} does not exist")

    @property
    def runs_tasks(self) -> bool:
        """Whether lm-evaluation-harness is to run."""
        return bool(self.harness or self.suite)

    @property
    def documents(self) -> int | None:
        """Most documents of each task of lm-evaluation-harness; None for all."""
        return self.limit if self.task_limit is None and self.edits is None else self.task_limit

    @property
    def rules(self) -> StopRules:
        """When a text that the model writes freely ends; raises :class:`OptionError` for rules that exclude another."""
        if self.min_new_tokens > self.max_new_tokens:
            raise OptionError(f"--min-new-tokens {self.min_new_tokens} is more than --max-new-tokens allows")
        return StopRules(self.max_new_tokens, self.min_new_tokens, parse_stops(self.stop))


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentsRecipe(LoadingSettings):
    """The settings of ``stats``: the second moments to compute, their text, and a file besides the cache."""

    model: str | None = None
    revision: str | None = like(Recipe, "revision")
    preset: str | None = like(Recipe, "preset", section=STATISTICS)
    layers: tuple[int, ...] | None = like(
        Recipe, "layers", section=STATISTICS, help="Layers such as 4-8.  [default: the preset's]"
    )
    experts: bool = setting(
        False,
        "Of layers with a shared expert, read the routed ones, which moeedit edits.",
        section=STATISTICS,
        env=False,
    )
    corpus: str | None = like(Recipe, "corpus", section=STATISTICS)
    options: StatisticsOptions | None = None
    seed: int = like(LoadingSettings, "seed", section=STATISTICS)
    out: str | None = setting(None, "Also write a file for apply --stats.", section="Output", env=False, value="file")


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRecipe:
    """The settings of ``tune``; raises :class:`OptionError` when it makes no sense."""

    run: Recipe
    """Model, edits (:data:`editcli.tuning.space.SOURCE` for the bundled probes), methods, fixed settings and out."""
    minutes: float | None = setting(
        None,
        "Time for everything, loading and the comparison at the end included.  [default: 10, unless --trials]",
        section=SEARCH,
        metavar="MINUTES",
    )
    trials: int | None = setting(None, "Stop after N trials, those before --resume included.", section=SEARCH, least=1)
    sample: int | None = setting(
        None,
        "Edits of a trial; as many are held out.  [default: 8 to 64, what the time allows]",
        section=SEARCH,
        least=1,
    )
    kl_price: float = setting(
        KL_PRICE, "Points of the score that a nat of drift per token costs.", section=SEARCH, metavar="POINTS"
    )
    text: str | None = setting(
        None, "Text for the drift.  [default: the bundled held-out text]", section=SEARCH, value="file"
    )
    resume: bool = setting(False, "Continue the search in DIR.", cli_only=True)

    def __post_init__(self) -> None:
        check_values(self)
        if self.minutes is not None and self.minutes <= 0:
            raise OptionError(f"--minutes must be more than 0, not {self.minutes:g}")
        if self.kl_price < 0:
            raise OptionError(f"--kl-price must not be negative, but it is {self.kl_price:g}")

    @property
    def limit(self) -> float | None:
        """The minutes that the search may take; None where only trials are limited."""
        return MINUTES if self.minutes is None and self.trials is None else self.minutes
