"""The effect of edits on a model's general ability: perplexity, and divergence from the base, on ordinary text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editcli.distributed.team import Team
from editcli.errors import ModelError, OptionError
from editcli.evaluation.scoring import BATCH_TOKENS, logits_at
from editcli.models.forward import chunks, positions
from editcli.models.loading import bundled_folder
from editcli.models.tokens import Encoded, Text, Tokens
from editcli.reporting import Reporter, Silent
from editcli.storage.opening import TEXT, expanded, read_text

if TYPE_CHECKING:
    from editcli.models.loading import LoadedModel

_FLOAT_ROWS = 256
"""Rows of logits in float32 at a time. Every token needs its whole distribution here, hence small batches as well."""


@dataclass(frozen=True, slots=True)
class Drift:
    """General ability of an edited model beside its base, on the same text."""

    perplexity: float
    perplexity_base: float
    kl: float
    """Mean KL(base || edited) per token, in nats."""
    tokens: int
    """Tokens predicted."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object."""
        return asdict(self)


def general_text(file: str | None) -> Iterator[str]:
    """Yield the paragraphs of the text to measure general ability on: a file's, or the bundled held-out text's."""
    path = expanded(file) if file is not None else bundled_folder() / "heldout.txt"
    try:
        content = read_text(path, TEXT)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"the text {path} cannot be read: {error}") from error
    yield from (line for line in content.splitlines() if line.strip())


def general_drift(
    edited: LoadedModel,
    base: LoadedModel,
    texts: Iterable[str],
    *,
    max_length: int = 512,
    max_tokens: int = 20_000,
    batch_tokens: int = BATCH_TOKENS // 4,
    reporter: Reporter | None = None,
    team: Team | None = None,
) -> Drift:
    """Compare two loaded models on about the first ``max_tokens`` tokens of ``texts``, cut to ``max_length``.

    The batches are shared out over ``team``, whose ranks all get the same figures.

    Raises :class:`ModelError` when the models do not share their tokens, or when there is no text.
    """
    if edited.tokens.tokenizer.get_vocab() != base.tokens.tokenizer.get_vocab():
        raise ModelError("the edited model and the base have different tokenizers; pass the model that was edited")
    rows = _rows(edited.tokens, texts, max_length=max_length, max_tokens=max_tokens)
    total = sum(len(row.ids) - 1 for row in rows)
    sums = torch.zeros(3, dtype=torch.float64)
    team = team or Team()
    batches = [[rows[index] for index in chunk] for chunk in chunks(rows, budget=batch_tokens)]
    predicted = [sum(len(row.ids) - 1 for row in batch) for batch in batches]
    assigned = team.share(predicted)
    with (reporter or Silent()).phase(
        "Comparing with the base", sum(predicted[n] for n in assigned), "tokens"
    ) as advance:
        for number in assigned:
            sums += _batch_sums(edited, base, batches[number])
            advance(predicted[number])
    team.total("sums of the drift", [sums])
    return _drift_of(sums, total)


class TextBaseline:
    """A model's logits on a text, for comparing many edited versions of the model with it.

    They are stored on the CPU in float32: ``max_tokens`` times the vocabulary times 4 bytes, 80 MB for a vocabulary of
    50,000. Raises :class:`ModelError` when there is no text.
    """

    def __init__(self, loaded: LoadedModel, texts: Iterable[str], *, max_length: int = 128, max_tokens: int = 400):
        rows = _rows(loaded.tokens, texts, max_length=max_length, max_tokens=max_tokens)
        chosen = [[rows[index] for index in chunk] for chunk in chunks(rows, budget=BATCH_TOKENS // 4)]
        self._batches = [(batch, _logits(loaded, batch).cpu()) for batch in chosen]

    def drift(self, loaded: LoadedModel) -> Drift:
        """Compare the edited model with the stored logits."""
        sums = torch.zeros(3, dtype=torch.float64)
        tokens = 0
        for batch, before in self._batches:
            sums += compare_logits(_logits(loaded, batch), before, _predicted(batch))
            tokens += len(before)
        return _drift_of(sums, tokens)


def compare_logits(edited: Tensor, base: Tensor, targets: Tensor) -> Tensor:
    """Return the sums over n tokens of (NLL edited, NLL base, KL(base || edited)), nats, float64 on the CPU.

    ``edited`` and ``base`` are (n, vocabulary) logits that predict ``targets``, (n,).
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in zip(edited.split(_FLOAT_ROWS), base.split(_FLOAT_ROWS), targets.split(_FLOAT_ROWS), strict=True):
        ours, theirs = (logits.to(edited.device).float().log_softmax(dim=1) for logits in rows[:2])
        chosen = rows[2].to(edited.device)[:, None]
        kl = (theirs.exp() * (theirs - ours)).sum()
        sums += torch.stack([-ours.gather(1, chosen).sum(), -theirs.gather(1, chosen).sum(), kl]).double().cpu()
    return sums


def _drift_of(sums: Tensor, tokens: int) -> Drift:
    """Return the means of the sums of :func:`compare_logits` over all tokens."""
    nll, nll_base, kl = (sums / tokens).tolist()
    # Rounding may give a model that equals its base a tiny negative divergence.
    return Drift(math.exp(nll), math.exp(nll_base), max(kl, 0.0), tokens)


def _batch_sums(edited: LoadedModel, base: LoadedModel, batch: Sequence[Encoded]) -> Tensor:
    return compare_logits(_logits(edited, batch), _logits(base, batch), _predicted(batch))


def _logits(loaded: LoadedModel, batch: Sequence[Encoded]) -> Tensor:
    """Return the logits that predict every token of a batch but the first of each row, (n, vocabulary)."""
    ids = loaded.tokens.pad(batch, loaded.input_device)
    return logits_at(loaded, ids, *positions(_positions(batch), ids.device))


def _predicted(batch: Sequence[Encoded]) -> Tensor:
    """Return the tokens that :func:`_logits` predicts, (n,)."""
    return torch.tensor([batch[r].ids[c + 1] for r, c in _positions(batch)])


def _positions(batch: Sequence[Encoded]) -> list[tuple[int, int]]:
    return [(r, c) for r, row in enumerate(batch) for c in range(len(row.ids) - 1)]


def _rows(tokens: Tokens, texts: Iterable[str], *, max_length: int, max_tokens: int) -> list[Encoded]:
    """Return the first ``max_tokens`` tokens of ``texts`` as rows of at most ``max_length``, at least two each.

    Raises :class:`ModelError` when there is no such row.
    """
    length = min(max_length, tokens.max_length or max_length)
    rows: list[Encoded] = []
    left = max_tokens
    for text in texts:
        ids = tokens.encode([Text(text, None, None)])[0].ids[:left]
        pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
        rows += [Encoded(piece, -1, range(0)) for piece in pieces if len(piece) > 1]
        left -= len(ids)
        if left <= 0:
            break
    if not rows:
        raise ModelError("there is no text to measure general ability on; pass another one with --text")
    return rows
