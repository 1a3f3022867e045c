"""The protocol ``choice``: the model picks between the answers that the prompt lists, by log-probability.

An edit may be said when it is asked for and not be chosen when it stands beside the old answer ("surface compliance",
arXiv:2604.05995). Two lists are shown: new and old; and new, old and "unsure". Models prefer places and letters, so
each list is shown in every rotation, and an answer's score is the mean of its letters' log-probabilities over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editcli.distributed.team import Team
from editcli.evaluation.scoring import BATCH_TOKENS, last_logits
from editcli.models.forward import batches, pass_tokens
from editcli.models.matmul import quick_linears
from editcli.reporting import Reporter, Silent

if TYPE_CHECKING:
    from editcli.models.loading import LoadedModel

LETTERS = ("A", "B", "C")
UNSURE = "unsure"
VERSION = "listed-1"
"""Name of the text below; another text gets another name."""


@dataclass(frozen=True, slots=True)
class Choosing:
    """An edit's prompt with the answers to choose from."""

    prompt: str
    new: str
    old: str

    @property
    def lists(self) -> tuple[tuple[str, ...], ...]:
        """The lists of answers in the order in which they are shown: two of two answers, then three of three."""
        return (*rotations((self.new, self.old)), *rotations((self.new, self.old, UNSURE)))


@dataclass(frozen=True, slots=True)
class Choice:
    """The model's choices: for each answer the mean log-probability of its letter among the letters shown."""

    new_of_two: float
    old_of_two: float
    consistent: bool
    """Whether the same answer wins in both orders: else place or letter decided."""
    new_of_three: float
    old_of_three: float
    unsure_of_three: float

    @property
    def two(self) -> str | None:
        """The answer that wins of two; None for a tie."""
        return _winner({"new": self.new_of_two, "old": self.old_of_two})

    @property
    def three(self) -> str | None:
        """The answer that wins of three; None for a tie."""
        return _winner({"new": self.new_of_three, "old": self.old_of_three, "unsure": self.unsure_of_three})

    def to_json(self) -> dict[str, Any]:
        """Return scores and winners as a JSON object."""
        return {**asdict(self), "two": self.two, "three": self.three}


def rotations(answers: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the answers begun at each of them in turn, so that each stands once in every place."""
    return [answers[start:] + answers[:start] for start in range(len(answers))]


def listing(prompt: str, answers: Sequence[str]) -> str:
    """Return the prompt with a lettered list of answers, up to where a letter follows."""
    lines = [f"{letter}. {answer.strip()}" for letter, answer in zip(LETTERS, answers, strict=False)]
    return "\n".join([prompt.strip(), *lines, "Answer:"])


def choose(
    loaded: LoadedModel,
    questions: Sequence[Choosing],
    *,
    batch_tokens: int = BATCH_TOKENS,
    reporter: Reporter | None = None,
    team: Team | None = None,
) -> dict[Choosing, Choice]:
    """Let the model choose for each question; the work is shared out over ``team``.

    A question is left out whose lists are longer than the model reads, or whose tokenizer does not tell the letters
    apart.
    """
    shown = _readable(loaded, list(dict.fromkeys(questions)))
    letters = torch.tensor([one.letters for one in shown], dtype=torch.long).reshape(-1, len(LETTERS))

    def work(assigned: Sequence[int]) -> tuple[Tensor]:
        rows = [shown[item].ids for item in assigned]
        return (_letter_scores(loaded, rows, letters[list(assigned)], batch_tokens, reporter or Silent()),)

    (table,) = (team or Team()).spread("choices", [len(one.ids) for one in shown], work)
    by_question: dict[Choosing, list[dict[str, float]]] = {}
    for one, scores in zip(shown, table, strict=True):
        of_shown = scores[: len(one.answers)].log_softmax(dim=0).tolist()
        roles = _roles(one.question, one.answers)
        by_question.setdefault(one.question, []).append(dict(zip(roles, of_shown, strict=True)))
    return {question: _choice(scores) for question, scores in by_question.items()}


@dataclass(frozen=True, slots=True)
class _Shown:
    """A list as the model reads it: up to where its letters part, and the tokens with which they do."""

    question: Choosing
    answers: tuple[str, ...]
    ids: tuple[int, ...]
    letters: tuple[int, ...]


def _readable(loaded: LoadedModel, questions: Sequence[Choosing]) -> list[_Shown]:
    """Return the lists of the questions that the model can read in all of their lists."""
    tokens, limit = loaded.tokens, loaded.tokens.max_length or math.inf
    readable: list[_Shown] = []
    for question in questions:
        shown = []
        for answers in question.lists:
            text = listing(question.prompt, answers)
            rows = [row.ids for row in tokens.encode([tokens.continue_with(text, letter) for letter in LETTERS])]
            ids = _common(rows)
            letters = tuple(row[len(ids)] for row in rows if len(row) > len(ids))
            if ids and len(set(letters)) == len(LETTERS) and max(map(len, rows)) <= limit:
                shown.append(_Shown(question, answers, ids, letters))
        if len(shown) == len(question.lists):
            readable += shown
    return readable


def _common(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the tokens with which all rows begin."""
    length = next((place for place, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), None)
    return rows[0][:length]


def summarize_choice(choices: Sequence[Choice]) -> dict[str, float | None]:
    """Return the shares of edits in which each answer wins; None without any edit to choose for."""

    def share(wins: Sequence[bool]) -> float | None:
        return fmean(wins) if wins else None

    return {
        "two_new": share([one.two == "new" for one in choices]),
        "two_consistent": share([one.consistent for one in choices]),
        "three_new": share([one.three == "new" for one in choices]),
        "three_old": share([one.three == "old" for one in choices]),
        "three_unsure": share([one.three == "unsure" for one in choices]),
    }


def _roles(question: Choosing, answers: Sequence[str]) -> list[str]:
    """Return which answer stands in each place; a list begins with new, old or unsure and goes on in that order."""
    order = ("new", "old", "unsure")[: len(answers)]
    start = (question.new, question.old, UNSURE).index(answers[0])
    return [order[(start + place) % len(answers)] for place in range(len(answers))]


def _choice(scores: Sequence[dict[str, float]]) -> Choice:
    two, three = scores[:2], scores[2:]
    return Choice(
        new_of_two=fmean(one["new"] for one in two),
        old_of_two=fmean(one["old"] for one in two),
        consistent=len({_winner(one) for one in two} - {None}) == 1 and all(_winner(one) for one in two),
        new_of_three=fmean(one["new"] for one in three),
        old_of_three=fmean(one["old"] for one in three),
        unsure_of_three=fmean(one["unsure"] for one in three),
    )


def _winner(scores: dict[str, float]) -> str | None:
    best = max(scores.values())
    names = [name for name, value in scores.items() if value == best]
    return names[0] if len(names) == 1 else None


def _letter_scores(
    loaded: LoadedModel, rows: Sequence[tuple[int, ...]], letters: Tensor, batch_tokens: int, reporter: Reporter
) -> Tensor:
    """Return the log-probability of each letter behind each row, (n, letters) float64 on the CPU."""
    table = torch.zeros(letters.shape, dtype=torch.float64)
    budget = pass_tokens(batch_tokens, loaded.input_device)
    with reporter.phase("Choosing", len(rows), "lists") as advance, quick_linears(loaded.model):
        for batch in batches([len(row) for row in rows], budget=budget):
            logits = last_logits(loaded, [rows[index] for index in batch])
            table[batch] = logits.log_softmax(dim=1).gather(1, letters[batch].to(logits.device)).double().cpu()
            advance(len(batch))
    return table
