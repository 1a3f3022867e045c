"""Score the probability of given answers: one forward pass per batch, the head only at the answers' tokens.

Neither the order of the probes nor the batches change the scores: rows are padded on the right, where a
causal model cannot see them, and log-probabilities are taken in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editcli.distributed.team import Team
from editcli.errors import RequestError
from editcli.models.forward import chunks, head_only_at, pass_tokens, positions, run
from editcli.models.matmul import quick_linears
from editcli.models.tokens import Encoded, RowlessTokenError, Tokens
from editcli.reporting import Reporter, Silent

if TYPE_CHECKING:
    from editcli.models.loading import LoadedModel

BATCH_TOKENS = 8192
"""Tokens of one forward pass, padding included."""

_FLOAT_ROWS = 512
"""Rows of logits converted to float32 at a time; a whole batch of a large vocabulary would take gigabytes."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A question to the model: how likely is it to continue ``prompt`` by ``target``?"""

    prompt: str
    target: str
    between: str | None = None
    """The text between them; by default it depends on the writing system of both."""


@dataclass(frozen=True, slots=True)
class ProbeScore:
    """The model's answer to a :class:`Probe`."""

    logprob: float
    """Mean natural log-probability per target token."""
    exact: bool
    """True when greedy decoding yields the target."""
    accuracy: float
    """Fraction of target tokens that are the most probable one after the true tokens before them."""


def score(
    loaded: LoadedModel,
    probes: Sequence[Probe],
    *,
    batch_tokens: int = BATCH_TOKENS,
    reporter: Reporter | None = None,
    team: Team | None = None,
) -> list[ProbeScore]:
    """Score ``probes``, shared out over ``team``, and return one :class:`ProbeScore` each, in their order.

    Raises :class:`RequestError` for a target without tokens or a probe longer than the model reads.
    """
    unique = list(dict.fromkeys(probes))
    rows = encode_probes(loaded.tokens, unique)

    def work(assigned: Sequence[int]) -> tuple[Tensor]:
        return (_score_rows(loaded, [rows[item] for item in assigned], batch_tokens, reporter or Silent()),)

    (table,) = (team or Team()).spread("scores", [len(row.ids) for row in rows], work)
    scores = (ProbeScore(logprob, bool(exact), accuracy) for logprob, exact, accuracy in table.tolist())
    by_probe = dict(zip(unique, scores, strict=True))
    return [by_probe[probe] for probe in probes]


def encode_probes(tokens: Tokens, probes: Sequence[Probe]) -> list[Encoded]:
    """Tokenise ``probes``; raise :class:`RequestError` for one that the model cannot read or whose answer is empty."""
    try:
        rows = tokens.encode(
            [tokens.continue_with(probe.prompt, probe.target, between=probe.between) for probe in probes]
        )
    except RowlessTokenError as error:
        raise RequestError(str(error)) from error
    for probe, row in zip(probes, rows, strict=True):
        if row.target.start < 1:
            raise RequestError(f"the answer {probe.target!r} has no token of its own after {probe.prompt!r}")
        if tokens.max_length is not None and row.target.stop > tokens.max_length:
            limit = f"the model reads {tokens.max_length}"
            raise RequestError(f"{probe.prompt!r} with its answer has {row.target.stop} tokens, but {limit}")
    return rows


@torch.no_grad()
def logits_at(loaded: LoadedModel, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the (n, vocabulary) logits at n (row, column) positions of a right-padded batch of ids."""
    with head_only_at(loaded.architecture.head, rows, columns):
        return run(loaded.model, ids).logits[0]


def last_logits(loaded: LoadedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits of the token after each row of ids, (n, vocabulary) float32."""
    ids = loaded.tokens.pad([Encoded(tuple(row), -1, range(0)) for row in rows], loaded.input_device)
    return logits_at(loaded, ids, *positions([(n, len(row) - 1) for n, row in enumerate(rows)], ids.device)).float()


def compare(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target token's log-probability and whether it is the most probable one, (n,) each, on the CPU."""
    logprobs, hits = [], []
    for part, token in zip(logits.split(_FLOAT_ROWS), targets.split(_FLOAT_ROWS), strict=True):
        part = part.float()
        logprobs.append(part.gather(1, token[:, None])[:, 0] - part.logsumexp(dim=1))
        hits.append(part.argmax(dim=1) == token)
    return torch.cat(logprobs).cpu(), torch.cat(hits).cpu()


def _score_rows(loaded: LoadedModel, rows: Sequence[Encoded], batch_tokens: int, reporter: Reporter) -> Tensor:
    """Return the log-probability, exactness (0 or 1) and accuracy of each row, (n, 3) float64 on the CPU."""
    table = torch.zeros(len(rows), 3, dtype=torch.float64)
    budget = pass_tokens(batch_tokens, loaded.input_device)
    with reporter.phase("Scoring", len(rows), "prompts") as advance, quick_linears(loaded.model):
        for batch in chunks(rows, budget=budget):
            table[batch] = _score_batch(loaded, [rows[index] for index in batch])
            advance(len(batch))
    return table


def _score_batch(loaded: LoadedModel, batch: Sequence[Encoded]) -> Tensor:
    ids = loaded.tokens.pad(batch, loaded.input_device)
    rows, columns = positions([(r, c) for r, row in enumerate(batch) for c in row.predicting], ids.device)
    logits = logits_at(loaded, ids, rows, columns)
    # The logits at a position predict the token after it.
    logprobs, hits = compare(logits, ids[rows, columns + 1].to(logits.device))
    lengths = [len(row.target) for row in batch]
    answers = zip(logprobs.double().split(lengths), hits.split(lengths), strict=True)
    return torch.stack([torch.stack((v.mean(), h.all().double(), h.double().mean())) for v, h in answers])
