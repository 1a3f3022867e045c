"""The protocol ``generated``: let the model write after every prompt of an edit, and score the texts.

Nothing of the answer is fed in, and nothing is cut at its length (the two habits that arXiv:2502.11177 shows to
flatter). :mod:`editcli.evaluation.writing` writes, :mod:`editcli.evaluation.answers` scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from editcli.evaluation.answers import contains, is_degenerate, is_exact
from editcli.evaluation.questions import Question
from editcli.evaluation.writing import Written


@dataclass(frozen=True, slots=True)
class FreeAnswer:
    """The text that the model wrote after one prompt, and its scores."""

    group: str
    prompt: str
    text: str
    exact: bool
    """Whether the text is the right answer, normalised."""
    right: bool
    """Whether it contains the right answer: an edit's new one, a neighbour's own."""
    rival: bool | None
    """Whether it contains the rival answer: the old one, at a neighbour the edit's new one; None without a rival."""
    degenerate: bool
    """Whether it repeats itself or has no word."""
    tokens: int
    ending: str
    """The rule that ended it: end, newline, sentence or length."""
    close: bool = False
    """Whether rounding might have decided a token, had the text been written in a batch."""
    axis: str | None = None


def free_answer(question: Question, written: Written) -> FreeAnswer:
    """Score the text that was written after the prompt of ``question``."""
    right = (question.target, *question.aliases)
    return FreeAnswer(
        group=question.group,
        prompt=question.prompt,
        text=written.text,
        exact=is_exact(written.text, right),
        right=contains(written.text, right),
        rival=None if question.rival is None else contains(written.text, [question.rival]),
        degenerate=is_degenerate(written.text),
        tokens=written.tokens,
        ending=written.ending,
        close=written.close,
        axis=question.axis,
    )


_FIGURES: Mapping[str, tuple[str, str, str]] = {
    "efficacy": ("efficacy", "contains_new", "contains_old"),
    "paraphrases": ("generalization", "contains_new", "contains_old"),
    "neighbors": ("specificity", "contains_own", "contains_new"),
}
"""Of each group of prompts the name of its figures, of the right answer's and of the rival's."""


def summarize_generated(edits: Sequence[Iterable[FreeAnswer]]) -> dict[str, float | None]:
    """Return the figures of the protocol over the answers of each edit: within an edit first, then over edits."""
    figures: dict[str, float | None] = {}
    for group, (name, right, rival) in _FIGURES.items():
        answers = [[answer for answer in edit if answer.group == group] for edit in edits]
        figures |= {
            f"{name}_exact": mean_of_means(answers, lambda answer: answer.exact),
            f"{name}_{right}": mean_of_means(answers, lambda answer: answer.right),
            f"{name}_{rival}": mean_of_means(answers, lambda answer: answer.rival),
            f"{name}_degenerate": mean_of_means(answers, lambda answer: answer.degenerate),
        }
    return figures


def mean_of_means(edits: Iterable[Iterable[FreeAnswer]], figure: Callable[[FreeAnswer], bool | None]) -> float | None:
    """Return the mean over edits of the mean over an edit's answers; None where no answer has the figure."""
    known = [[value for answer in edit if (value := figure(answer)) is not None] for edit in edits]
    means = [fmean(values) for values in known if values]
    return fmean(means) if means else None
