"""Score how probable a model finds given answers: one forward pass a batch, the head only where an answer stands.

Nothing here depends on the order of the probes or on how they were batched: rows are padded on the right, where a
causal model cannot see them, and log-probabilities are taken in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editcli.errors import RequestError
from editcli.models.forward import chunks, head_only_at, positions, run
from editcli.models.tokens import Encoded, Tokens
from editcli.report import Reporter, Silent

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


@dataclass(frozen=True, slots=True)
class ProbeScore:
    """The model's answer to a :class:`Probe`."""

    logprob: float
    """Mean natural log-probability per target token."""
    exact: bool
    """True when greedy decoding yields the target."""
    accuracy: float
    """Share of target tokens that are the most probable one after the true tokens before them."""


def score(
    loaded: LoadedModel, probes: Sequence[Probe], *, batch_tokens: int = BATCH_TOKENS, reporter: Reporter | None = None
) -> list[ProbeScore]:
    """Score ``probes`` and return one :class:`ProbeScore` each, in their order.

    Raises :class:`RequestError` for a target without tokens or a probe longer than the model reads.
    """
    unique = list(dict.fromkeys(probes))
    rows = encode_probes(loaded.tokens, unique)
    results: dict[Probe, ProbeScore] = {}
    with (reporter or Silent()).phase("Scoring", len(rows), "prompts") as advance:
        for batch in chunks(rows, budget=batch_tokens):
            scores = _score_batch(loaded, [rows[index] for index in batch])
            results.update(zip((unique[index] for index in batch), scores, strict=True))
            advance(len(batch))
    return [results[probe] for probe in probes]


def encode_probes(tokens: Tokens, probes: Sequence[Probe]) -> list[Encoded]:
    """Tokenise ``probes``; raise :class:`RequestError` for one without target tokens or longer than the context."""
    rows = tokens.encode([tokens.continue_with(probe.prompt, probe.target) for probe in probes])
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


def compare(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return each wanted token's log-probability and whether it is the most probable one, (n,) each, on the CPU."""
    logprobs, hits = [], []
    for part, token in zip(logits.split(_FLOAT_ROWS), wanted.split(_FLOAT_ROWS), strict=True):
        part = part.float()
        logprobs.append(part.gather(1, token[:, None])[:, 0] - part.logsumexp(dim=1))
        hits.append(part.argmax(dim=1) == token)
    return torch.cat(logprobs).cpu(), torch.cat(hits).cpu()


def _score_batch(loaded: LoadedModel, batch: Sequence[Encoded]) -> list[ProbeScore]:
    ids = loaded.tokens.pad(batch, loaded.input_device)
    rows, columns = positions([(r, c) for r, row in enumerate(batch) for c in row.predicting], ids.device)
    logits = logits_at(loaded, ids, rows, columns)
    # The logits at a position predict the token after it.
    logprobs, hits = compare(logits, ids[rows, columns + 1].to(logits.device))
    lengths = [len(row.target) for row in batch]
    return [
        ProbeScore(
            logprob=float(values.double().mean()), exact=bool(right.all()), accuracy=float(right.double().mean())
        )
        for values, right in zip(logprobs.split(lengths), hits.split(lengths), strict=True)
    ]
